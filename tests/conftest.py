"""Small models that many tests share."""

import dataclasses
import os

import pytest
import torch

from agents.models.bagel.model import Bagel, BagelConfig
from agents.models.bagel.vision import VisionConfig

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))


def pytest_collection_modifyitems(items):
    """Tests marked `gpu` are skipped where torch finds no accelerator."""
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs an accelerator"))


@pytest.fixture
def small_bagel() -> Bagel:
    """A small random model of the shapes world; its velocity head is not zero."""
    config = BagelConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_theta=1e3,
        z_channels=3,
        latent_patch_size=4,
        latent_height=6,
        latent_width=6,
        max_latent_size=6,
        image_start_id=3,
        image_end_id=4,
        processor="shapes",
    )
    return _random(config)


@pytest.fixture
def vision_bagel(small_bagel) -> Bagel:
    """The same with a vision encoder."""
    vision = VisionConfig(
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        min_size=8,
        patch_size=8,
        max_patches=2,
    )
    return _random(dataclasses.replace(small_bagel.config, vision=vision))


def _random(config: BagelConfig) -> Bagel:
    model = Bagel(config).initialise(0, std=0.15)
    with torch.no_grad():
        model.llm2vae.weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    return model

"""Small models that many tests share."""

import dataclasses
import os

import pytest
import torch
import torch.nn.functional as F

from agents.models.bagel.config import BagelConfig
from agents.models.bagel.model import Bagel
from agents.models.bagel.vision import VisionConfig
from unigrpo_env.processor import register_processor
from unigrpo_env.tasks.shapes.processor import ShapesProcessor

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))


def pytest_collection_modifyitems(items):
    """Tests marked `gpu` are skipped where torch finds no accelerator."""
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs an accelerator"))


@register_processor("seen_shapes")
class SeenShapesProcessor(ShapesProcessor):
    """The shapes world for a model with a vision encoder."""

    pixel_size = (16, 16)

    def view_images(self, images):
        seen = F.interpolate(images, self.pixel_size, mode="bilinear", antialias=True)
        return (seen * 255).round().byte()


@pytest.fixture
def no_curves(monkeypatch):
    """Reports without their curves, which take matplotlib a second."""
    monkeypatch.setattr("agents.reporting.html_report.draw_curves", lambda *given: "")


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
        downsampling=1,
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
        patch_size=8,
        max_patches=2,
    )
    config = dataclasses.replace(small_bagel.config, vision=vision, processor="seen_shapes")
    return _random(config)


def _random(config: BagelConfig) -> Bagel:
    model = Bagel(config).initialise(0, std=0.15)
    with torch.no_grad():
        model.llm2vae.weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    return model

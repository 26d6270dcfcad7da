"""What only an accelerator can show; skipped where there is none."""

import dataclasses
import math

import pytest
import torch

from agents.config.loading import load_config
from agents.models.bagel.model import Bagel
from agents.training.trainer import Trainer

DEVICE = "cuda"


@pytest.mark.gpu
@pytest.mark.parametrize("scenario", ["text_to_image", "edit"])
def test_update_on_gpu(small_bagel, tmp_path, scenario):
    """Model, env and trajectories live on the device, and nothing has moved before the update."""
    settings = [
        f"env={scenario}",
        "env.text_budget=4",
        "env.image_steps=6",
        "env.reward=crispness",
        "trainer.groups=2",
        "trainer.group_size=4",
        f"model.device={DEVICE}",
        f"output.folder={tmp_path}",
    ]
    trainer = Trainer(load_config(settings), small_bagel)
    metrics = trainer.iterate()
    assert metrics["text_log_ratio"] < 1e-3
    assert metrics["image_log_ratio"] < 1e-5
    assert math.isfinite(metrics["image_grad_norm"])
    assert next(trainer.model.parameters()).device.type == DEVICE


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_adapters_of_a_larger_model(small_bagel, tmp_path, dtype):
    """Rollout and update with all that a large model needs: the weights under the adapters stay."""
    config = dataclasses.replace(
        small_bagel.config,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=2,
    )
    settings = [
        "algorithm=lora",
        f"model.dtype={dtype}",
        f"model.device={DEVICE}",
        "model.checkpointing=true",
        "model.max_rows=5",
        "optimizer.ema=0.9",
        "evaluation.ema=true",
        "evaluation.prompts=3",
        "env.text_budget=6",
        "env.image_steps=6",
        "env.reward=crispness",
        "trainer.groups=2",
        "trainer.group_size=4",
        "trainer.micro_batches=4",
        "trainer.iterations=4",
        f"output.folder={tmp_path}",
    ]
    trainer = Trainer(load_config(settings), Bagel(config).initialise(0, std=0.05))
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    metrics = trainer.iterate()
    assert metrics["text_log_ratio"] < 1e-3
    assert metrics["image_log_ratio"] < 1e-5
    assert metrics["loss_velocity"] < 1e-6
    assert math.isfinite(metrics["text_grad_norm"])
    moved = set()
    for name, value in trainer.model.state_dict().items():
        assert value.device.type == DEVICE
        if not torch.equal(value, before[name]):
            moved.add(name)
    assert moved
    assert moved <= set(trainer.optimization.names), "the adapters alone have moved"
    assert trainer.evaluate().reward.isfinite().all()
    trainer.save()
    given = Bagel(config).initialise(0, std=0.05)
    resumed = Trainer.resume(tmp_path, model=given)
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, trainer.model.state_dict()[name]), name

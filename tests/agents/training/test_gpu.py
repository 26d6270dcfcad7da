"""What only an accelerator can show; skipped where there is none."""

import math

import pytest

from agents.config.loading import load_config
from agents.training.trainer import Trainer


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
        "model.device=cuda",
        f"output.folder={tmp_path}",
    ]
    trainer = Trainer(load_config(settings), small_bagel)
    metrics = trainer.iterate()
    assert metrics["text_log_ratio"] < 1e-3
    assert metrics["image_log_ratio"] < 1e-5
    assert math.isfinite(metrics["image_grad_norm"])
    assert next(trainer.model.parameters()).device.type == "cuda"

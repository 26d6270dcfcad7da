"""The configs of `algorithm=` for models of a language model and a pipeline, on tiny ones."""

import pytest

from agents.config.loading import load_config
from agents.training.trainer import Trainer

FAMILIES = {
    "sd35_lora": "sd3",
    "klein_lora": "klein",
    "qwen_image_lora": "qwen",
    "sana_lora": "sana",
}
"""The family of `tiny` that each config is for."""
FEWER = [
    "trainer.groups=2",
    "trainer.group_size=2",
    "trainer.minibatches=1",
    "trainer.micro_batches=2",
    "env.text_budget=8",
    "env.reward=brevity",
    # bfloat16 takes four times as long on a CPU.
    "model.dtype=float32",
]


@pytest.mark.parametrize("algorithm", FAMILIES)
def test_settings_fit_each_other(algorithm):
    config = load_config([f"algorithm={algorithm}"])
    trainer, settings = config.trainer, config.algorithm
    assert config.model.kind == "thinker_painter"
    episodes = trainer.groups * trainer.group_size // trainer.minibatches // trainer.micro_batches
    # Where a part has more rows, each of its velocities is computed twice in the backward pass.
    assert config.model.max_rows >= episodes * settings.window_size
    assert settings.window_size <= settings.window_high < config.env.image_steps


@pytest.mark.slow
@pytest.mark.parametrize(("algorithm", "family"), FAMILIES.items())
def test_both_parts_learn(make_model, tmp_path, algorithm, family):
    """With all that the config says but for fewer and shorter episodes."""
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    words = [f"algorithm={algorithm}", f"env.prompts={tmp_path / 'prompts.txt'}", *FEWER]
    trainer = Trainer(load_config(words), make_model(family))
    metrics = trainer.iterate()
    assert trainer.model.adapted_layers.keys() == {"text", "image"}
    assert all(trainer.model.adapted_layers.values())
    assert metrics["text_log_ratio"] < 1e-3
    assert metrics["image_log_ratio"] < 1e-6
    assert metrics["text_grad_norm"] > 0
    assert metrics["image_grad_norm"] > 0

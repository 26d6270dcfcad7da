"""Every scenario, and the two configs for large models, on a tiny folder in the released layout."""

from pathlib import Path

import pytest
import torch

from agents.config.loading import load_config
from agents.models.registry import load_model
from agents.training.trainer import Trainer
from unigrpo_env.rendering import enlarge

FOLDER = Path(__file__).parents[2] / "data" / "bagel_release"
SMALL = ["trainer.groups=2", "trainer.group_size=2", "trainer.micro_batches=1", "env.image_steps=6"]
REWARD = ["env.reward=brevity", "trainer.dynamic_sampling=keep"]

pytestmark = pytest.mark.slow


@pytest.fixture
def prompts(tmp_path):
    """Files of prompts: words alone, with a source, and with a turn of the user's."""
    enlarge(torch.rand(3, 64, 96), 96).save(tmp_path / "source.png")
    line = '{"prompt": "a red circle", "sources": ["source.png"]}'
    other = line.replace("circle", "square")
    (tmp_path / "edits.jsonl").write_text(f"{line}\n{other}\n")
    (tmp_path / "words.txt").write_text("a red circle\na blue square\n")
    line = '{"prompt": "a red circle", "turns": ["make it blue"]}'
    (tmp_path / "turns.jsonl").write_text(line)
    return tmp_path


def trainer_of(prompts, *words):
    files = {"env=edit": "edits.jsonl", "env=dialogue": "turns.jsonl"}
    file = next((files[word] for word in words if word in files), "words.txt")
    return Trainer(
        load_config([f"model.name={FOLDER}", f"env.prompts={prompts / file}", *REWARD, *words])
    )


@pytest.mark.parametrize("name", ["text_to_image", "edit", "reflect", "story", "dialogue"])
def test_every_scenario_learns(prompts, name):
    size = ["model.height=64", "model.width=96", "env.text_budget=6", "model.lora.image.rank=2"]
    more = ["model.lora.text.rank=2"]
    trainer = trainer_of(prompts, f"env={name}", *SMALL, *size, *more)
    metrics = trainer.iterate()
    assert metrics["text_log_ratio"] < 1e-3
    assert metrics["image_log_ratio"] < 1e-6
    assert metrics["text_grad_norm"] > 0


@pytest.mark.parametrize("name", ["paper", "bagel_lora"])
def test_a_config_for_large_models_needs_nothing_else(prompts, name):
    """But the folder, prompts and a reward; here fewer and shorter episodes, and smaller images."""
    less = ["env.text_budget=8", "model.height=64", "model.width=64"]
    trainer = trainer_of(prompts, f"algorithm={name}", *SMALL, *less)
    assert trainer.variant.rules.prompt_budget == 1072
    metrics = trainer.iterate()
    assert metrics["text_log_ratio"] < 1e-3
    assert metrics["text_grad_norm"] > 0


def test_the_config_of_the_paper_builds_as_it_is(prompts):
    trainer = trainer_of(prompts, "algorithm=paper")
    rules = trainer.variant.rules
    assert rules.text_budget == 1024
    assert rules.image_steps == 25
    assert trainer.env.num_envs == 32 * 24
    assert trainer.model.latent_shape == (256, 64), "the largest image of this folder"


def test_a_run_is_merged_into_the_released_layout(prompts, tmp_path, monkeypatch):
    from agents.cli import main

    monkeypatch.chdir(tmp_path)
    words = [f"model.name={FOLDER}", f"env.prompts={prompts / 'words.txt'}", *REWARD, *SMALL]
    words += ["model.height=64", "model.width=64", "env.text_budget=6", "model.lora.image.rank=2"]
    words += ["trainer.iterations=1", "evaluation.prompts=1", "output.folder=run"]
    words += ["output.tensorboard=false", "model.dtype=float32"]
    assert main(["train", *words]) == 0
    assert main(["merge", "run", "merged", "--dtype", "float32"]) == 0
    options = {"height": 64, "width": 64, "dtype": torch.float32}
    adapted = load_model("run/model", **options)
    merged = load_model("merged", **options)
    assert (Path("merged") / "ema.safetensors").is_file()
    ids = torch.tensor([[513, 7, 9]])
    x = torch.randn(1, 16, 64)
    with torch.no_grad():
        _, context = adapted.append_text(adapted.empty_context(1), ids)
        expected = adapted.predict_velocity(context, x, torch.tensor([0.5]))
        _, context = merged.append_text(merged.empty_context(1), ids)
        found = merged.predict_velocity(context, x, torch.tensor([0.5]))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)

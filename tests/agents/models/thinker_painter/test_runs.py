"""Training from the settings and the command line: stop and go on, evaluate, sample, merge."""

import json
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
import transformers
from folders import save_parts
from PIL import Image

from agents.cli import main
from agents.config.loading import load_config
from agents.models.registry import load_model
from agents.reporting.metrics import TIMING_METRICS
from agents.training.evaluator import Evaluator
from agents.training.trainer import Trainer
from rewards import REWARDS

pytestmark = pytest.mark.slow

LORA = ["model.lora.text.rank=2", "model.lora.image.rank=3", "model.lora.image.alpha=4"]
EMA = ["optimizer.ema=0.9"]
SMALL = [
    "trainer.groups=2",
    "trainer.group_size=2",
    "trainer.minibatches=2",
    "trainer.micro_batches=1",
    "env.text_budget=4",
    "env.image_steps=6",
    "env.reward=spread",
    "evaluation.every=0",
    "evaluation.prompts=2",
    "output.tensorboard=false",
    "output.samples_every=0",
]


def spread(episodes):
    return episodes.images.std((1, 2, 3))


@pytest.fixture(autouse=True)
def reward():
    kept = dict(REWARDS._entries)
    REWARDS.add("spread", spread)
    yield
    REWARDS._entries = kept


@pytest.fixture
def settings_of(parts, tmp_path):
    """Settings of a run in `tmp_path` with the parts of a family."""
    (tmp_path / "p.txt").write_text("two red circles\na blue square\na green cross\nred square\n")

    def find(name, *words):
        options = parts(name)
        own = [f"model.{key}={options[key]}" for key in options if key != "call"]
        place = [f"env.prompts={tmp_path}/p.txt", f"output.folder={tmp_path}/run"]
        return ["model.kind=thinker_painter", *own, *place, *SMALL, *words]

    return find


def untimed(metrics):
    return {name: value for name, value in metrics.items() if name not in TIMING_METRICS}


def states(trainer):
    """Weights, averages and masters."""
    optimization = trainer.optimization
    averages = optimization.average.averages if optimization.average else {}
    return {**trainer.model.state_dict(), **averages, **optimization.masters}


RUNS = [
    ("sd3", [*LORA, *EMA]),
    ("qwen", [*LORA, "model.dtype=bfloat16", "model.reads_base=true"]),
    ("zimage", EMA),
]


@pytest.mark.parametrize(("name", "words"), RUNS)
def test_resume_is_bit_exact(settings_of, tmp_path, name, words):
    whole = Trainer(load_config(settings_of(name, *words)))
    began = {key: value.clone() for key, value in whole.model.state_dict().items()}
    metrics = whole.iterate()
    assert metrics["text_grad_norm"] > 0
    assert metrics["image_grad_norm"] > 0
    place = whole.save()
    if LORA[0] in words:
        files = sorted(str(path.relative_to(place)) for path in place.rglob("*") if path.is_file())
        assert [file for file in files if file.startswith("model/")] == [
            "model/config.json",
            "model/painter/pytorch_lora_weights.safetensors",
            "model/thinker/adapter_config.json",
            "model/thinker/adapter_model.safetensors",
        ], "adapters alone"
        assert not (place / "reference.safetensors").exists()
    resumed = Trainer.resume(tmp_path / "run")
    # The folder of its weights matters only to adapters that are added later.
    assert replace(resumed.model.config, base="") == whole.model.config
    expected = untimed(whole.iterate())
    assert untimed(resumed.iterate()) == pytest.approx(expected, abs=0, rel=0, nan_ok=True)
    found = states(resumed)
    assert all(torch.equal(found[key], value) for key, value in states(whole).items())
    assert any(not torch.equal(found[key], value) for key, value in began.items())
    # What was saved is evaluated without the settings of its parts.
    model = load_model(str(whole.save() / "model"), dtype=getattr(torch, whole.config.model.dtype))
    expected = whole.model.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())


def test_averages_are_evaluated(settings_of):
    words = ["evaluation.ema=true", "optimizer.ema=0.5", "optimizer.text_lr=0.1"]
    trainer = Trainer(load_config(settings_of("sd3", *LORA, *words)))
    trainer.iterate()
    with trainer.averaged():
        weights = dict(trainer.model.named_parameters())
        for key, value in trainer.optimization.average.averages.items():
            assert torch.equal(weights[key], value), key
    assert trainer.evaluate().accuracy > 0


def test_another_base_is_refused_when_a_run_goes_on(settings_of, tmp_path):
    trainer = Trainer(load_config(settings_of("sd3", *LORA)))
    trainer.save()
    other = save_parts(tmp_path / "other", "sd3")

    def change(config):
        config.model.painter = other["painter"]
        return config

    with pytest.raises(
        ValueError, match=r"expected the painter .*, to which the weights .* belong"
    ):
        Trainer.resume(tmp_path / "run", change)


def test_run_is_sampled_merged_and_evaluated(settings_of, tmp_path, monkeypatch, capsys, no_curves):
    monkeypatch.chdir(tmp_path)
    words = settings_of("sd3", *LORA, "trainer.iterations=1", "optimizer.text_lr=0.05")
    assert main(["train", *words]) == 0, capsys.readouterr().err
    assert (tmp_path / "run" / "report.html").is_file()
    report = (tmp_path / "run" / "report.html").read_text()
    painter = json.loads((tmp_path / "run" / "model" / "config.json").read_text())["painter"]
    assert f"thinker_painter ({painter.replace('pipeline', 'lm')} + {painter})" in report
    assert main(["merge", "run", "merged"]) == 0, capsys.readouterr().err
    thinker = transformers.AutoModelForCausalLM.from_pretrained("merged/thinker")
    transformer = diffusers.SD3Transformer2DModel.from_pretrained("merged/painter/transformer")
    merged = load_model("merged")
    for found, own in ((thinker, merged.thinker), (transformer, merged.transformer)):
        expected = own.state_dict()
        assert all(torch.equal(value, expected[key]) for key, value in found.state_dict().items())
    ids, x = torch.tensor([[30, 41]]), torch.randn(1, *merged.latent_shape)
    with torch.no_grad():
        results = []
        for model in (load_model("run/model"), merged):
            logits, context = model.append_text(model.empty_context(1), ids)
            results.append((logits, model.predict_velocity(context, x, torch.tensor([0.5]))))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    short = ["--steps", "4", "--set", "text_budget=4", "--out", "out.png"]
    for folder in ("run/model", "merged"):
        assert main(["sample", "a red cat", "--model", folder, *short]) == 0
        assert Image.open("out.png").size[0] > 0
    given = ["model.name=merged", *settings_of("sd3")[-len(SMALL) - 2 :]]
    found = Evaluator(load_config(given)).evaluate()
    assert found.accuracy > 0


def test_sample_of_a_fresh_model(parts, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = parts("sd3")
    size = ["--height", "16", "--width", "24"]
    words = ["--thinker", options["thinker"], "--painter", options["painter"], *size]
    short = ["--steps", "4", "--set", "text_budget=4", "--out", "out.png"]
    assert main(["sample", "a red cat", *words, *short]) == 0, capsys.readouterr().err
    image = Image.open("out.png")
    assert image.height * 24 == image.width * 16
    assert main(["sample", "a red cat", "--thinker", options["thinker"], *short]) != 0
    assert "expected a painter, got none" in capsys.readouterr().err
    assert Path("out.png").is_file()

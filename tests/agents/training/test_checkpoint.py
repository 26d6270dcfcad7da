"""Stop and go on: bit for bit, and what is damaged or foreign is refused by name."""

import json
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from agents.config.loading import load_config
from agents.models.registry import load_model
from agents.models.toy import ToyModel
from agents.reporting.metrics import TIMING_METRICS
from agents.training.checkpoint import (
    latest_checkpoint,
    load_checkpoint,
    read_state,
    save_checkpoint,
)
from agents.training.optimization import Optimization
from agents.training.run import run
from agents.training.trainer import Trainer

pytestmark = pytest.mark.slow

RUNS = [
    ("small_bagel", "reflect", ["model.dtype=float32"]),
    ("small_bagel", "dialogue", ["model.dtype=float32", "optimizer.ema=0.9"]),
    ("vision_bagel", "edit", ["model.dtype=float32"]),
    ("vision_bagel", "edit", ["model.dtype=bfloat16", "optimizer.ema=0.9"]),
]
RELEASE = Path(__file__).parents[2] / "data" / "bagel_release"
LORA = ["model.lora.text.rank=2", "model.lora.image.rank=3", "optimizer.ema=0.9"]


def untimed(metrics):
    return {name: value for name, value in metrics.items() if name not in TIMING_METRICS}


def kept_in_float32(trainer):
    """What a run has beside the weights of its model: masters and averages."""
    return {**trainer.optimization.masters, **trainer.optimization.average.averages}


@pytest.mark.slow
@pytest.mark.parametrize(("model", "name", "choice"), RUNS)
def test_resume_is_bit_exact(request, small_trainer, weights_of, tmp_path, model, name, choice):
    start = request.getfixturevalue(model).save_pretrained(tmp_path / "start")
    settings = [f"env={name}", "trainer.minibatches=2", *choice]
    rewards = ["env.reward=crispness", "env.thought_reward=brevity"]
    whole = small_trainer(load_model(str(start)), *settings, *rewards)
    first = whole.iterate()
    assert first["loss_velocity"] < 1e-6, "the policy begins as the reference"
    is_float32 = "model.dtype=float32" in choice
    assert first["image_log_ratio"] < (1e-6 if is_float32 else 1e-3)
    whole.save()
    resumed = Trainer.resume(tmp_path)
    expected = untimed(whole.iterate())
    assert untimed(resumed.iterate()) == pytest.approx(expected, abs=0, rel=0, nan_ok=True)
    weights = weights_of(whole)
    for key, value in weights_of(resumed).items():
        assert torch.equal(value, weights[key]), key
    began = load_model(str(start)).state_dict()
    assert any(not torch.equal(value, weights[key]) for key, value in began.items())
    for key, value in resumed.reference.state_dict().items():
        assert torch.equal(value.float(), began[key].to(value.dtype).float()), key
    if "optimizer.ema=0.9" in choice:
        beside = kept_in_float32(whole)
        for key, value in kept_in_float32(resumed).items():
            assert torch.equal(value, beside[key]), key
        assert bool(resumed.optimization.masters) != is_float32


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_resume_with_adapters_is_bit_exact(small_bagel, small_trainer, weights_of, tmp_path, dtype):
    start = small_bagel.save_pretrained(tmp_path / "start")
    settings = [f"model.name={start}", f"model.dtype={dtype}", "trainer.minibatches=2", *LORA]
    whole = small_trainer(None, *settings, "env.reward=crispness")
    began = weights_of(whole)
    whole.iterate()
    place = whole.save()
    assert not (place / "reference.safetensors").exists(), "the model without adapters is that"
    assert not (place / "masters.safetensors").exists(), "adapters are float32 themselves"
    sizes = [path.stat().st_size for path in (place / "model").iterdir()]
    assert sum(sizes) < (start / "model.safetensors").stat().st_size / 2, "adapters alone"
    resumed = Trainer.resume(tmp_path)
    expected = untimed(whole.iterate())
    assert untimed(resumed.iterate()) == pytest.approx(expected, abs=0, rel=0, nan_ok=True)
    weights = weights_of(whole)
    averages = whole.optimization.average.averages
    for key, value in weights_of(resumed).items():
        assert torch.equal(value, weights[key]), key
        assert torch.equal(value, began[key]) == (key not in averages), key
    for key, value in resumed.optimization.average.averages.items():
        assert torch.equal(value, averages[key]), key


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["paper", "bagel_lora"])
def test_resume_of_a_released_model_is_bit_exact(rewards, weights_of, tmp_path, algorithm):
    """All weights in the layout of the release, or adapters alone; only sizes are changed."""
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\na cross\ntwo dots\n")
    settings = [
        f"algorithm={algorithm}",
        f"model.name={RELEASE}",
        f"env.prompts={tmp_path}/prompts.txt",
        "env.reward=mean_red",
        "model.height=64",
        "model.width=96",
        "trainer.groups=2",
        "trainer.group_size=2",
        "trainer.minibatches=1",
        "trainer.micro_batches=2",
        "env.text_budget=8",
        "env.image_steps=6",
        f"output.folder={tmp_path}",
    ]
    whole = Trainer(load_config(settings))
    assert whole.variant.rules.latent_shape == (4 * 6, 64)
    whole.iterate()
    names = {path.name for path in (whole.save() / "model").iterdir()}
    assert ("ema.safetensors" in names) == (algorithm == "paper")
    resumed = Trainer.resume(tmp_path)
    expected = untimed(whole.iterate())
    assert untimed(resumed.iterate()) == pytest.approx(expected, abs=0, rel=0, nan_ok=True)
    assert expected["text_grad_norm"] > 0
    assert expected["image_grad_norm"] > 0
    weights = weights_of(whole)
    for key, value in weights_of(resumed).items():
        assert torch.equal(value, weights[key]), key
    for key, value in whole.optimization.masters.items():
        assert torch.equal(resumed.optimization.masters[key], value), key


def test_adapters_go_on_with_their_own_base(small_bagel, small_trainer, tmp_path):
    start = small_bagel.save_pretrained(tmp_path / "start")
    other = small_bagel.save_pretrained(tmp_path / "other")
    trainer = small_trainer(None, f"model.name={start}", *LORA)
    trainer.iterate()
    trainer.save()

    def with_base(name):
        def change(config):
            config.model.name = str(name)
            return config

        return change

    with pytest.raises(ValueError, match=f"expected the model '{start}'.*{other}"):
        Trainer.resume(tmp_path, with_base(other))
    shutil.rmtree(start)
    moved = Trainer.resume(tmp_path, with_base(other))
    assert moved.iteration == 1, "a base that was moved is named anew"


def test_adapters_of_a_model_that_was_given(small_bagel, small_trainer, weights_of, tmp_path):
    start = small_bagel.save_pretrained(tmp_path / "start")
    trainer = small_trainer(small_bagel, *LORA)
    trainer.iterate()
    trainer.save()
    with pytest.raises(ValueError, match="give the trainer's own as `model`"):
        Trainer.resume(tmp_path)
    resumed = Trainer.resume(tmp_path, model=load_model(str(start)))
    weights = weights_of(trainer)
    for key, value in weights_of(resumed).items():
        assert torch.equal(value, weights[key]), key


def test_adapters_of_other_settings(small_bagel, small_trainer, tmp_path):
    start = small_bagel.save_pretrained(tmp_path / "start")
    trainer = small_trainer(None, f"model.name={start}", *LORA)
    trainer.iterate()
    trainer.save()

    def change(config):
        config.model.lora.text.rank = 4
        return config

    with pytest.raises(ValueError, match="fits no parameter of this model"):
        Trainer.resume(tmp_path, change)


def test_moments_are_kept_by_name(small_bagel, small_trainer):
    trainer = small_trainer(small_bagel)
    trainer.iterate()
    moments = load_file(trainer.save() / "optimizer.safetensors")
    weights = dict(small_bagel.named_parameters())
    name = "language_model.model.embed_tokens.weight"
    assert moments[f"step.{name}"] == 1
    assert moments[f"exp_avg.{name}"].shape == weights[name].shape
    assert moments[f"exp_avg_sq.{name}"].any()
    for key in moments:
        moment, _, name = key.partition(".")
        assert moment in ("step", "exp_avg", "exp_avg_sq")
        assert name in weights


class ReorderedModel(ToyModel):
    """Lists three weights of its text expert; a flag turns their order round."""

    reverse = False

    def __init__(self, *arguments):
        super().__init__(*arguments)
        for name in ("first", "second"):
            setattr(self, name, torch.nn.Parameter(torch.zeros(5, 5, 5)))

    def parameters_by_expert(self):
        text = [self.words, self.first, self.second]
        if self.reverse:
            text.reverse()
        return {"text": text, "image": [self.images]}


def test_parameters_may_change_their_order(toy_trainer, tmp_path):
    """Moments of one shape find their parameter by its name, not by its place."""
    config = toy_trainer().config

    def make(reverse):
        model = ReorderedModel()
        model.reverse = reverse
        return model, Optimization(model, config.optimizer, config.algorithm, 10)

    model, optimization = make(reverse=False)
    for number, weight in enumerate(model.parameters(), 1):
        weight.grad = torch.full_like(weight, number / 10)
    optimization.step(0)
    state = {"iteration": 1, "config": {}}
    place = save_checkpoint(tmp_path, model, optimization, None, state, 1)
    other, reordered = make(reverse=True)
    assert reordered.names != optimization.names
    load_checkpoint(place, other, reordered, None)
    for name, weight in model.named_parameters():
        twin = dict(other.named_parameters())[name]
        assert torch.equal(twin, weight)
        moments = optimization.optimizer.state[weight]
        for moment, value in reordered.optimizer.state[twin].items():
            assert torch.equal(value, moments[moment]), (name, moment)
    for one, by in ((model, optimization), (other, reordered)):
        for weight in one.parameters():
            weight.grad = torch.full_like(weight, 0.3)
        by.step(1)
    for name, weight in model.named_parameters():
        assert torch.equal(dict(other.named_parameters())[name], weight), name


@pytest.fixture
def saved(toy_trainer):
    """A trainer after one iteration, and its checkpoint, which has files of every kind."""
    trainer = toy_trainer(
        "trainer.iterations=3",
        "model.dtype=bfloat16",
        "optimizer.ema=0.9",
        "algorithm.old_log_prob=rollout",
    )
    trainer.iterate()
    return trainer, trainer.save()


def test_what_a_run_lacks_leaves_no_file(toy_trainer):
    trainer = toy_trainer("algorithm.velocity_weight=0.0")
    trainer.iterate()
    names = {path.name for path in trainer.save().iterdir()}
    assert names == {"model", "optimizer.safetensors", "random.safetensors", "state.json"}


@pytest.mark.parametrize(
    "name",
    [
        "state.json",
        "optimizer.safetensors",
        "reference.safetensors",
        "masters.safetensors",
        "average.safetensors",
        "random.safetensors",
        "model/model.safetensors",
    ],
)
@pytest.mark.parametrize("how", ["truncated", "foreign", "missing"])
def test_damaged_files(saved, tmp_path, name, how):
    path = saved[1] / name
    if how == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif how == "foreign":
        path.write_text("{}")
    else:
        path.unlink()
    with pytest.raises(ValueError, match=r"state of a run|safetensors file|run with checkpoints"):
        Trainer.resume(tmp_path)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("optimizer.safetensors", "step.unknown", "step.unknown .* fits no parameter"),
        ("optimizer.safetensors", "exp_avg.words", r"exp_avg.words \[2\] fits no parameter"),
        ("optimizer.safetensors", "momentum.words", "momentum.words .* fits no parameter"),
        ("reference.safetensors", "words", r"words: expected \(5, 5, 5\), got \(2,\)"),
        ("masters.safetensors", "words", r"words: expected \(5, 5, 5\), got \(2,\)"),
        ("average.safetensors", "unknown", "unexpected unknown"),
        ("model/model.safetensors", "unknown", "unexpected unknown"),
    ],
)
def test_tensors_of_another_run(saved, tmp_path, name, tensor, message):
    path = saved[1] / name
    save_file({**load_file(path), tensor: torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=message):
        Trainer.resume(tmp_path)


def test_moments_are_whole_or_refused(saved, tmp_path):
    path = saved[1] / "optimizer.safetensors"
    moments = load_file(path)
    del moments["exp_avg_sq.words"]
    save_file(moments, path)
    with pytest.raises(ValueError, match=r"exp_avg_sq\.words"):
        Trainer.resume(tmp_path)


def test_random_state_that_is_missing(saved, tmp_path):
    save_file({"numpy": torch.zeros(2)}, saved[1] / "random.safetensors")
    with pytest.raises(ValueError, match="holds no random state"):
        Trainer.resume(tmp_path)


def test_failed_load_changes_nothing(saved, toy_trainer, weights_of):
    _, place = saved
    (place / "random.safetensors").unlink()
    other = toy_trainer()
    before = weights_of(other)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="safetensors file"):
        load_checkpoint(place, other.model, other.optimization, other.reference)
    for name, value in weights_of(other).items():
        assert torch.equal(value, before[name]), name
    assert not other.optimization.optimizer.state
    assert torch.equal(torch.get_rng_state(), state)


def test_older_layout_names_the_weights(saved, tmp_path, toy_trainer):
    trainer, place = saved
    state = json.loads((place / "state.json").read_text())
    del state["layout"]
    (place / "state.json").write_text(json.dumps(state))
    weights = place / "model"
    with pytest.raises(ValueError, match=r"of layout 3 at .*, got layout 1") as caught:
        Trainer.resume(tmp_path)
    assert f"model.name={weights}" in str(caught.value)
    other = toy_trainer(f"model.name={weights}")
    for name, value in other.model.state_dict().items():
        assert torch.equal(value, trainer.model.state_dict()[name]), name


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("optimizer.ema", None, "expected no safetensors file at .*average"),
        ("model.dtype", "float32", "expected no safetensors file at .*masters"),
    ],
)
def test_settings_of_the_float32_copies_stay(saved, tmp_path, setting, value, message):
    def change(config):
        section, name = setting.split(".")
        setattr(getattr(config, section), name, value)
        return config

    with pytest.raises(ValueError, match=message):
        Trainer.resume(tmp_path, change)


@pytest.mark.parametrize("text", ["[]", "3", '{"iteration": 1}', "{"])
def test_state_of_another_program(tmp_path, text):
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(ValueError, match="is not the state of a run"):
        read_state(tmp_path)


def test_crash_while_saving(saved, tmp_path, monkeypatch):
    trainer, first = saved
    trainer.iterate()

    def fail(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr("agents.training.checkpoint.write_json", fail)
    with pytest.raises(OSError, match="disk full"):
        trainer.save()
    monkeypatch.undo()
    assert latest_checkpoint(tmp_path) == first
    assert Trainer.resume(tmp_path).iteration == 1
    trainer.save()
    names = sorted(path.name for path in first.parent.iterdir())
    assert names == ["000001", "000002"], "what the crash left is gone"


def test_run_goes_on_from_an_older_checkpoint(saved, tmp_path):
    trainer, first = saved
    trainer.train()
    trainer.save()
    again = Trainer.resume(first)
    assert again.iteration == 1
    again.iterate()
    assert again.save().name == "000002"
    assert latest_checkpoint(tmp_path).name == "000002", "the other branch's last is gone"


def test_checkpoint_is_replaced_as_a_whole(saved, tmp_path):
    trainer, first = saved
    (first / "foreign").write_text("")
    assert trainer.save() == first
    assert not (first / "foreign").exists()
    assert [path.name for path in first.parent.iterdir()] == ["000001"]


def test_latest_checkpoint(saved, tmp_path):
    _, first = saved
    for folder in (tmp_path, first.parent, first):
        assert latest_checkpoint(folder) == first
    shutil.rmtree(first)
    with pytest.raises(ValueError, match="expected a run with checkpoints at"):
        latest_checkpoint(tmp_path)


def test_random_states_are_put_back(saved, tmp_path):
    def draw():
        return random.random(), np.random.rand(), float(torch.rand(()))

    trainer, _ = saved
    trainer.save()
    expected = draw()
    random.seed(99)
    np.random.seed(99)
    torch.manual_seed(99)
    assert draw() != expected
    Trainer.resume(tmp_path)
    assert draw() == expected


def test_resume_may_change_settings(saved, tmp_path):
    def longer(config):
        config.trainer.iterations = 7
        config.optimizer.text_lr = 0.5
        return config

    resumed = Trainer.resume(tmp_path, longer)
    assert resumed.config.trainer.iterations == 7
    resumed.iterate()
    group = resumed.optimization.optimizer.param_groups[0]
    assert group["lr"] == 0.5 * resumed.optimization.schedule(1)


def test_moved_run_goes_on_where_it_is(saved, tmp_path):
    folder = tmp_path / "moved"
    folder.mkdir()
    shutil.move(str(tmp_path / "checkpoints"), folder)
    assert Trainer.resume(folder).config.output.folder == str(folder)


@pytest.mark.slow
@pytest.mark.usefixtures("no_curves")
def test_report_of_a_resumed_run_is_the_same(small_bagel, small_trainer, tmp_path):
    """It shows all images of the episodes before training too, which lie before the stop."""
    start = small_bagel.save_pretrained(tmp_path / "start")
    reports = []
    for name in ("whole", "stopped"):
        folder = tmp_path / name
        overrides = ["env=dialogue", f"output.folder={folder}", "output.checkpoint_every=1"]
        iterations = {"whole": 2, "stopped": 1}[name]
        trainer = small_trainer(
            load_model(str(start)), *overrides, f"trainer.iterations={iterations}"
        )
        run(trainer, Console(quiet=True))
        if name == "stopped":
            run(Trainer.resume(folder, two_iterations), Console(quiet=True))
        reports.append(re.findall('data:image/png[^"]*', (folder / "report.html").read_text()))
    assert reports[0] == reports[1]
    assert len(reports[0]) == 2 * 4 * 2, "two images of four episodes, before and after"


def two_iterations(config):
    config.trainer.iterations = 2
    return config

"""What `unigrpo train` does around the trainer: files, resuming, stopping."""

import io
import json
import math
import shutil
import signal
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from rich.console import Console

from agents.config.loading import load_config
from agents.models.registry import load_model
from agents.reporting.loggers import metric_values, read_metrics
from agents.reporting.metrics import METRICS, TIMING_METRICS
from agents.training.checkpoint import checkpoints
from agents.training.run import StopSignals, run
from agents.training.trainer import Trainer
from rewards import REWARDS

pytestmark = pytest.mark.slow

TOY = [
    "env=toy",
    "model=toy",
    "env.text_budget=2",
    "trainer.minibatches=1",
    "evaluation.prompts=16",
    "output.tensorboard=false",
    "output.samples_every=0",
]
SMALL = [
    "trainer.groups=2",
    "trainer.group_size=4",
    "env.text_budget=4",
    "env.image_steps=6",
    "env.reward=mean_red",
    "evaluation.prompts=2",
    "output.tensorboard=false",
]


def toy_trainer(folder, *overrides):
    return Trainer(load_config([*TOY, f"output.folder={folder}", *overrides]))


def quiet_run(trainer):
    return run(trainer, Console(quiet=True))


def weights_of(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def untimed_metrics(folder):
    """The metrics that the seed determines; NaN as None, which is equal to itself."""
    rows = []
    for row in read_metrics(folder):
        known = {name: value for name, value in row.items() if name not in TIMING_METRICS}
        rows.append({n: None if math.isnan(value) else value for n, value in known.items()})
    return rows


def signal_in_iteration(trainer, number, *signals):
    """Send signals to this process while the given iteration (from 1) is under way."""
    iterate = trainer.iterate

    def iterate_and_signal():
        if trainer.iteration + 1 == number:
            for sent in signals:
                signal.raise_signal(sent)
        return iterate()

    trainer.iterate = iterate_and_signal


@pytest.fixture(autouse=True)
def only_one_with_curves(request):
    """One test looks at them."""
    if request.function is not test_report_shows_both_ends_and_the_settings:
        request.getfixturevalue("no_curves")


@pytest.fixture(autouse=True)
def mean_red():
    """A reward for these tests alone."""
    kept = dict(REWARDS._entries)
    REWARDS.add("mean_red", lambda episodes: episodes.images[:, 0].mean((1, 2)))
    yield
    REWARDS._entries = kept


class Stop(Exception):
    """Stands for a crash."""


def crash_after(trainer, iteration):
    """Raise `Stop` when an iteration has been logged."""
    train = trainer.train

    def train_and_crash(after_iteration):
        def after(metrics):
            after_iteration(metrics)
            if trainer.iteration == iteration:
                raise Stop

        train(after)

    trainer.train = train_and_crash


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["toy", "bagel"])
def test_resumed_run_is_bit_exact(small_bagel, tmp_path, kind):
    overrides = ["trainer.iterations=6", "output.checkpoint_every=3"]
    overrides += ["algorithm.velocity_weight=0.01", "trainer.minibatches=2"]
    small_bagel.save_pretrained(tmp_path / "start")

    def make(folder):
        if kind == "toy":
            return toy_trainer(folder, *overrides)
        model = load_model(str(tmp_path / "start"))
        return Trainer(load_config([*SMALL, *overrides, f"output.folder={folder}"]), model)

    whole = make(tmp_path / "whole")
    quiet_run(whole)
    stopped = make(tmp_path / "stopped")
    reference = {name: value.clone() for name, value in stopped.reference.state_dict().items()}
    crash_after(stopped, 5)
    with pytest.raises(Stop):
        quiet_run(stopped)
    assert len(read_metrics(tmp_path / "stopped")) == 5
    with (tmp_path / "stopped" / "metrics.csv").open("a") as file:
        file.write("6,0.5")  # what a kill in the middle of a line leaves
    torch.manual_seed(99)

    resumed = Trainer.resume(tmp_path / "stopped")
    assert resumed.iteration == 3
    for name, value in resumed.reference.state_dict().items():
        assert torch.equal(value, reference[name]), name
    summary = quiet_run(resumed)
    expected = weights_of(whole)
    for name, value in weights_of(resumed).items():
        assert torch.equal(value, expected[name]), name
    assert untimed_metrics(tmp_path / "stopped") == untimed_metrics(tmp_path / "whole")
    # The time is that of both parts.
    seconds = metric_values(read_metrics(tmp_path / "stopped"), "seconds")
    assert summary["seconds_training"] == round(sum(seconds), 3)


@pytest.mark.slow
def test_resuming_a_finished_run_changes_nothing(tmp_path):
    first = quiet_run(toy_trainer(tmp_path, "trainer.iterations=2"))
    curve = (tmp_path / "accuracy.json").read_text()
    assert quiet_run(Trainer.resume(tmp_path)) == first
    assert (tmp_path / "accuracy.json").read_text() == curve


def test_old_checkpoints_go(tmp_path):
    quiet_run(toy_trainer(tmp_path, "trainer.iterations=4", "output.checkpoint_every=1"))
    names = [path.name for path in checkpoints(tmp_path / "checkpoints")]
    assert names == ["000003", "000004"]


def test_a_run_does_not_overwrite_another(tmp_path):
    quiet_run(toy_trainer(tmp_path, "trainer.iterations=1"))
    with pytest.raises(ValueError, match="holds a run already"):
        quiet_run(toy_trainer(tmp_path, "trainer.iterations=1"))


def test_a_run_does_not_mix_with_old_metrics(tmp_path):
    quiet_run(toy_trainer(tmp_path, "trainer.iterations=1"))
    shutil.rmtree(tmp_path / "checkpoints")
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"without a checkpoint.*another output\.folder"):
        quiet_run(toy_trainer(tmp_path, "trainer.iterations=1"))
    assert sorted(path.name for path in tmp_path.iterdir()) == before, "nothing is deleted"


def test_summary_has_the_figures(tmp_path):
    returned = quiet_run(toy_trainer(tmp_path, "trainer.iterations=3"))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary == json.loads(json.dumps(returned))
    names = ("accuracy_before", "accuracy_after", "greedy_accuracy_before", "seed")
    for name in (*names, "greedy_accuracy_after"):
        assert isinstance(summary[name], int | float)
    assert summary["seconds_training"] > 0
    assert summary["cpu_seconds_training"] > 0
    assert set(read_metrics(tmp_path)[0]) == {"iteration", *METRICS}


def test_report_shows_both_ends_and_the_settings(tmp_path):
    quiet_run(toy_trainer(tmp_path, "trainer.iterations=2"))
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 16
    assert "<svg" in page
    for word in ("UniGRPO", "toy", "trainer.iterations", "Held-out reward"):
        assert word in page
    assert (tmp_path / "before_after.png").is_file()


def test_console_shows_the_figures(tmp_path):
    file = io.StringIO()
    run(toy_trainer(tmp_path, "trainer.iterations=1"), Console(file=file, width=200))
    assert "greedy reward" in file.getvalue()
    assert str(tmp_path / "report.html") in file.getvalue()


def test_settings_are_written_as_json_and_yaml(tmp_path):
    trainer = toy_trainer(tmp_path, "trainer.iterations=1")
    quiet_run(trainer)
    assert json.loads((tmp_path / "config.json").read_text()) == trainer.config.to_dict()
    settings = OmegaConf.to_container(OmegaConf.load(tmp_path / "settings.yaml"))
    settings.pop("defaults", None)
    assert settings == trainer.config.to_dict()


def test_last_weights_can_be_loaded(tmp_path):
    trainer = toy_trainer(tmp_path, "trainer.iterations=2")
    quiet_run(trainer)
    model = load_model(str(tmp_path / "model"))
    for name, value in model.state_dict().items():
        assert torch.equal(value, trainer.model.state_dict()[name]), name


def test_last_weights_may_be_the_averaged_ones(tmp_path):
    trainer = toy_trainer(
        tmp_path, "trainer.iterations=2", "optimizer.ema=0.5", "evaluation.ema=true"
    )
    quiet_run(trainer)
    model = load_model(str(tmp_path / "model"))
    for name, average in trainer.optimization.average.averages.items():
        assert torch.equal(model.state_dict()[name], average), name
        assert not torch.equal(trainer.model.state_dict()[name], average), name


@pytest.mark.slow
def test_tensorboard_has_both_ends_and_samples(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    overrides = ["trainer.iterations=3", "output.samples_every=2", "output.tensorboard=true"]
    summary = quiet_run(toy_trainer(tmp_path, *overrides))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    accuracy = {event.step: event.value for event in events.Scalars("accuracy")}
    assert accuracy[0] == pytest.approx(summary["accuracy_before"])
    assert accuracy[3] == pytest.approx(summary["accuracy_after"])
    assert [event.step for event in events.Images("samples")] == [2]
    assert [event.step for event in events.Images("before_after")] == [3]
    assert (tmp_path / "samples" / "000002.png").is_file()


def test_wandb_has_both_ends_and_samples(tmp_path, monkeypatch):
    logged = []
    library = SimpleNamespace(
        init=lambda **arguments: SimpleNamespace(
            log=lambda values, step: logged.append((step, values)), finish=lambda: None
        ),
        Image=lambda image: ("image", image.size),
    )
    monkeypatch.setitem(sys.modules, "wandb", library)
    overrides = ["trainer.iterations=2", "output.samples_every=2", "output.wandb=project"]
    quiet_run(toy_trainer(tmp_path, *overrides))
    assert [step for step, values in logged if "accuracy" in values] == [0, 2]
    (samples,) = [values["samples"] for step, values in logged if "samples" in values]
    assert samples[0] == "image"
    steps = [step for step, _ in logged]
    assert steps == sorted(steps), "wandb takes no step that lies before the last"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_run_is_saved_and_resumed(tmp_path, number):
    overrides = ["trainer.iterations=4", "output.checkpoint_every=0"]
    whole = toy_trainer(tmp_path / "whole", *overrides)
    quiet_run(whole)
    stopped = toy_trainer(tmp_path / "stopped", *overrides)
    signal_in_iteration(stopped, 2, number)
    handlers = [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)]
    file = io.StringIO()
    with pytest.raises(KeyboardInterrupt):
        run(stopped, Console(file=file, width=300))
    assert [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)] == handlers

    # The iteration came to its end, so the run goes on without a gap.
    assert stopped.iteration == 2
    checkpoint = tmp_path / "stopped" / "checkpoints" / "000002"
    assert str(checkpoint) in file.getvalue()
    assert f"unigrpo train --resume {tmp_path / 'stopped'}" in file.getvalue()
    resumed = Trainer.resume(tmp_path / "stopped")
    quiet_run(resumed)
    expected = weights_of(whole)
    for name, value in weights_of(resumed).items():
        assert torch.equal(value, expected[name]), name
    assert untimed_metrics(tmp_path / "stopped") == untimed_metrics(tmp_path / "whole")


def test_second_signal_stops_at_once(tmp_path):
    """Updates of the iteration may be in the weights already, so they are not saved."""
    trainer = toy_trainer(tmp_path, "trainer.iterations=4", "output.checkpoint_every=1")
    signal_in_iteration(trainer, 3, signal.SIGINT, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        quiet_run(trainer)
    assert trainer.iteration == 2
    assert len(read_metrics(tmp_path)) == 2
    assert [path.name for path in checkpoints(tmp_path / "checkpoints")] == ["000001", "000002"]


@pytest.mark.slow
def test_stop_before_the_first_iteration_saves_nothing(tmp_path):
    trainer = toy_trainer(tmp_path, "trainer.iterations=1")
    evaluate = trainer.evaluate

    def evaluate_and_stop(**arguments):
        signal.raise_signal(signal.SIGINT)
        return evaluate(**arguments)

    trainer.evaluate = evaluate_and_stop
    file = io.StringIO()
    with pytest.raises(KeyboardInterrupt):
        run(trainer, Console(file=file, width=300))
    assert "no whole iteration to save" in file.getvalue()
    assert checkpoints(tmp_path / "checkpoints") == []
    quiet_run(toy_trainer(tmp_path, "trainer.iterations=1"))


@pytest.mark.slow
def test_stop_after_training_keeps_the_checkpoint(tmp_path):
    trainer = toy_trainer(tmp_path, "trainer.iterations=2")
    evaluate = trainer.evaluate

    def evaluate_and_stop(**arguments):
        if trainer.iteration == 2:
            signal.raise_signal(signal.SIGTERM)
        return evaluate(**arguments)

    trainer.evaluate = evaluate_and_stop
    with pytest.raises(KeyboardInterrupt):
        quiet_run(trainer)
    quiet_run(Trainer.resume(tmp_path))
    assert (tmp_path / "summary.json").is_file()


def test_run_in_another_thread_sets_no_handlers(tmp_path):
    found = []
    trainer = toy_trainer(tmp_path, "trainer.iterations=1")
    thread = threading.Thread(target=lambda: found.append(quiet_run(trainer)))
    thread.start()
    thread.join()
    assert found[0]["iterations"] == 1


def test_ignored_signals_stay_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopSignals(Console(quiet=True)):
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_signal_is_delayed_once():
    with StopSignals(Console(quiet=True)) as stops:
        stops.is_delaying = True
        signal.raise_signal(signal.SIGINT)
        assert stops.is_requested
        with pytest.raises(KeyboardInterrupt):
            stops.check()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)

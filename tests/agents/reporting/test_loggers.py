"""The files that a run's numbers go to."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from agents.reporting.loggers import RunLog, metric_values, read_metrics
from agents.reporting.metrics import METRICS, TIMING_METRICS


def metrics(value):
    return dict.fromkeys(METRICS, value)


def open_log(folder, **changes):
    values = {"tensorboard": False, "wandb": None, "settings": {"trainer": {"seed": 0}}}
    return RunLog(folder, **(values | changes))


class FakeWandb:
    """Keeps what it is given."""

    def __init__(self):
        self.started = []
        self.logged = []
        self.is_finished = False

    def init(self, **arguments):
        self.started.append(arguments)
        return SimpleNamespace(log=self.log, finish=self.finish)

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.is_finished = True

    class Image:
        def __init__(self, image):
            self.image = image


@pytest.fixture
def wandb(monkeypatch):
    library = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", library)
    return library


def test_metrics_come_back_from_the_csv(tmp_path):
    log = open_log(tmp_path)
    log.write(1, metrics(0.25))
    log.write(2, metrics(0.5))
    rows = read_metrics(tmp_path)
    assert rows[0] == {"iteration": 1.0, **metrics(0.25)}
    assert metric_values(rows, "reward") == [0.25, 0.5]


def test_no_file_is_no_metrics(tmp_path):
    assert read_metrics(tmp_path) == []


def test_half_a_line_is_left_out(tmp_path):
    log = open_log(tmp_path)
    log.write(1, metrics(0.25))
    with log.path.open("a") as file:
        file.write("2,0.5")
    assert len(read_metrics(tmp_path)) == 1


def test_resumed_log_drops_rows_after_the_checkpoint(tmp_path):
    log = open_log(tmp_path)
    for iteration in (1, 2, 3):
        log.write(iteration, metrics(0.25))
    open_log(tmp_path, first_iteration=2).write(3, metrics(0.75))
    assert metric_values(read_metrics(tmp_path), "iteration") == [1, 2, 3]
    assert metric_values(read_metrics(tmp_path), "reward") == [0.25, 0.25, 0.75]


def test_new_log_starts_from_an_empty_file(tmp_path):
    open_log(tmp_path).write(1, metrics(0.25))
    open_log(tmp_path)
    assert read_metrics(tmp_path) == []


def test_timing_metrics_are_metrics():
    assert set(TIMING_METRICS) < set(METRICS)


@pytest.mark.slow
def test_tensorboard_gets_scalars_and_images(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = open_log(tmp_path, tensorboard=True)
    log.scalars(0, {"accuracy": 0.25})
    log.write(1, metrics(0.5))
    log.image(1, "samples", Image.new("RGB", (8, 4)))
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("accuracy")] == [0]
    assert events.Scalars("reward")[0].value == 0.5
    assert (events.Images("samples")[0].width, events.Images("samples")[0].height) == (8, 4)


def test_wandb_gets_numbers_and_images(tmp_path, wandb):
    log = open_log(tmp_path, wandb="project")
    assert wandb.started[0]["project"] == "project"
    assert wandb.started[0]["config"] == {"trainer": {"seed": 0}}
    log.scalars(0, {"accuracy": 0.25})
    log.write(1, metrics(0.5))
    log.image(1, "samples", Image.new("RGB", (8, 4), "red"))
    log.close()
    assert wandb.logged[0] == (0, {"accuracy": 0.25})
    assert wandb.logged[1] == (1, metrics(0.5))
    step, values = wandb.logged[2]
    assert step == 1
    assert isinstance(values["samples"], FakeWandb.Image)
    assert np.asarray(values["samples"].image).shape == (4, 8, 3)
    assert wandb.is_finished


def test_missing_wandb_is_a_clear_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"output\.wandb='project'; pip install wandb"):
        open_log(tmp_path, wandb="project")
    assert list(tmp_path.iterdir()) == [], "the folder does not look like that of a run"

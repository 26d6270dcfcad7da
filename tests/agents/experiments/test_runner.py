"""Experiments are run once, kept, and resumed."""

import dataclasses
import io
import json
import shutil
import threading
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from rich.console import Console

from agents.experiments import runner
from agents.experiments.paper_page import write_page
from agents.experiments.paper_tables import EXPERIMENTS, QUICK, Job, jobs
from agents.experiments.runner import results, run_job, run_tables

pytestmark = pytest.mark.slow

SHORT = dataclasses.replace(
    QUICK,
    prompts=2,
    overrides=(
        *QUICK.overrides,
        "env.image_steps=4",
        "env.text_budget=8",
        "evaluation.image_steps=2",
        "algorithm.window_size=1",
        "algorithm.window_low=0",
        "algorithm.window_high=2",
    ),
)
"""As many iterations and checkpoints as `QUICK`, of shorter episodes."""


def job_of(key, root):
    return Job(next(entry for entry in EXPERIMENTS if entry.key == key), 0, str(root), SHORT)


def measures_of(job):
    return json.loads((job.folder / "measures.json").read_text())["measures"]


def test_runs_are_kept_and_shown_on_the_page(tmp_path):
    keys = ["unigrpo", "proxy_none", "reflect", "refl_text_grpo"]
    console = Console(quiet=True)
    run_tables(tmp_path / "runs", SHORT, console, keys, workers=1)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*/measures.json")}
    # What an experiment starts from is run too.
    expected = sorted(f"{key}-0" for key in [*keys, "refl"])
    assert sorted(path.parent.name for path in files) == expected

    run_tables(tmp_path / "runs", SHORT, console, keys, workers=1)
    assert files == {path: path.stat().st_mtime_ns for path in files}, "nothing is run twice"

    page = write_page(tmp_path, results(jobs(tmp_path / "runs", SHORT)), SHORT).read_text()
    assert "| **UniGRPO**, thinking | 1 |" in page
    assert "0.8381" in page, "the paper's figure stands beside it"
    assert "no penalty" in page
    assert "| Reflect | stopped_correct |" in page
    for name in ("curves", "strips", "hacking"):
        assert (tmp_path / f"tables_{name}.png").stat().st_size > 1000


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that was never stopped."""
    job = job_of("sft", tmp_path_factory.mktemp("whole"))
    run_job(job)
    return job


@pytest.fixture
def stopped(whole, tmp_path):
    """The same run, killed before it was measured."""
    job = job_of("sft", tmp_path / "stopped")
    shutil.copytree(whole.folder, job.folder)
    (job.folder / "measures.json").unlink()
    assert not job.is_done
    return job


def test_killed_run_goes_on_from_its_checkpoint(whole, stopped):
    shutil.rmtree(stopped.folder / "checkpoints" / "000002")
    run_job(stopped)
    assert measures_of(whole) == measures_of(stopped)


def test_killed_run_without_checkpoint_starts_again(whole, stopped):
    shutil.rmtree(stopped.folder / "checkpoints")
    run_job(stopped)
    assert measures_of(whole) == measures_of(stopped)


def test_diverged_run_is_measured(tmp_path, monkeypatch):
    def diverge(trainer, console):
        trainer.iterate()
        raise FloatingPointError("the gradient is nan")

    monkeypatch.setattr(runner, "run", diverge)
    job = job_of("unigrpo", tmp_path)
    run_job(job)
    result = results([job])["unigrpo"][0]
    assert result["diverged"] == {"iteration": 1, "error": "the gradient is nan"}
    assert 0 <= result["measures"]["accuracy"] <= 1


def test_another_recipe_is_another_run(tmp_path):
    job = job_of("shipped", tmp_path)
    run_job(job)
    assert job.is_done
    result = json.loads((job.folder / "measures.json").read_text())
    result["recipe"]["settings"]["trainer"]["seed"] = 5
    (job.folder / "measures.json").write_text(json.dumps(result))
    assert not job.is_done
    assert results([job]) == {}


class PoolInThisProcess:
    """Runs each job at once; stands for the pool of processes."""

    def __init__(self, workers, mp_context):
        self.workers = workers

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def submit(self, function, job):
        future = Future()
        try:
            future.set_result(function(job))
        except Exception as error:
            future.set_exception(error)
        return future


@pytest.fixture
def fake_runs(monkeypatch):
    """Jobs that only leave their measures; those in `fails` raise."""
    order = []
    fails = set()

    def fake(job):
        order.append(job.experiment.key)
        if job.experiment.key in fails:
            raise RuntimeError(f"{job.experiment.key} failed")
        job.folder.mkdir(parents=True)
        result = {"recipe": job.recipe, "measures": {"accuracy": 0.5}}
        (job.folder / "measures.json").write_text(json.dumps(result))

    monkeypatch.setattr(runner, "run_job", fake)
    monkeypatch.setattr(runner, "ProcessPoolExecutor", PoolInThisProcess)
    return order, fails


def test_bases_are_run_first(tmp_path, fake_runs):
    order, _ = fake_runs
    run_tables(tmp_path, QUICK, Console(quiet=True), ["sft", "refl", "refl_text_grpo"])
    assert order == ["refl", "sft", "refl_text_grpo"]


def test_workers_run_at_once(tmp_path, fake_runs, monkeypatch):
    order, _ = fake_runs
    fake = runner.run_job
    both_are_running = threading.Barrier(2, timeout=60)

    def wait_and_run(job):
        both_are_running.wait()
        fake(job)

    monkeypatch.setattr(runner, "run_job", wait_and_run)

    def pool(workers, mp_context):
        return ThreadPoolExecutor(workers)

    monkeypatch.setattr(runner, "ProcessPoolExecutor", pool)
    run_tables(tmp_path, QUICK, Console(quiet=True), ["sft", "unigrpo"], workers=2)
    assert sorted(order) == ["sft", "unigrpo"]


def test_a_base_is_run_though_not_asked_for(tmp_path, fake_runs):
    order, _ = fake_runs
    every = run_tables(tmp_path, QUICK, Console(quiet=True), ["sft_no_thinking"])
    assert order == ["base_no_thinking", "sft_no_thinking"]
    assert [job.experiment.key for job in every] == ["sft_no_thinking"]


def test_finished_runs_are_left_alone(tmp_path, fake_runs):
    order, _ = fake_runs
    run_tables(tmp_path, QUICK, Console(quiet=True), ["sft"])
    run_tables(tmp_path, QUICK, Console(quiet=True), ["sft", "unigrpo"])
    assert order == ["sft", "unigrpo"]


def test_first_failure_is_raised_at_the_end(tmp_path, fake_runs):
    order, fails = fake_runs
    fails.update(["sft", "unigrpo"])
    file = io.StringIO()
    keys = ["sft", "text_grpo", "unigrpo"]
    with pytest.raises(RuntimeError, match="sft failed"):
        run_tables(tmp_path, QUICK, Console(file=file, width=200), keys, workers=1)
    assert order == keys
    assert "text_grpo-0" in file.getvalue()
    assert "failed: unigrpo failed" in file.getvalue()


def test_runs_of_a_failed_base_are_left_out(tmp_path, fake_runs):
    order, fails = fake_runs
    fails.add("refl")
    with pytest.raises(RuntimeError, match="refl failed"):
        run_tables(tmp_path, QUICK, Console(quiet=True), ["refl_text_grpo", "sft"])
    assert order == ["refl", "sft"]

"""Runs the experiments of `agents.experiments.paper_tables` and measures their models.

Each run is a process of one thread. Finished runs are kept, and a run that was killed goes on from
its last checkpoint.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
from collections import deque
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from agents.config.schema import Config
from agents.evaluation.accuracy import Evaluation, evaluate
from agents.experiments.paper_tables import (
    DIVERGED,
    MEASURES,
    RECIPE,
    STRIP,
    UNSEEN_DEMONSTRATION,
    Budget,
    Job,
    jobs,
)
from agents.models.base import UnifiedModel
from agents.models.registry import load_model
from agents.reporting.loggers import read_metrics
from agents.storage import read_json_object, write_json, write_tensors
from agents.training.build import build_guidance, build_variant
from agents.training.checkpoint import checkpoints, latest_checkpoint
from agents.training.pretraining import SupervisedSettings, train_supervised
from agents.training.run import CURVE, MODEL, SUMMARY, run
from agents.training.trainer import Trainer
from unigrpo_env.tasks.shapes.prompts import FOREIGN_KINDS, PROMPT_KINDS
from unigrpo_env.tasks.shapes.text_to_image import ShapesTask

STRIP_LENGTH = 8
"""The number of images that the page shows of each run."""

Measures = dict[str, Any]
Model = UnifiedModel[Any]


def run_job(job: Job) -> None:
    """Train one run, or go on with it, and measure its last weights; in a process of its own.

    Args:
        job: the run.
    """
    torch.set_num_threads(1)
    folder = job.folder
    # Files of other settings, or of a run that ended before its first checkpoint, are removed.
    if not job.holds(RECIPE) or not checkpoints(folder / "checkpoints"):
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    write_json({"recipe": job.recipe}, folder / RECIPE)
    # The shipped weights, or those that the experiment starts from.
    model = load_model(job.config.model.name)
    if job.experiment.supervised_updates:
        _train_without_thoughts(model, job)
    if job.experiment.config:
        model = _train(model, job)
    _write_measures(model, job)


def _train_without_thoughts(model: Model, job: Job) -> None:
    """Train on demonstrations without thoughts, with the settings of the shipped weights."""
    updates = job.budget.scale(job.experiment.supervised_updates)
    # A dropout of 1 leaves out every thought.
    settings = SupervisedSettings(
        steps=max(2, updates), text_dropout=1.0, warmup_share=0.0, seed=job.seed
    )
    scenarios = [(build_variant(job.config.env, model.processor), 1.0)]
    train_supervised(model, scenarios, settings, first_demonstration=UNSEEN_DEMONSTRATION)
    model.save_pretrained(job.folder / MODEL)


def _train(model: Model, job: Job) -> Model:
    """Train, or go on from the last checkpoint; returns the last weights."""
    if checkpoints(job.folder / "checkpoints"):
        trainer = Trainer.resume(job.folder)
    else:
        trainer = Trainer(job.config, model)
    try:
        run(trainer, Console(quiet=True))
    except FloatingPointError as error:
        # A method that diverges is a result: its last finite weights are measured.
        write_json({"iteration": trainer.iteration, "error": str(error)}, job.folder / DIVERGED)
        trainer.save()
    return load_model(str(latest_checkpoint(job.folder) / "model"))


def _write_measures(model: Model, job: Job) -> None:
    """Measure the model and write what the page needs of the run."""
    config = job.config
    if job.experiment.study == "rounds":
        found, sampled = measure_rounds(model, config, job.budget.prompts)
    else:
        found, sampled = measure(model, config, job.budget.prompts)
    # A model that is only evaluated, or a run that diverged, has no summary.
    summary = _read_if_there(job.folder / SUMMARY)
    if summary is not None:
        names = ("accuracy", "greedy_accuracy", "components")
        found["before"] = {name: summary[f"{name}_before"] for name in names}
    # images: [8, 3, height, width]; reward: [8].
    shown = {"images": sampled.images[:STRIP_LENGTH], "reward": sampled.reward[:STRIP_LENGTH]}
    write_tensors(shown, job.folder / STRIP)
    result = {
        "recipe": job.recipe,
        "measures": found,
        "curve": _read_if_there(job.folder / CURVE) or [],
        "diverged": _read_if_there(job.folder / DIVERGED),
        "prompts": [prompt.text for prompt in sampled.prompts[:STRIP_LENGTH]],
        "texts": sampled.texts[:STRIP_LENGTH],
    }
    write_json(result, job.folder / MEASURES)


def _read_if_there(path: Path) -> Any:
    if not path.is_file():
        return None
    return json.loads(path.read_text())


def measure(model: Model, config: Config, prompts: int) -> tuple[Measures, Evaluation]:
    """Measure a model that draws one image for a prompt.

    Args:
        model: the model.
        config: the settings of its run.
        prompts: the number of held-out prompts.

    Returns:
        The episodes with sampled text, and the measures: `accuracy`, strict, with sampled text;
        `greedy`, with greedy text; `graded`, the share of requirements met; `thought`, the share
        of thoughts whose layout is right; `correct_despite_plan`, the share of episodes whose
        image is right after a thought that is not; `crispness`, see `rewards.shapes`; `foreign`,
        strict, on kinds of prompt that training has none of; `guided`, strict, at guidance 2;
        `by_kind`, strict, for each kind of prompt.
    """
    # The terms of weight 0 change no reward; they are there for their components.
    reward = "shapes + 0 * shapes_thought + 0 * crispness"
    variant = build_variant(config.env, model.processor, reward=reward)
    seed = config.evaluation.seed
    held_out = ShapesTask(PROMPT_KINDS).prompts("test", prompts, seed)
    foreign = ShapesTask(FOREIGN_KINDS).prompts("test", prompts, seed)
    # Evaluated at scale 2 whatever the run was trained with.
    guidance = build_guidance(config.guidance, 2.0)
    sampled = evaluate(model, variant, held_out)
    found: Measures = {
        "accuracy": sampled.accuracy,
        "greedy": evaluate(model, variant, held_out, temperature=0.0).accuracy,
        "graded": sampled.means["shapes/score"],
        "thought": None,
        "correct_despite_plan": None,
        "crispness": sampled.means["crispness"],
        "foreign": evaluate(model, variant, foreign).accuracy,
        "guided": evaluate(model, variant, held_out, guidance=guidance).accuracy,
        "by_kind": sampled.by("kind"),
    }
    if variant.rules.text_budget:
        # Both are [prompts] float32, 0 or 1.
        image_right = sampled.components["shapes"]
        thought_right = sampled.components["shapes_thought"]
        found["thought"] = sampled.means["shapes_thought"]
        found["correct_despite_plan"] = float((image_right * (1 - thought_right)).mean())
    return found, sampled


def measure_rounds(model: Model, config: Config, prompts: int) -> tuple[Measures, Evaluation]:
    """Measure a model in a scenario of several images, by the verifier of the scenario.

    Args:
        model: the model.
        config: the settings of its run.
        prompts: the number of held-out prompts.

    Returns:
        The episodes with sampled text, and the measures: `accuracy` with sampled text, `greedy`
        with greedy text, `by_kind` for each kind of prompt, and the `parts` of the reward.
    """
    variant = build_variant(config.env, model.processor, reward=config.evaluation.reward)
    held_out = variant.task.prompts("test", prompts, config.evaluation.seed)
    sampled = evaluate(model, variant, held_out)
    greedy = evaluate(model, variant, held_out, temperature=0.0)
    found = {
        "accuracy": sampled.accuracy,
        "greedy": greedy.accuracy,
        "by_kind": sampled.by("kind"),
        "parts": sampled.means,
    }
    return found, sampled


def run_tables(
    folder: Path,
    budget: Budget,
    console: Console,
    only: Sequence[str] = (),
    workers: int | None = None,
    extras: bool = True,
) -> list[Job]:
    """Run what is not done yet: first the runs that others start from, then the others.

    Args:
        folder: the folder of all runs.
        budget: how much is run.
        console: where to show the progress.
        only: the keys of the experiments to run; all if it is empty.
        workers: the number of runs at a time; one for each core if it is left out.
        extras: whether to include the studies that are not in the paper, if `only` is empty.

    Returns:
        All runs that were asked for.

    Raises:
        Exception: what the first failed run raised, after all others that can be run are done.
    """
    every = jobs(folder, budget, only, extras)
    waiting = [job for job in every if not job.is_done]
    # What others start from is run even if it was not asked for. No base has a base of its own.
    bases: list[Job] = []
    for job in waiting:
        base = job.base
        if base is not None and base not in bases and not base.is_done:
            bases.append(base)
    others = [job for job in waiting if job not in bases]
    # The matrix library of a spawned worker must not start a thread for each core.
    os.environ["OMP_NUM_THREADS"] = "1"
    slots = workers or max(1, os.cpu_count() or 1)
    # A forked process would inherit torch's threads in an unknown state.
    context = multiprocessing.get_context("spawn")
    failed: dict[Job, BaseException] = {}
    with (
        _TablesProgress(console, [*bases, *others]) as progress,
        ProcessPoolExecutor(slots, mp_context=context) as pool,
    ):
        _run_wave(pool, slots, bases, failed, progress)
        # A run whose base failed has no weights to start from: it fails with the same error.
        possible = []
        for job in others:
            if job.base in failed:
                failed[job] = failed[job.base]
            else:
                possible.append(job)
        _run_wave(pool, slots, possible, failed, progress)
    # In the order of failure: the first error is often the cause of the others.
    for error in failed.values():
        raise error
    return every


def _run_wave(
    pool: ProcessPoolExecutor,
    slots: int,
    wave: Sequence[Job],
    failed: dict[Job, BaseException],
    progress: _TablesProgress,
) -> None:
    """Run jobs that do not depend on each other, and put the errors into `failed`."""
    left = deque(wave)
    running: dict[Future[None], Job] = {}
    while left or running:
        # No more than `slots` are handed over, so that Ctrl-C has no queue to work off.
        while left and len(running) < slots:
            job = left.popleft()
            running[pool.submit(run_job, job)] = job
        # Seconds, after which the bar is updated even if no run has ended.
        finished, _ = wait(running, timeout=2, return_when=FIRST_COMPLETED)
        for future in finished:
            job = running.pop(future)
            error = future.exception()
            if error is not None:
                failed[job] = error
            progress.finish(job, error)
        progress.update_runs(list(running.values()))


class _TablesProgress(Progress):
    """A bar over the iterations of all runs, and a line for each run that ends."""

    def __init__(self, console: Console, every: Sequence[Job]) -> None:
        columns = (
            TextColumn("tables"),
            BarColumn(),
            TextColumn("{task.fields[runs]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[now]}"),
        )
        super().__init__(*columns, console=console, speed_estimate_period=600)
        self._count = len(every)
        self._over: list[Job] = []
        # One more step for the evaluation of each run.
        total = sum(1 + job.iterations for job in every)
        self._bar = self.add_task("tables", total=total, runs="", now="")

    def finish(self, job: Job, error: BaseException | None) -> None:
        """Print how a run ended."""
        self._over.append(job)
        if error is not None:
            line = f"{job.folder.name:<26} failed: {error}"
        else:
            measures = read_json_object(job.folder / MEASURES)["measures"]
            line = f"{job.folder.name:<26} accuracy {measures['accuracy']:.3f}"
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def update_runs(self, running: Sequence[Job]) -> None:
        """Count the iterations of all runs that have begun, and name those that are running."""
        # Another process shows its progress only by the rows of its `metrics.csv`.
        iterations = 0
        for job in (*self._over, *running):
            iterations += len(read_metrics(job.folder))
        self.update(
            self._bar,
            completed=iterations + len(self._over),
            runs=f"{len(self._over)}/{self._count} runs",
            now="  ".join(job.folder.name for job in running),
        )


def results(every: Sequence[Job]) -> dict[str, list[dict[str, Any]]]:
    """Read what was measured.

    Args:
        every: the runs; those that are not done are left out.

    Returns:
        By the key of the experiment, one entry for each seed.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for job in every:
        if job.is_done:
            result = read_json_object(job.folder / MEASURES)
            result["folder"] = str(job.folder)
            found.setdefault(job.experiment.key, []).append(result)
    return found

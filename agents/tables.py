"""The paper's comparisons, on the shipped model: every row is a config, a number of seeds, and what the paper found.

`unigrpo tables` plays the rows in processes of one thread each, the main ones first, keeps what is done, and goes on after a kill; `agents.tables_page`
writes the page.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from agents.checkpoint import checkpoints, latest_checkpoint
from agents.config import Config, load_config
from agents.evaluation import Evaluation, evaluate
from agents.logs import read_metrics
from agents.models import TINY, load_model
from agents.models.files import WEIGHTS, write_json, write_tensors
from agents.run import CURVE, SUMMARY, run
from agents.supervised import COURSES, SupervisedSettings, train_supervised
from agents.trainer import Trainer, build_guidance, build_variant
from unigrpo_env.shapes_world import FOREIGN_KINDS, PROMPT_KINDS, ShapesTask

MEASURES, STRIP, DIVERGED, RECIPE = "measures.json", "strip.safetensors", "diverged.json", "recipe.json"
PROXY = ("env.reward=soft_shapes", "evaluation.reward=shapes", "optimizer.image_lr=3e-4", "optimizer.decay=1.0", "evaluation.every=10")
"""The reward-hacking study: train on the proxy at a learning rate that does not fall, measure with the verifier."""
UNSEEN_LESSON = max(course.first_lesson + course.settings.steps for course in COURSES.values())
"""The first number of a batch of lessons that the shipped weights were not taught with."""


@dataclass(frozen=True)
class Row:
    """One method.

    Attributes:
        key: name of its folders.
        title: as the page shows it.
        config: one of `agents/configs`; empty for the shipped model as it is.
        paper: TA and GenEval in the paper's table 1, or a word in their place; None where it has none.
        overrides: settings beside the config.
        seeds: how many runs.
        iterations: in place of the config's; 0 for those. Either is scaled by the plan's over 120.
        start: (row, iteration of 120, scaled to the plan): begin with that row's weights of the same seed; 0: what a row of `lessons` left.
        lessons: supervised updates by the recipe of the shipped weights, without thoughts, in place of a config.
        study: which part of the page it belongs to: table, guidance, penalty, process, rounds, kernels or text.
    """

    key: str
    title: str
    config: str = ""
    paper: tuple[float, float] | str | None = None
    overrides: tuple[str, ...] = ()
    seeds: int = 1
    iterations: int = 0
    start: tuple[str, int] | None = None
    lessons: int = 0
    study: str = "table"

    @property
    def thinks(self) -> bool:
        return not self.key.endswith("_no_thinking")


ROWS: tuple[Row, ...] = (
    Row("sft", "SFT, thinking", "sft", (0.7769, 0.82), seeds=3),
    Row("text_grpo", "TextGRPO, thinking", "text_grpo", (0.8078, 0.88), seeds=3),
    Row("flow_grpo", "FlowGRPO, thinking", "flow_grpo", (0.8208, 0.86), seeds=3),
    Row("unigrpo", "**UniGRPO**, thinking", "unigrpo", (0.8381, 0.90), seeds=3),
    Row("shipped", "shipped model, thinking", "", (0.7132, 0.79)),
    Row("refl", "ReFL, thinking", "refl", (0.8120, 0.84)),
    Row("fpo", "FPO / AWR, thinking", "fpo", (0.8159, 0.85)),
    Row("unifpo", "UniFPO, thinking", "unifpo", "collapsed"),
    Row("refl_text_grpo", "ReFL, then TextGRPO, thinking", "text_grpo", (0.7987, 0.87), iterations=60, start=("refl", 60)),
    Row("proxy_none", "no penalty", "unigrpo_free", None, PROXY, study="penalty"),
    Row("proxy_latent_kl", "latent KL", "unigrpo_latent_kl", None, PROXY, study="penalty"),
    Row("proxy_velocity", "velocity MSE", "unigrpo", None, PROXY, study="penalty"),
    Row("unigrpo_guided", "guidance in training", "unigrpo_guided", None, study="guidance"),
    Row("process_reward", "UniGRPO with a process reward", "process_reward", None, seeds=3, study="process"),
    Row("edit", "Edit", "edit", None, seeds=3, study="rounds"),
    Row(
        "edit_process",
        "Edit with a process reward",
        "edit",
        None,
        ("env.thought_reward=0.5 * edit_thought", "algorithm.credit=onward"),
        3,
        study="rounds",
    ),
    Row("reflect", "Reflect", "reflect", None, seeds=3, study="rounds"),
    Row("story", "Story", "story", None, seeds=3, study="rounds"),
    Row("dialogue", "Dialogue", "dialogue", None, seeds=3, study="rounds"),
    Row("base_no_thinking", "shipped model, taught to draw without a thought", "", (0.6810, 0.78), lessons=1500),
    Row("sft_no_thinking", "SFT", "sft_no_thinking", (0.7486, 0.83), start=("base_no_thinking", 0)),
    Row("flow_grpo_no_thinking", "FlowGRPO", "flow_grpo_no_thinking", (0.8112, 0.88), start=("base_no_thinking", 0)),
    Row("fpo_no_thinking", "FPO / AWR", "fpo_no_thinking", (0.7893, 0.87), start=("base_no_thinking", 0)),
    Row("refl_no_thinking", "ReFL", "refl_no_thinking", (0.7786, 0.85), start=("base_no_thinking", 0)),
    Row("flow_cps", "Flow-CPS", "flow_cps", None, study="kernels"),
    Row("dance_grpo", "DanceGRPO's constant sigma", "dance_grpo", None, study="kernels"),
    Row("mix_grpo", "MixGRPO's sliding window", "mix_grpo", None, study="kernels"),
    Row("all_steps", "all steps but the last", "all_steps", None, study="kernels"),
    Row("plain_ratio", "plain ratio, equation (4)", "unigrpo", None, ("algorithm.ratio=plain",), study="kernels"),
    Row("token_mean", "mean over all tokens", "unigrpo", None, ("algorithm.text_aggregation=token",), study="text"),
    Row("clip_higher", "upper clip 0.28", "unigrpo", None, ("algorithm.text_clip_high=0.28",), study="text"),
    Row("text_kl", "token KL 0.01", "unigrpo", None, ("algorithm.text_kl_weight=0.01",), study="text"),
    Row("dynamic_sampling", "dynamic sampling (drop)", "unigrpo", None, ("trainer.dynamic_sampling=drop",), study="text"),
    Row("two_epochs", "two passes over a batch", "unigrpo", None, ("trainer.epochs=2",), study="text"),
)
"""In the order in which they are run."""


@dataclass(frozen=True)
class Plan:
    """How much of it: sizes that make it two hours, or two minutes.

    Attributes:
        iterations: of a run whose config has 120; of others in proportion.
        prompts: held out, for each measure.
        overrides: for every run.
        max_seeds: at most so many of a row's seeds.
    """

    iterations: int = 120
    prompts: int = 256
    overrides: tuple[str, ...] = ()
    max_seeds: int = 3


QUICK = Plan(2, 8, ("trainer.groups=2", "trainer.group_size=4", "evaluation.every=1", "trainer.minibatches=1"), max_seeds=1)
"""A breath of every row: it shows that they run, not what they are worth."""


@cache
def _iterations(config: str) -> int:
    return load_config(config).trainer.iterations


@dataclass(frozen=True)
class Job:
    """One run of one row."""

    row: Row
    seed: int
    folder: str
    plan: Plan

    @property
    def place(self) -> Path:
        return Path(self.folder) / f"{self.row.key}-{self.seed}"

    @property
    def config(self) -> Config:
        """The settings of the run, or of the shipped model's evaluation."""
        thought = () if self.row.thinks else ("env.text_budget=0",)
        whole = self.row.iterations or _iterations(self.row.config or "unigrpo")
        settings = [
            f"trainer.iterations={max(1, self.plan.iterations * whole // 120)}",
            f"trainer.seed={self.seed}",
            f"evaluation.prompts={self.plan.prompts}",
            f"output.folder={self.place}",
            f"output.checkpoint_every={max(1, self.plan.iterations // 6)}",
            "output.keep_checkpoints=10",
            "output.samples_every=0",
            "output.tensorboard=false",
            "trainer.threads=1",
        ]
        if self.base is not None:
            at = self.row.start[1] * self.plan.iterations // 120 if self.row.start else 0
            settings.append(f"model.name={self.base.place / (f'checkpoints/{max(1, at):06d}/model' if at else 'model')}")
        return load_config(self.row.config or "unigrpo", [*settings, *thought, *self.plan.overrides, *self.row.overrides])

    @property
    def iterations(self) -> int:
        return self.config.trainer.iterations if self.row.config else 0

    @property
    def base(self) -> Job | None:
        """The run whose weights this one starts from."""
        if self.row.start is None:
            return None
        return Job(next(row for row in ROWS if row.key == self.row.start[0]), self.seed, self.folder, self.plan)

    @property
    def recipe(self) -> dict[str, Any]:
        """What a result is made of; one of another recipe is not this run's. Where the files lie is no part of it."""
        settings = self.config.to_dict()
        del settings["output"]["folder"], settings["model"]["name"]
        start = self.base.recipe if self.base else hashlib.sha256((TINY / WEIGHTS).read_bytes()).hexdigest()
        lessons = [self.row.lessons, UNSEEN_LESSON, asdict(SupervisedSettings())] if self.row.lessons else [0, None]
        return {"config": self.row.config, "settings": settings, "start": [self.row.start, start], "lessons": lessons}

    def holds(self, file: str) -> bool:
        """Whether `file` in the folder is of this very recipe."""
        path = self.place / file
        return path.is_file() and json.loads(path.read_text())["recipe"] == json.loads(json.dumps(self.recipe))

    @property
    def done(self) -> bool:
        """Whether the run is over and measured."""
        return self.holds(MEASURES)


EXTRAS = ("kernels", "text")
"""Studies beside the paper's own, run where they are asked for."""


def jobs(folder: Path, plan: Plan, only: Sequence[str] = (), extras: bool = True) -> list[Job]:
    """Every run, in order; of the rows `only`, if any are named.

    Raises:
        ValueError: a row that is not there.
    """
    unknown = set(only) - {row.key for row in ROWS}
    if unknown:
        raise ValueError(f"unknown rows {sorted(unknown)}; expected some of: {', '.join(row.key for row in ROWS)}")
    rows = [row for row in ROWS if (row.key in only if only else extras or row.study not in EXTRAS)]
    return [Job(row, seed, str(folder), plan) for row in rows for seed in range(min(row.seeds, plan.max_seeds))]


def play(job: Job) -> None:
    """Train (or go on with) one run and measure its last weights; in a process of its own."""
    torch.set_num_threads(1)
    config, place = job.config, job.place
    model: Any = load_model(config.model.name)
    if not job.holds(RECIPE):
        shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True, exist_ok=True)
    write_json({"recipe": job.recipe}, place / RECIPE)
    if job.row.lessons:
        steps = max(2, job.row.lessons * job.plan.iterations // 120)
        recipe = SupervisedSettings(steps=steps, silent=1.0, drills=0.0, seed=job.seed)
        train_supervised(model, [(build_variant(config.env), 1.0)], recipe, first_lesson=UNSEEN_LESSON)
        model.save_pretrained(place / "model")
    if job.row.config:
        if checkpoints(place / "checkpoints"):
            trainer = Trainer.resume(place)
        else:
            shutil.rmtree(place / "checkpoints", ignore_errors=True)
            trainer = Trainer(config, model)
        try:
            run(trainer, Console(quiet=True))
        except FloatingPointError as error:  # a method that diverges is a result; its last weights are measured
            write_json({"iteration": trainer.iteration, "error": str(error)}, place / DIVERGED)
            trainer.save()
        model = load_model(str(latest_checkpoint(place) / "model"))
    found, strip = (measure if job.row.study != "rounds" else measure_rounds)(model, config, job.plan.prompts)
    if (place / SUMMARY).is_file():
        summary = json.loads((place / SUMMARY).read_text())
        found["before"] = {name: summary[f"{name}_before"] for name in ("accuracy", "greedy_accuracy", "components")}
    write_tensors({"images": strip.images[:8], "reward": strip.reward[:8]}, place / STRIP)
    curve = json.loads((place / CURVE).read_text()) if (place / CURVE).is_file() else []
    texts = {"prompts": [prompt.text for prompt in strip.prompts[:8]], "texts": strip.texts[:8]}
    diverged = json.loads((place / DIVERGED).read_text()) if (place / DIVERGED).is_file() else None
    write_json({"recipe": job.recipe, "measures": found, "curve": curve, "diverged": diverged, **texts}, place / MEASURES)


def measure(model: Any, config: Config, prompts: int) -> tuple[dict[str, Any], Evaluation]:
    """The page's measures of a model, and its sampled answers.

    `accuracy`: strict, sampled text; `greedy`: greedy text; `graded`: share of requirements met; `thought`: share of thoughts whose layout is right;
    `lucky`: share of episodes whose picture is right after a thought that is not; `crispness`: see `rewards.shapes`; `foreign`: strict, on kinds of prompt that training has none of; `guided`: strict, at guidance 2;
    `by_kind`: strict, for each kind.
    """
    variant = build_variant(config.env, reward="shapes + 0 * shapes_thought + 0 * crispness")
    held_out = ShapesTask(PROMPT_KINDS).prompts("test", prompts, config.evaluation.seed)
    foreign = ShapesTask(FOREIGN_KINDS).prompts("test", prompts, config.evaluation.seed)
    sampled = evaluate(model, variant, held_out)
    parts = sampled.means
    return {
        "accuracy": sampled.accuracy,
        "greedy": evaluate(model, variant, held_out, temperature=0.0).accuracy,
        "graded": parts["shapes/score"],
        "thought": parts["shapes_thought"] if variant.rules.text_budget else None,
        "lucky": float((sampled.components["shapes"] * (1 - sampled.components["shapes_thought"])).mean())
        if variant.rules.text_budget
        else None,
        "crispness": parts["crispness"],
        "foreign": evaluate(model, variant, foreign).accuracy,
        "guided": evaluate(model, variant, held_out, guidance=build_guidance(config.guidance, 2.0)).accuracy,
        "by_kind": sampled.by("kind"),
    }, sampled


def measure_rounds(model: Any, config: Config, prompts: int) -> tuple[dict[str, Any], Evaluation]:
    """The measures of a scenario of several pictures: `accuracy`, `greedy` and `by_kind` by its own verifier, `parts` of its reward."""
    variant = build_variant(config.env, reward=config.evaluation.reward)
    held_out = variant.task.prompts("test", prompts, config.evaluation.seed)
    sampled = evaluate(model, variant, held_out)
    greedy = evaluate(model, variant, held_out, temperature=0.0)
    return {"accuracy": sampled.accuracy, "greedy": greedy.accuracy, "by_kind": sampled.by("kind"), "parts": sampled.means}, sampled


def run_tables(
    folder: Path, plan: Plan, console: Console, only: Sequence[str] = (), workers: int | None = None, extras: bool = True
) -> list[Job]:
    """Run what is not done yet; returns all jobs.

    Raises:
        Exception: what the first failed run raised, after all others that can be are done.
    """
    every = jobs(folder, plan, only, extras)
    waiting = [job for job in every if not job.done]
    for job in list(waiting):
        if job.base is not None and not job.base.done and job.base not in waiting:
            waiting.insert(waiting.index(job), job.base)
    context = multiprocessing.get_context("spawn")
    columns = (
        TextColumn("tables"),
        BarColumn(),
        TextColumn("{task.fields[runs]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    # A spawned worker's matrix library must not start a thread for each core beside its neighbour's.
    os.environ["OMP_NUM_THREADS"] = "1"
    with Progress(*columns, TextColumn("{task.fields[now]}"), console=console, speed_estimate_period=600) as progress:
        bar = progress.add_task("tables", total=sum(1 + job.iterations for job in waiting), runs="", now="")
        slots = workers or max(1, os.cpu_count() or 1)
        with ProcessPoolExecutor(slots, mp_context=context) as pool:
            running: dict[Future[None], Job] = {}
            left, failed = list(waiting), dict[Job, BaseException]()
            while left or running:
                for job in list(left):
                    if job.base in failed:
                        left.remove(job)
                        failed[job] = failed[job.base]
                    elif len(running) < slots and job.base not in [*left, *running.values()]:
                        left.remove(job)
                        running[pool.submit(play, job)] = job
                finished, _ = wait(running, timeout=2, return_when=FIRST_COMPLETED)
                for future in finished:
                    job = running.pop(future)
                    if error := future.exception():
                        failed[job] = error
                        console.print(f"{job.place.name:<26} failed: {error}", highlight=False, markup=False, soft_wrap=True)
                        continue
                    measures = json.loads((job.place / MEASURES).read_text())["measures"]
                    console.print(f"{job.place.name:<26} accuracy {measures['accuracy']:.3f}", highlight=False)
                steps = sum(len(read_metrics(job.place)) if job not in left else 0 for job in waiting)
                over = len(waiting) - len(left) - len(running)
                progress.update(
                    bar,
                    completed=steps + over,
                    runs=f"{over}/{len(waiting)} runs",
                    now="  ".join(job.place.name for job in running.values()),
                )
    for error in failed.values():
        raise error
    return every


def results(every: Sequence[Job]) -> dict[str, list[dict[str, Any]]]:
    """What was measured, by row, one entry a seed."""
    found: dict[str, list[dict[str, Any]]] = {}
    for job in every:
        if job.done:
            found.setdefault(job.row.key, []).append(json.loads((job.place / MEASURES).read_text()) | {"folder": str(job.place)})
    return found


__all__ = ["QUICK", "ROWS", "Job", "Plan", "Row", "jobs", "measure", "measure_rounds", "play", "results", "run_tables"]

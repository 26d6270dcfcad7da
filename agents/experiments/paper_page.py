"""The page of `unigrpo tables`: Markdown, with the figures of `agents.experiments.page_figures`."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from agents.experiments.formatting import markdown_table, mean_and_half_range, wrap_markdown
from agents.experiments.page_figures import (
    TITLES,
    Results,
    Run,
    curve_by_iteration,
    draw_curves,
    draw_hacking,
    draw_strips,
    draw_thought_reward,
    shared_iterations,
)
from agents.experiments.paper_tables import (
    EXPERIMENTS,
    Budget,
    Experiment,
    jobs,
)
from agents.reporting.loggers import metric_values, read_metrics
from agents.training.run import SUMMARY
from unigrpo_env.tasks.shapes.prompts import PROMPT_KINDS

THOUGHT_REWARD_PAIRS = (("unigrpo", "process_reward"), ("edit", "edit_process"))
"""Experiments that differ in one thing: whether a thought has a reward of its own."""

MEANINGS = {
    "accuracy": "share of held-out prompts whose image meets every requirement, with text "
    "sampled at temperature 1",
    "greedy": "the same with greedy text",
    "graded": "share of the requirements met, averaged over prompts: the analogue of the paper's "
    "TA",
    "thought": "share of thoughts whose layout would meet every requirement, whatever was drawn",
    "crispness": "1 less the mean distance of a cell to the nearest clean one, in units of the "
    "verifier's tolerance; no reward depends on it",
    "foreign": "accuracy on kinds of prompt that training has none of: three objects, two counts, "
    "sums of three numbers",
}
"""The measures of the first table."""


def write_page(folder: Path, found: Results, budget: Budget) -> Path:
    """Write `tables.md` and its figures; experiments without a result are left out.

    Args:
        folder: where the page goes.
        found: what `agents.experiments.runner.results` returned.
        budget: what was run.

    Returns:
        The path of the page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    studies: dict[str, list[Experiment]] = {}
    for experiment in EXPERIMENTS:
        # A study without results has an empty list, so that it can be asked for by name.
        known = studies.setdefault(experiment.study, [])
        if experiment.key in found:
            known.append(experiment)
    # Methods without thinking come first, then the others, each from the worst to the best.
    methods = sorted(studies["table"], key=lambda entry: (entry.thinks, _accuracy(found, entry)))
    base = [experiment for experiment in methods if experiment.key == "unigrpo"]
    pairs = [pair for pair in THOUGHT_REWARD_PAIRS if set(pair) <= set(found)]

    parts = ["# The paper's tables on a laptop", _set_up(budget), *diverged_part(found)]
    parts += _methods_part(found, methods)
    if studies["guidance"]:
        parts += _guidance_part(found, base + studies["guidance"])
    if studies["penalty"]:
        draw_hacking(found, studies["penalty"], folder / "tables_hacking.png")
        parts += _penalty_part(found, studies["penalty"])
    if pairs:
        draw_thought_reward(found, pairs, folder / "tables_process.png")
        parts += _thought_reward_part(found, pairs)
    if studies["rounds"]:
        parts += rounds_part(found, studies["rounds"])
    if studies["kernels"]:
        title = "Stochastic steps, windows, ratio"
        parts += _changes_part(found, title, base + studies["kernels"])
    if studies["text"]:
        parts += _changes_part(found, "Text and batches", base + studies["text"])

    draw_curves(found, _with_curve(found, methods), folder / "tables_curves.png")
    draw_strips(found, methods + studies["penalty"], folder / "tables_strips.png")
    path = folder / "tables.md"
    path.write_text(wrap_markdown("\n\n".join(parts)) + "\n")
    return path


def diverged_part(found: Results) -> list[str]:
    """Say which runs diverged.

    Args:
        found: the runs.
    """
    parts = []
    for key, runs in found.items():
        for seed, run in enumerate(runs):
            if run["diverged"]:
                parts.append(
                    f"{TITLES[key]}, seed {seed}, diverged after {run['diverged']['iteration']} "
                    "iterations: what is shown of it is of the weights that it had then."
                )
    return parts


def rounds_part(found: Results, experiments: Sequence[Experiment]) -> list[str]:
    """Write the part on scenarios of several images.

    Args:
        found: the runs.
        experiments: the experiments of the study.
    """
    rows = []
    part_rows = []
    for experiment in experiments:
        runs = found[experiment.key]
        for seed, run in enumerate(runs):
            rows.append([experiment.title, str(seed), *_before_and_after(run)])
        for name in runs[0]["measures"]["parts"]:
            # A name without a slash is the accuracy itself.
            if "/" not in name:
                continue
            row = [experiment.title, name.split("/")[-1]]
            for run in runs:
                first = _before(run)["components"].get(name)
                row.append(_change(first, run["measures"]["parts"][name]))
            part_rows.append(row)
    seeds = max(len(found[experiment.key]) for experiment in experiments)
    # Experiments may differ in their number of seeds; a table needs rows of one length.
    for row in part_rows:
        row.extend([""] * (2 + seeds - len(row)))
    seed_titles = [f"seed {seed}" for seed in range(seeds)]
    return [
        "## Several images",
        "Each scenario is measured by its own verifier, from the shipped weights to the last "
        "ones; a story has three images, and so trains for fewer iterations; Edit's learning rate "
        "of the text was tried out, the others' were not. What the parts of a reward mean stands "
        "in variants.md.",
        markdown_table(["scenario", "seed", "sampled text", "greedy text", "training"], rows),
        markdown_table(["scenario", "part, sampled text", *seed_titles], part_rows),
    ]


def _before_and_after(run: Run) -> list[str]:
    before = _before(run)
    return [
        _change(before.get("accuracy"), run["measures"]["accuracy"]),
        _change(before.get("greedy_accuracy"), run["measures"]["greedy"]),
        f"{len(read_metrics(Path(run['folder'])))} iterations{_seconds(run)}",
    ]


def _before(run: Run) -> dict[str, Any]:
    """The measures of the first weights; a run that diverged has none."""
    return run["measures"].get("before", {"components": {}})


def _change(first: float | None, last: float) -> str:
    if first is None:
        return ""
    return f"{first:.3f} → {last:.3f}"


def _measured(found: Results, experiment: Experiment, names: Iterable[str]) -> list[str]:
    """An experiment's measures over its seeds, as cells."""
    cells = []
    for name in names:
        values = [run["measures"][name] for run in found[experiment.key]]
        cells.append(mean_and_half_range(values))
    return cells


def _set_up(budget: Budget) -> str:
    trainer = jobs(Path(), budget)[0].config.trainer
    episodes = trainer.groups * trainer.group_size
    # Only one experiment has supervised updates; the others have 0.
    updates = budget.scale(max(experiment.supervised_updates for experiment in EXPERIMENTS))
    # The standard deviation of a value that is 0 or 1 is at most 0.5.
    error = 0.5 / budget.prompts**0.5
    return (
        f"`unigrpo tables`: each row is a config of one trainer, {budget.iterations} iterations of "
        f"{episodes} episodes (or demonstrations) unless it says more, {budget.prompts} held-out "
        "prompts. Rows without thinking start from weights that were trained to draw without a "
        f"thought, in {updates} supervised updates of 64 more; all others from the shipped ones. "
        f"Written on {platform.machine()}, {os.cpu_count()} cores, PyTorch {torch.__version__}, "
        "one thread a run, float32. The learning rates, batch and clip ranges are those of the "
        "config (the proxy study: see there); no row of one image was swept. One image an episode "
        "unless it says more, ten denoising steps. ± is half the range over seeds; the standard "
        f"error of one accuracy is at most {error:.2f}."
    )


def _methods_part(found: Results, experiments: Sequence[Experiment]) -> list[str]:
    rows = []
    kind_rows = []
    for experiment in experiments:
        runs = found[experiment.key]
        measures = _measured(found, experiment, MEANINGS)
        rows.append([experiment.title, str(len(runs)), *measures, *_paper(experiment)])
        kind_row = [experiment.title]
        for kind in PROMPT_KINDS:
            values = [run["measures"]["by_kind"].get(kind) for run in runs]
            kind_row.append(mean_and_half_range(values))
        kind_rows.append(kind_row)
    head = ["method", "seeds", *MEANINGS, "paper: TA", "paper: GenEval"]
    return [
        "## Methods",
        "Beside the paper's figures (TA and GenEval, on BAGEL at 1024 x 1024): what carries over "
        "is the order, not the numbers.",
        markdown_table(head, rows),
        "\n".join(f"* *{name}*: {meaning}." for name, meaning in MEANINGS.items()),
        *_ranges(found),
        "![Held-out accuracy over iterations](tables_curves.png)",
        "![The same prompts and seeds by method](tables_strips.png)",
        "## By kind of prompt",
        markdown_table(["method", *PROMPT_KINDS], kind_rows),
    ]


def _paper(experiment: Experiment) -> tuple[str, str]:
    """TA and GenEval in the paper, as cells."""
    if experiment.paper is None:
        return "", ""
    if isinstance(experiment.paper, str):
        return experiment.paper, experiment.paper
    alignment, geneval = experiment.paper
    return f"{alignment:.4f}", f"{geneval:.2f}"


def _ranges(found: Results) -> list[str]:
    """Say whether UniGRPO's range over seeds lies above the others'."""
    ranges = {}
    for key in ("unigrpo", "text_grpo", "flow_grpo", "sft"):
        values = [run["measures"]["accuracy"] for run in found.get(key, [])]
        if len(values) > 1:
            ranges[key] = (min(values), max(values))
    if "unigrpo" not in ranges or len(ranges) == 1:
        return []
    # The range over the seeds of each method: least and largest accuracy.
    low, high = ranges.pop("unigrpo")
    lines = []
    for key, (other_low, other_high) in ranges.items():
        verdict = "does not lie wholly above"
        if low > other_high:
            verdict = "lies wholly above"
        other = f"{TITLES[key]} [{other_low:.3f}, {other_high:.3f}]"
        lines.append(f"* UniGRPO [{low:.3f}, {high:.3f}] {verdict} {other}.")
    return ["Ranges of accuracy over seeds:", "\n".join(lines)]


def _guidance_part(found: Results, experiments: Sequence[Experiment]) -> list[str]:
    rows = []
    for experiment in experiments:
        title = experiment.title
        if experiment.study == "table":
            title = "without guidance (UniGRPO)"
        rows.append([title, *_measured(found, experiment, ("accuracy", "guided"))])
    return [
        "## Guidance in training, and at evaluation",
        markdown_table(["trained", "evaluated without", "evaluated at scale 2"], rows),
    ]


def _penalty_part(found: Results, experiments: Sequence[Experiment]) -> list[str]:
    rows = []
    for experiment in experiments:
        for run in found[experiment.key]:
            first, last = _reward_at_both_ends(run)
            # A run that diverged early may have no curve.
            best = max(value for _, value in run["curve"] or [(0, 0.0)])
            figures = (best, run["measures"]["accuracy"], run["measures"]["crispness"])
            cells = [f"{value:.3f}" for value in figures]
            rows.append([experiment.title, f"{first:.3f} → {last:.3f}", *cells])
    proxy = "proxy, first → last ten iterations"
    return [
        "## What a penalty is for: training on a proxy",
        "The reward is `soft_shapes`, a verifier that can be fooled; the measure is the strict "
        "one. The learning rate of the image expert is 3e-4 and does not fall.",
        markdown_table(["penalty", proxy, "strict accuracy: best", "last", "crispness"], rows),
        "![Proxy and strict accuracy over iterations](tables_hacking.png)",
    ]


def _reward_at_both_ends(run: Run) -> tuple[float, float]:
    """The mean reward of the first and of the last ten iterations."""
    reward = metric_values(read_metrics(Path(run["folder"])), "reward")
    # A run of under twenty iterations has ends that overlap; at least 1, for a run without rows.
    count = max(min(10, len(reward)), 1)
    return sum(reward[:count]) / count, sum(reward[-count:]) / count


def _thought_reward_part(found: Results, pairs: Sequence[tuple[str, str]]) -> list[str]:
    parts = [
        "## A reward for the thought",
        "It is paid before the image is drawn, and only the thought learns from it "
        "(`algorithm.advantage=reward_to_go`), or there is none. *correct_despite_plan*: the share "
        "of episodes whose image is right after a thought that is not.",
        "![Held-out accuracy with and without a reward for the thought](tables_process.png)",
    ]
    names = ("greedy", "thought", "correct_despite_plan")
    for pair in pairs:
        curves = {key: [curve_by_iteration(run) for run in found[key]] for key in pair}
        iterations = shared_iterations(curve for key in pair for curve in curves[key])
        rows = []
        for key in pair:
            cells = [TITLES[key], str(len(curves[key]))]
            for iteration in iterations:
                values = [curve[iteration] for curve in curves[key]]
                cells.append(mean_and_half_range(values))
            measures = [_thought_measures(run["measures"]) for run in found[key]]
            for name in names:
                cells.append(mean_and_half_range([entry[name] for entry in measures]))
            rows.append(cells)
        accuracies = [f"accuracy at {iteration}" for iteration in iterations]
        parts.append(markdown_table(["trained", "seeds", *accuracies, *names], rows))
    return parts


def _thought_measures(measures: dict[str, Any]) -> dict[str, float | None]:
    """Measures that say how good the thoughts are, of a scenario of one image or of edits."""
    # Only a scenario of several images has parts.
    if "parts" not in measures:
        return measures
    parts = measures["parts"]
    return {
        "greedy": measures["greedy"],
        "thought": parts["edit/thought"],
        "correct_despite_plan": parts["edit/correct_despite_plan"],
    }


def _changes_part(found: Results, title: str, experiments: Sequence[Experiment]) -> list[str]:
    names = ("accuracy", "greedy", "crispness")
    rows = []
    for experiment in experiments:
        change = experiment.title
        if experiment.study == "table":
            change = "none"
        seeds = str(len(found[experiment.key]))
        rows.append([change, seeds, *_measured(found, experiment, names)])
    return [f"## {title}", markdown_table(["change to UniGRPO", "seeds", *names], rows)]


def _accuracy(found: Results, experiment: Experiment) -> float:
    runs = found[experiment.key]
    return sum(run["measures"]["accuracy"] for run in runs) / len(runs)


def _with_curve(found: Results, experiments: Sequence[Experiment]) -> list[Experiment]:
    """The experiments that were trained, so that there is a curve to draw."""
    trained = []
    for experiment in experiments:
        if any(len(run["curve"]) > 1 for run in found[experiment.key]):
            trained.append(experiment)
    return trained


def _seconds(run: Run) -> str:
    path = Path(run["folder"]) / SUMMARY
    if not path.is_file():
        return ""
    return f", {json.loads(path.read_text())['seconds_training']:.0f} s"

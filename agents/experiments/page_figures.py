"""The figures of the page of `unigrpo tables`."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from agents.experiments.paper_tables import EXPERIMENTS, STRIP, Experiment
from agents.reporting.contact_sheet import CORRECT_COLOUR, WRONG_COLOUR
from agents.reporting.html_report import running_mean
from agents.reporting.loggers import metric_values, read_metrics
from agents.storage import read_tensors
from unigrpo_env.rendering import BACKGROUND, FAINT, TEXT, enlarge

Run = dict[str, Any]
"""One entry of `agents.experiments.runner.results`: what was measured of a run."""

Results = dict[str, list[Run]]
"""The runs of each experiment by its key, one for each seed."""


def curve_by_iteration(run: Run) -> dict[int, float]:
    """Read the held-out accuracy of a run by iteration.

    Args:
        run: the run, whose curve is a list of [iteration, accuracy], as JSON has it.
    """
    return dict(map(tuple, run["curve"]))


def shared_iterations(curves: Iterable[dict[int, float]]) -> list[int]:
    """List the iterations that all curves have, in order.

    Args:
        curves: the curves of some runs, at least one; see `curve_by_iteration`.
    """
    # Runs of another length were measured at other iterations.
    return sorted(set.intersection(*(set(curve) for curve in curves)))


TITLES = {experiment.key: experiment.title for experiment in EXPERIMENTS}

# Sizes in pixels of the sheet of images: the column of titles, the space between images, and the
# row of prompts.
TITLE_WIDTH = 190
GAP = 12
HEAD_HEIGHT = 48


def draw_curves(found: Results, experiments: Sequence[Experiment], path: Path) -> None:
    """Draw the held-out accuracy of each method over iterations.

    Args:
        found: the runs.
        experiments: the methods.
        path: the path of the PNG file.
    """

    def _fill(axes: Any) -> None:
        left, right = axes
        left.set_title("thinking")
        right.set_title("without thinking")
        for experiment in experiments:
            axis = left if experiment.thinks else right
            _draw_band(axis, found[experiment.key], experiment.title)
        for axis in axes:
            axis.set(ylim=(0, 1), ylabel="held-out accuracy")
            # A legend without an entry would print a warning.
            if axis.lines:
                axis.legend(fontsize=7, frameon=False)

    _draw_figure(2, path, _fill)


def draw_thought_reward(found: Results, pairs: Sequence[tuple[str, str]], path: Path) -> None:
    """Draw the held-out accuracy with and without a reward for the thought.

    Args:
        found: the runs.
        pairs: the keys of the experiments without and with it, a panel for each pair.
        path: the path of the PNG file.
    """

    def _fill(axes: Any) -> None:
        for axis, pair in zip(axes, pairs, strict=True):
            for key in pair:
                _draw_band(axis, found[key], TITLES[key])
            axis.set(ylim=(0, 1), ylabel="held-out accuracy")
            axis.legend(fontsize=8, frameon=False)

    _draw_figure(len(pairs), path, _fill)


def draw_hacking(found: Results, experiments: Sequence[Experiment], path: Path) -> None:
    """Draw the reward that is trained on beside the accuracy that is meant.

    Args:
        found: the runs; the first of each experiment is drawn.
        experiments: the experiments of the study.
        path: the path of the PNG file.
    """

    def _fill(axes: Any) -> None:
        for experiment in experiments:
            run = found[experiment.key][0]
            reward = metric_values(read_metrics(Path(run["folder"])), "reward")
            iterations = range(1, len(reward) + 1)
            axes[0].plot(iterations, running_mean(reward, 10), label=experiment.title)
            # A run that diverged early may have no curve.
            if run["curve"]:
                curve = zip(*run["curve"], strict=True)
                axes[1].plot(*curve, marker="o", markersize=3, label=experiment.title)
        axes[0].set(title="proxy reward (trained on, running mean)")
        axes[1].set(title="strict accuracy (held out)", ylim=(0, 1))
        axes[1].legend(fontsize=8, frameon=False)

    _draw_figure(2, path, _fill)


def _draw_figure(count: int, path: Path, fill: Callable[[Any], None]) -> None:
    """Draw a row of `count` panels, which `fill` fills, and save it."""
    from matplotlib.figure import Figure

    # A figure without pyplot leaves matplotlib's global state and backend as they are.
    figure = Figure(figsize=(5 * count, 3.6), layout="constrained")
    axes = figure.subplots(1, count, squeeze=False)[0]
    fill(axes)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xlabel("iteration")
    # Without the name of the software the file depends on the numbers alone.
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _draw_band(axis: Any, runs: Sequence[Run], title: str) -> None:
    """Draw the held-out accuracy over iterations: the mean over seeds and their range."""
    curves = [curve_by_iteration(run) for run in runs]
    iterations = shared_iterations(curves)
    means = []
    lows = []
    highs = []
    for iteration in iterations:
        values = [curve[iteration] for curve in curves]
        means.append(sum(values) / len(values))
        lows.append(min(values))
        highs.append(max(values))
    # The titles are Markdown; a panel says already whether its methods think.
    label = title.replace("*", "").replace(", thinking", "")
    (line,) = axis.plot(iterations, means, marker="o", markersize=3, label=label)
    axis.fill_between(iterations, lows, highs, color=line.get_color(), alpha=0.15, linewidth=0)


def draw_strips(
    found: Results, experiments: Sequence[Experiment], path: Path, side: int = 96
) -> None:
    """Draw what each method drew for the same prompts and seeds.

    A green frame means that every requirement is met.

    Args:
        found: the runs; the first of each experiment is drawn.
        experiments: the methods, a row for each.
        path: the path of the PNG file.
        side: the longer side of each image in pixels.
    """
    prompts: list[str] = []
    if experiments:
        prompts = found[experiments[0].key][0]["prompts"]
    width = TITLE_WIDTH + len(prompts) * (side + GAP)
    height = HEAD_HEIGHT + len(experiments) * (side + GAP)
    sheet = Image.new("RGB", (width, height), BACKGROUND)
    for column, prompt in enumerate(prompts):
        left = TITLE_WIDTH + column * (side + GAP)
        _write(sheet, textwrap.wrap(prompt, 18)[:3], left, 5, 13, FAINT, 10)
    for row, experiment in enumerate(experiments):
        top = HEAD_HEIGHT + row * (side + GAP)
        title = experiment.title.replace("*", "")
        if experiment.study != "table":
            title = f"on the proxy: {experiment.title}"
        _write(sheet, textwrap.wrap(title, 26), 8, top + side // 2 - 14, 15, TEXT, 12)
        # images: [n, 3, height, width] float32; reward: [n] float32.
        tensors = read_tensors(Path(found[experiment.key][0]["folder"]) / STRIP)
        _paste_row(sheet, tensors, top, side)
    sheet.save(path, optimize=True)


def _paste_row(sheet: Image.Image, tensors: dict[str, Tensor], top: int, side: int) -> None:
    """Paste the images of one run, each on a frame of the colour of its reward."""
    drawing = ImageDraw.Draw(sheet)
    rewards = tensors["reward"].tolist()
    for column, (image, reward) in enumerate(zip(tensors["images"], rewards, strict=True)):
        left = TITLE_WIDTH + column * (side + GAP)
        colour = CORRECT_COLOUR if reward >= 1 else WRONG_COLOUR
        drawing.rectangle((left - 3, top - 3, left + side + 2, top + side + 2), fill=colour)
        sheet.paste(enlarge(image, side), (left, top))


def _write(
    sheet: Image.Image,
    lines: Sequence[str],
    left: int,
    top: int,
    line_height: int,
    colour: tuple[int, int, int],
    size: int,
) -> None:
    """Write lines of text with their upper left corner at (left, top)."""
    drawing = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size)
    for number, line in enumerate(lines):
        drawing.text((left, top + line_height * number), line, fill=colour, font=font)

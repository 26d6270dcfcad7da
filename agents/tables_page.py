"""The page of `unigrpo tables`: Markdown and its pictures."""

from __future__ import annotations

import json
import os
import platform
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import torch
from matplotlib import pyplot
from PIL import Image, ImageDraw, ImageFont

from agents.logs import read_metrics
from agents.models.files import read_tensors
from agents.report import FAINT, INK, PAPER, RIGHT, WRONG
from agents.run import SUMMARY
from agents.tables import ROWS, STRIP, Plan, Row, jobs
from unigrpo_env.rendering import enlarge
from unigrpo_env.shapes_world import PROMPT_KINDS

Results = dict[str, list[dict[str, Any]]]
TITLES = {row.key: row.title for row in ROWS}
PAID = (("unigrpo", "process_reward"), ("edit", "edit_process"))
"""Rows that differ in one thing: whether a thought is paid for itself."""
MEANINGS = {
    "accuracy": "share of held-out prompts whose picture meets every requirement, words sampled at temperature 1",
    "greedy": "the same with greedy words",
    "graded": "share of the requirements met, averaged over prompts: the analogue of the paper's TA",
    "thought": "share of thoughts whose layout would meet every requirement, whatever was drawn",
    "crispness": "1 less the mean distance of a cell to the nearest clean one, in units of the verifier's tolerance; no reward looks at it",
    "foreign": "accuracy on kinds of prompt that training has none of: three objects, two counts, sums of three numbers",
}


def spread(values: Sequence[float | None]) -> str:
    """Mean, and the half range over seeds.

    >>> spread([0.25, 0.75]), spread([0.5]), spread([None])
    ('0.500 ± 0.250', '0.500', '')
    """
    known = [value for value in values if value is not None]
    if not known:
        return ""
    mean = sum(known) / len(known)
    return f"{mean:.3f}" + (f" ± {(max(known) - min(known)) / 2:.3f}" if len(known) > 1 else "")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows))


def write_page(folder: Path, found: Results, plan: Plan) -> Path:
    """Write `tables.md` and its pictures into `folder`; rows without a result are left out.

    Args:
        folder: where the page goes.
        found: `agents.tables.results`.
        plan: what was run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    studies = {study: [row for row in ROWS if row.study == study and row.key in found] for study in {row.study for row in ROWS}}
    methods = sorted(studies["table"], key=lambda row: (row.thinks, _accuracy(found, row)))
    base = [row for row in methods if row.key == "unigrpo"]
    parts = ["# The paper's tables on a laptop", _set_up(plan), *_diverged(found), *_methods(found, methods)]
    if studies["guidance"]:
        parts += _guidance(found, base + studies["guidance"])
    if studies["penalty"]:
        _draw_hacking(found, studies["penalty"], folder / "tables_hacking.png")
        parts += _penalties(found, studies["penalty"])
    paid = [pair for pair in PAID if all(row in found for row in pair)]
    if paid:
        _draw_paid(found, paid, folder / "tables_process.png")
        parts += _process(found, paid)
    if studies["rounds"]:
        parts += _rounds(found, studies["rounds"])
    for study, title in (("kernels", "Stochastic steps, windows, ratio"), ("text", "Words and batches")):
        if studies[study]:
            parts += _changes(found, title, base + studies[study])
    _draw_curves(found, [row for row in methods if any(len(run["curve"]) > 1 for run in found[row.key])], folder / "tables_curves.png")
    _draw_strips(found, methods + studies["penalty"], folder / "tables_strips.png")
    path = folder / "tables.md"
    path.write_text("\n\n".join(parts) + "\n")
    return path


def _measured(found: Results, row: Row, names: Iterable[str]) -> list[str]:
    """A row's measures over its seeds, as cells."""
    return [spread([run["measures"][name] for run in found[row.key]]) for name in names]


def _set_up(plan: Plan) -> str:
    lessons = next(row.lessons for row in ROWS if row.lessons) * plan.iterations // 120
    return (
        f"`unigrpo tables`: each row is a config of one trainer, {plan.iterations} iterations of {_episodes(plan)} episodes (or lessons) unless it says more, {plan.prompts} held-out prompts. "
        f"Rows without thinking start from weights that were taught to draw without a thought, in {lessons} supervised updates of 64 more; all others from the shipped ones. "
        f"Written on {platform.machine()}, {os.cpu_count()} cores, PyTorch {torch.__version__}, one thread a run, float32. "
        "The learning rates, batch and clip ranges are those of the config (the proxy study: see there); no row of one picture was swept. One picture an episode unless it says more, ten denoising steps. "
        f"± is half the range over seeds; the standard error of one accuracy is at most {0.5 / plan.prompts**0.5:.2f}."
    )


def _methods(found: Results, rows: Sequence[Row]) -> list[str]:
    kinds = [
        [row.title, *(spread([run["measures"]["by_kind"].get(kind) for run in found[row.key]]) for kind in PROMPT_KINDS)] for row in rows
    ]
    return [
        "## Methods",
        "Beside the paper's figures (TA and GenEval, on BAGEL at 1024 x 1024): what carries over is the order, not the numbers.",
        table(
            ["method", "seeds", *MEANINGS, "paper: TA", "paper: GenEval"],
            [[row.title, str(len(found[row.key])), *_measured(found, row, MEANINGS), *_paper(row)] for row in rows],
        ),
        "\n".join(f"* *{name}*: {meaning}." for name, meaning in MEANINGS.items()),
        *_order(found),
        "![Held-out accuracy over iterations](tables_curves.png)",
        "![The same prompts and seeds by method](tables_strips.png)",
        "## By kind of prompt",
        table(["method", *PROMPT_KINDS], kinds),
    ]


def _diverged(found: Results) -> list[str]:
    runs = [(TITLES[key], seed, run["diverged"]) for key, runs in found.items() for seed, run in enumerate(runs)]
    return [
        f"{title}, seed {seed}, diverged after {end['iteration']} iterations: what is shown of it is of the weights it had then."
        for title, seed, end in runs
        if end
    ]


def _guidance(found: Results, rows: Sequence[Row]) -> list[str]:
    titles = {"table": "without guidance (UniGRPO)"}
    cells = [[titles.get(row.study, row.title), *_measured(found, row, ("accuracy", "guided"))] for row in rows]
    return ["## Guidance in training, and at evaluation", table(["trained", "evaluated without", "evaluated at scale 2"], cells)]


def _penalties(found: Results, rows: Sequence[Row]) -> list[str]:
    def cells(row: Row, run: dict[str, Any]) -> list[str]:
        best = max(value for _, value in run["curve"] or [(0, 0.0)])
        figures = (best, run["measures"]["accuracy"], run["measures"]["crispness"])
        return [row.title, " → ".join(f"{value:.3f}" for value in _ends(run)), *(f"{value:.3f}" for value in figures)]

    return [
        "## What a penalty is for: training on a proxy",
        "The reward is `soft_shapes`, a verifier that can be fooled; the measure is the strict one. Image learning rate 3e-4, not falling.",
        table(
            ["penalty", "proxy, first → last ten iterations", "strict accuracy: best", "last", "crispness"],
            [cells(row, run) for row in rows for run in found[row.key]],
        ),
        "![Proxy and strict accuracy over iterations](tables_hacking.png)",
    ]


def _process(found: Results, pairs: Sequence[tuple[str, str]]) -> list[str]:
    names = ("greedy", "thought", "lucky")

    def cells(key: str, marks: Sequence[int]) -> list[str]:
        curves = [dict(map(tuple, run["curve"])) for run in found[key]]
        thoughts = [_thoughts(run["measures"]) for run in found[key]]
        accuracy = [spread([curve[at] for curve in curves]) for at in marks]
        return [TITLES[key], str(len(curves)), *accuracy, *(spread([measures[name] for measures in thoughts]) for name in names)]

    parts = [
        "## A reward for the thought",
        "Paid before the picture is drawn, and learnt from by the thought alone (`algorithm.credit=onward`), or not. *lucky*: the share of episodes whose picture is right after a thought that is not.",
        "![Held-out accuracy with and without a reward for the thought](tables_process.png)",
    ]
    for pair in pairs:
        marks = sorted(set.intersection(*({at for at, _ in run["curve"]} for key in pair for run in found[key])))
        parts.append(table(["trained", "seeds", *(f"accuracy at {at}" for at in marks), *names], [cells(key, marks) for key in pair]))
    return parts


def _thoughts(measures: dict[str, Any]) -> dict[str, float | None]:
    """`greedy`, `thought` and `lucky` of a scenario of one picture, or of edits."""
    if "parts" not in measures:
        return measures
    return {"greedy": measures["greedy"], "thought": measures["parts"]["edit/thought"], "lucky": measures["parts"]["edit/lucky"]}


def _rounds(found: Results, rows: Sequence[Row]) -> list[str]:
    def before(run: dict[str, Any]) -> dict[str, Any]:
        return run["measures"].get("before", {"components": {}})  # a run that diverged has none

    def change(first: float | None, last: float) -> str:
        return "" if first is None else f"{first:.3f} → {last:.3f}"

    cells = [
        [
            row.title,
            str(seed),
            change(before(run).get("accuracy"), run["measures"]["accuracy"]),
            change(before(run).get("greedy_accuracy"), run["measures"]["greedy"]),
            f"{len(read_metrics(Path(run['folder'])))} iterations{_seconds(run)}",
        ]
        for row in rows
        for seed, run in enumerate(found[row.key])
    ]
    parts = [
        [
            row.title,
            name.split("/")[-1],
            *(change(before(run)["components"].get(name), run["measures"]["parts"][name]) for run in found[row.key]),
        ]
        for row in rows
        for name in found[row.key][0]["measures"]["parts"]
        if "/" in name  # the rest is the accuracy itself
    ]
    seeds = max(len(found[row.key]) for row in rows)
    parts = [line + [""] * (2 + seeds - len(line)) for line in parts]
    return [
        "## Several pictures",
        "Each scenario by its own verifier, from the shipped weights to the last ones; a story has three pictures, and so trains for fewer iterations; "
        "Edit's learning rate of words was tried out, the others' were not. "
        "What the parts of a reward mean stands in variants.md.",
        table(["scenario", "seed", "sampled words", "greedy words", "training"], cells),
        table(["scenario", "part, sampled words", *(f"seed {seed}" for seed in range(seeds))], parts),
    ]


def _changes(found: Results, title: str, rows: Sequence[Row]) -> list[str]:
    names = ("accuracy", "greedy", "crispness")
    cells = [["none" if row.study == "table" else row.title, str(len(found[row.key])), *_measured(found, row, names)] for row in rows]
    return [f"## {title}", table(["change to UniGRPO", "seeds", *names], cells)]


def _episodes(plan: Plan) -> int:
    trainer = jobs(Path(), plan)[0].config.trainer
    return trainer.groups * trainer.group_size


def _accuracy(found: Results, row: Row) -> float:
    runs = found[row.key]
    return sum(run["measures"]["accuracy"] for run in runs) / len(runs)


def _paper(row: Row) -> tuple[str, str]:
    if isinstance(row.paper, str):
        return row.paper, row.paper
    return (f"{row.paper[0]:.4f}", f"{row.paper[1]:.2f}") if row.paper else ("", "")


def _order(found: Results) -> list[str]:
    """Does UniGRPO's range over seeds lie above the others'?"""
    ranges = {
        key: [run["measures"]["accuracy"] for run in found[key]]
        for key in ("unigrpo", "text_grpo", "flow_grpo", "sft")
        if len(found.get(key, [])) > 1
    }
    best = ranges.pop("unigrpo", [])
    lines = [
        f"* UniGRPO [{min(best):.3f}, {max(best):.3f}] {'lies wholly above' if min(best) > max(other) else 'does not lie wholly above'} "
        f"{TITLES[key]} [{min(other):.3f}, {max(other):.3f}]."
        for key, other in ranges.items()
        if best
    ]
    return ["Ranges of accuracy over seeds:", "\n".join(lines)] if lines else []


def _seconds(run: dict[str, Any]) -> str:
    path = Path(run["folder"]) / SUMMARY
    return f", {json.loads(path.read_text())['seconds_training']:.0f} s" if path.is_file() else ""


def _ends(run: dict[str, Any]) -> tuple[float, float]:
    reward = [row["reward"] for row in read_metrics(Path(run["folder"]))]
    ten = min(10, len(reward))
    return sum(reward[:ten]) / max(ten, 1), sum(reward[-ten:]) / max(ten, 1)


def _figure(panels: int, path: Path, fill: Callable[[Any], None], height: float = 3.6) -> None:
    figure, axes = pyplot.subplots(1, panels, figsize=(5 * panels, height), layout="constrained", squeeze=False)
    fill(axes[0])
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xlabel("iteration")
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def _band(axis: Any, runs: Sequence[dict[str, Any]], title: str) -> None:
    """Held-out accuracy over iterations, mean over seeds with their range."""
    curves = [dict(map(tuple, run["curve"])) for run in runs]
    x = sorted(set.intersection(*(set(curve) for curve in curves)))
    y = [[curve[at] for curve in curves] for at in x]
    line = axis.plot(x, [sum(v) / len(v) for v in y], marker="o", markersize=3, label=title.replace("*", "").replace(", thinking", ""))
    axis.fill_between(x, [min(v) for v in y], [max(v) for v in y], color=line[0].get_color(), alpha=0.15, linewidth=0)


def _draw_paid(found: Results, pairs: Sequence[tuple[str, str]], path: Path) -> None:
    """Learning with and without a reward for the thought."""

    def fill(axes: Any) -> None:
        for axis, pair in zip(axes, pairs, strict=True):
            for key in pair:
                _band(axis, found[key], TITLES[key])
            axis.set(ylim=(0, 1), ylabel="held-out accuracy")
            axis.legend(fontsize=8, frameon=False)

    _figure(len(pairs), path, fill)


def _draw_curves(found: Results, rows: Sequence[Row], path: Path) -> None:
    """Held-out accuracy by method, mean over seeds with their range."""

    def fill(axes: Any) -> None:
        for axis, thinks in zip(axes, (True, False), strict=True):
            for row in (row for row in rows if row.thinks == thinks):
                _band(axis, found[row.key], row.title)
            axis.set(title="thinking" if thinks else "without thinking", ylim=(0, 1), ylabel="held-out accuracy")
            if axis.lines:
                axis.legend(fontsize=7, frameon=False)

    _figure(2, path, fill)


def _draw_hacking(found: Results, rows: Sequence[Row], path: Path) -> None:
    """The reward that is trained on, and the one that is meant."""

    def fill(axes: Any) -> None:
        for row in rows:
            run = found[row.key][0]
            reward = [step["reward"] for step in read_metrics(Path(run["folder"]))]
            smooth = [sum(reward[max(0, i - 9) : i + 1]) / min(i + 1, 10) for i in range(len(reward))]
            axes[0].plot(range(1, len(smooth) + 1), smooth, label=row.title)
            if run["curve"]:
                axes[1].plot(*zip(*run["curve"], strict=True), marker="o", markersize=3, label=row.title)
        axes[0].set(title="proxy reward (trained on, running mean)")
        axes[1].set(title="strict accuracy (held out)", ylim=(0, 1))
        axes[1].legend(fontsize=8, frameon=False)

    _figure(2, path, fill)


def _draw_strips(found: Results, rows: Sequence[Row], path: Path, side: int = 96) -> None:
    """What each method drew for the same prompts and seeds; green frames: every requirement met."""
    left, gap, head = 190, 12, 48
    prompts = found[rows[0].key][0]["prompts"] if rows else []
    sheet = Image.new("RGB", (left + len(prompts) * (side + gap), head + len(rows) * (side + gap)), PAPER)
    pen, small = ImageDraw.Draw(sheet), ImageFont.load_default(10)
    for column, prompt in enumerate(prompts):
        for line, text in enumerate(textwrap.wrap(prompt, 18)[:3]):
            pen.text((left + column * (side + gap), 5 + 13 * line), text, fill=FAINT, font=small)
    for number, row in enumerate(rows):
        top, run = head + number * (side + gap), found[row.key][0]
        title = row.title.replace("*", "") if row.study == "table" else f"on the proxy: {row.title}"
        for line, text in enumerate(textwrap.wrap(title, 26)):
            pen.text((8, top + side // 2 - 14 + 15 * line), text, fill=INK, font=ImageFont.load_default(12))
        shown = read_tensors(Path(run["folder"]) / STRIP)
        for column, (image, reward) in enumerate(zip(shown["images"], shown["reward"].tolist(), strict=True)):
            x = left + column * (side + gap)
            pen.rectangle((x - 3, top - 3, x + side + 2, top + side + 2), fill=RIGHT if reward >= 1 else WRONG)
            sheet.paste(enlarge(image, side), (x, top))
    sheet.save(path, optimize=True)

"""One self-contained page about a run: curves, episodes before and after, settings, figures."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from agents.evaluation.accuracy import Evaluation
from agents.reporting.contact_sheet import evenly_spaced, is_correct, panels
from agents.reporting.loggers import metric_values
from agents.reporting.metrics import METRICS
from unigrpo_env.rendering import enlarge

TEMPLATE = "report.html.j2"
CURVES = ("reward", "frac_groups_with_signal", "entropy", "thought_length", "loss_velocity")
"""The metrics that the page draws beside the held-out accuracy."""


@dataclass(frozen=True)
class RunRecord:
    """All that the page shows of a run.

    Attributes:
        description: what was run, by name: algorithm, scenario, reward.
        changed_settings: the default and the value of each setting that differs from its default.
        summary: the figures of the run, as in `summary.json`.
        rows: the rows of `metrics.csv`.
        curve: pairs of iteration and held-out accuracy.
        before: the episodes of the first weights.
        after: the episodes of the last weights, of the same prompts and seeds.
    """

    description: Mapping[str, str]
    changed_settings: Mapping[str, tuple[Any, Any]]
    summary: Mapping[str, Any]
    rows: Sequence[Mapping[str, float]]
    curve: Sequence[tuple[int, float]]
    before: Evaluation
    after: Evaluation

    @property
    def measure(self) -> str:
        """The word for the mean reward; see `measure_name`."""
        return measure_name(self.before, self.after)


def measure_name(*evaluations: Evaluation) -> str:
    """Choose the word for the mean reward.

    Args:
        evaluations: episodes with their rewards; unscored ones (NaN) are not looked at.

    Returns:
        "accuracy" if every reward is 0 or 1, else "reward".
    """
    reward = torch.cat([evaluation.reward for evaluation in evaluations])
    # [episodes] -> [scored episodes]
    known = reward[~reward.isnan()]
    if bool(((known == 0) | (known == 1)).all()):
        return "accuracy"
    return "reward"


def write_report(path: Path, record: RunRecord, samples: int) -> None:
    """Write the page.

    Args:
        path: the path of the HTML file.
        record: what the page shows.
        samples: the number of prompts whose images are shown, taken evenly from all.
    """
    from jinja2 import Environment, StrictUndefined

    # Read through importlib.resources, so that it is found in an installed package as well.
    source = (files("agents.reporting") / TEMPLATE).read_text(encoding="utf-8")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["words"] = lambda name: name.replace("_", " ")
    environment.filters["setting"] = _setting_text
    # With StrictUndefined a name that is missing is an error, not an empty text.
    page = environment.from_string(source).render(_page_values(record, samples))
    path.write_text(page + "\n", encoding="utf-8")


def _page_values(record: RunRecord, samples: int) -> dict[str, Any]:
    """Collect what the template names."""
    curves = ""
    if record.rows:
        curves = draw_curves(record.rows, record.curve, record.measure)
    figures = {}
    for name, value in record.summary.items():
        # The tables of figures by kind are shown elsewhere on the page.
        if isinstance(value, int | float):
            figures[name] = value
    # One row for each prompt: the first weights on the left, the last on the right.
    pairs = []
    for index in evenly_spaced(len(record.before.prompts), samples):
        sides = [_side(record.before, index), _side(record.after, index)]
        pairs.append({"prompt": record.before.prompts[index].text, "sides": sides})
    return {
        "measure": record.measure,
        "before": record.before.accuracy,
        "after": record.after.accuracy,
        "prompts": len(record.before.prompts),
        "seed": record.summary.get("seed"),
        "description": record.description,
        "curves": curves,
        "pairs": pairs,
        "kinds_before": record.before.by("kind"),
        "kinds_after": record.after.by("kind"),
        "settings": record.changed_settings,
        "figures": figures,
        "meanings": METRICS,
    }


def _side(evaluation: Evaluation, index: int) -> dict[str, Any]:
    """Collect what the template shows of one episode."""
    shown = []
    for panel in panels(evaluation, index):
        url = ""
        if panel.image is not None:
            url = data_url(panel.image)
        shown.append({"url": url, "panel": panel})
    return {"is_correct": is_correct(evaluation, index), "panels": shown}


def _setting_text(value: Any) -> str:
    if value is None or value == "":
        return "(empty)"
    return str(value)


def data_url(image: Tensor, side: int = 120) -> str:
    """Encode an image as the URL of a PNG.

    Args:
        image: `[3, height, width]` float32 in [0, 1].
        side: the longer side in pixels.
    """
    file = io.BytesIO()
    enlarge(image, side).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def draw_curves(
    rows: Sequence[Mapping[str, float]],
    curve: Sequence[tuple[int, float]],
    measure: str = "accuracy",
    names: Sequence[str] = CURVES,
    smooth: int = 10,
) -> str:
    """Draw the held-out measure and some metrics over iterations as inline SVG.

    Args:
        rows: the rows of `metrics.csv`.
        curve: pairs of iteration and held-out measure.
        measure: the name of that measure.
        names: the metrics to draw.
        smooth: the number of iterations in the running mean, which is the thick line.
    """
    from matplotlib.figure import Figure

    # A figure without pyplot leaves matplotlib's global state and backend as they are.
    figure = Figure(figsize=(11, 5), layout="constrained")
    # Two rows; the number of columns is rounded up. The first panel is the held-out measure.
    axes = figure.subplots(2, -(-(len(names) + 1) // 2))
    first, *others = axes.flat
    first.plot(*zip(*curve, strict=True), color="#2a9d4a", marker="o", markersize=4)
    first.set_title(f"held-out {measure}")
    # A reward may have any range.
    if measure == "accuracy":
        first.set_ylim(0, 1)
    iterations = metric_values(rows, "iteration")
    # Not strict: with an even number of names the last panel stays empty.
    for axis, name in zip(others, names, strict=False):
        values = metric_values(rows, name)
        axis.plot(iterations, values, color="#9ab", linewidth=0.8, alpha=0.6)
        axis.plot(iterations, running_mean(values, smooth), color="#246", linewidth=1.8)
        axis.set_title(name.replace("_", " "))
    for axis in axes.flat:
        axis.title.set_fontsize(10)
        axis.spines[["top", "right"]].set_visible(False)
    # Without a date the page depends on the run alone.
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    # Inline SVG starts at its own tag, after the XML declaration.
    text = file.getvalue()
    return text[text.index("<svg") :]


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """Average each value with the `width - 1` values before it, as far as there are so many.

    >>> running_mean([1.0, 3.0, 5.0], 2)
    [1.0, 2.0, 4.0]

    Args:
        values: the values in order.
        width: the number of values in each mean.
    """
    means = []
    for end in range(1, len(values) + 1):
        window = values[max(0, end - width) : end]
        means.append(sum(window) / len(window))
    return means

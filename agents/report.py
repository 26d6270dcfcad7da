"""One self-contained page about a run: curves, and what the model thought and drew, before beside after."""

from __future__ import annotations

import base64
import html
import io
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from agents.evaluation import Evaluation
from agents.trainer import METRICS
from unigrpo_env.rendering import enlarge

STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:1000px;margin:2rem auto;padding:0 1rem;color:#222;background:#fafaf8}
h1{font-size:1.6rem;margin-bottom:.2rem} h2{font-size:1.15rem;margin-top:2.2rem} .faint{color:#777} svg{max-width:100%;height:auto}
table{border-collapse:collapse} td,th{padding:.25rem .9rem .25rem 0;text-align:left} td.n{font-variant-numeric:tabular-nums}
.pair{display:grid;grid-template-columns:1fr 1fr;gap:1rem;padding:.9rem 0;border-top:1px solid #ddd} .side{display:flex;gap:.9rem}
.side img{width:120px;height:120px;flex:none;border:3px solid #ccc;border-radius:6px} .side.right img{border-color:#2a9d4a} .side.wrong img{border-color:#d05a3a}
.prompt{grid-column:1/-1;font-weight:600}
"""


def picture_data(image: Tensor, side: int = 120) -> str:
    """A picture `[3, height, width]` in [0, 1] as a data URL."""
    file = io.BytesIO()
    enlarge(image, side).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def curves(rows: Sequence[dict[str, float]], accuracy: Sequence[tuple[int, float]], names: Sequence[str], smooth: int = 10) -> str:
    """Held-out accuracy and metrics over iterations as one inline SVG; the strong line is a running mean."""
    figure, axes = pyplot.subplots(2, -(-(len(names) + 1) // 2), figsize=(11, 5), layout="constrained")
    axes.flat[0].plot(*zip(*accuracy, strict=True), color="#2a9d4a", marker="o", markersize=4)
    axes.flat[0].set(title="held-out accuracy", ylim=(0, 1))
    for axis, name in zip(axes.flat[1:], names, strict=False):
        x, y = [row["iteration"] for row in rows], [row[name] for row in rows]
        means = [sum(y[max(0, i - smooth + 1) : i + 1]) / min(i + 1, smooth) for i in range(len(y))]
        axis.plot(x, y, color="#9ab", linewidth=0.8, alpha=0.6)
        axis.plot(x, means, color="#246", linewidth=1.8)
        axis.set_title(name.replace("_", " "))
    for axis in axes.flat:
        axis.title.set_fontsize(10)
        axis.spines[["top", "right"]].set_visible(False)
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    return file.getvalue()[file.getvalue().index("<svg") :]


def _side(evaluation: Evaluation, index: int) -> str:
    right = float(evaluation.reward[index]) >= 1
    return (
        f'<div class="side {"right" if right else "wrong"}"><img alt="" src="{picture_data(evaluation.images[index])}">'
        f"<div>{html.escape(evaluation.texts[index]) or '<i>no thought</i>'}</div></div>"
    )


def write_report(
    path: Path,
    summary: dict[str, Any],
    rows: Sequence[dict[str, float]],
    accuracy: Sequence[tuple[int, float]],
    before: Evaluation,
    after: Evaluation,
    samples: int,
) -> None:
    """Write the page.

    Args:
        path: of the HTML file.
        summary: figures of the run.
        rows: of `metrics.csv`.
        accuracy: (iteration, held-out accuracy), as far as measured.
        before, after: the same prompts and seeds, played by the first and the last weights.
        samples: pairs of pictures to show, taken evenly from the prompts.
    """
    pairs = "".join(
        f'<div class="pair"><div class="prompt">{html.escape(before.prompts[i].text)}</div>{_side(before, i)}{_side(after, i)}</div>'
        for i in spread(len(before.prompts), samples)
    )
    kinds = before.by("kind")
    by_kind = "".join(
        f'<tr><td>{kind}</td><td class="n">{value:.2f}</td><td class="n">{after.by("kind")[kind]:.2f}</td></tr>'
        for kind, value in kinds.items()
    )
    figures = "".join(
        f"<tr><td>{name.replace('_', ' ')}</td><td class=n>{value:.4g}</td></tr>"
        for name, value in summary.items()
        if isinstance(value, int | float)
    )
    meanings = "".join(
        f"<tr><td>{name.replace('_', ' ')}</td><td class=faint>{html.escape(text)}</td></tr>" for name, text in METRICS.items()
    )
    shown = ["reward", "signal", "entropy", "thought_length", "loss_velocity"]
    path.write_text(
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>UniGRPO run</title><style>{STYLE}</style>'
        f"<h1>Held-out accuracy {before.accuracy:.3f} → {after.accuracy:.3f}</h1>"
        f'<div class="faint">{len(before.prompts)} unseen prompts, sampled text, seed {summary.get("seed")}</div>'
        f"<h2>Curves</h2>{curves(rows, accuracy, shown) if rows else ''}"
        f"<h2>Before and after: the same prompts, the same seeds</h2>{pairs}"
        + (f"<h2>By kind of prompt</h2><table><tr><th>kind<th>before<th>after</tr>{by_kind}</table>" if kinds else "")
        + f"<h2>Figures</h2><table>{figures}</table><h2>What the metrics mean</h2><table>{meanings}</table></html>\n"
    )


PAPER, INK, FAINT, RIGHT, WRONG = (250, 250, 248), (34, 34, 40), (120, 120, 130), (42, 157, 74), (208, 90, 58)
CAPTION = 92


def _cell(sheet: Image.Image, place: tuple[int, int], side: int, evaluation: Evaluation, index: int, *, judged: bool = False) -> None:
    """One picture with its prompt and thought beneath; `judged` frames it by its reward."""
    pen, (left, top) = ImageDraw.Draw(sheet), place
    if judged:
        colour = RIGHT if float(evaluation.reward[index]) >= 1 else WRONG
        pen.rectangle((left - 4, top - 4, left + side + 3, top + side + 3), fill=colour)
    sheet.paste(enlarge(evaluation.images[index], side), place)
    lines = [(line, INK) for line in textwrap.wrap(evaluation.prompts[index].text, 26)[:2]]
    lines += [(line, FAINT) for line in textwrap.wrap(evaluation.texts[index], 26)[:4]]
    for row, (line, ink) in enumerate(lines):
        pen.text((left, top + side + 6 + 14 * row), line, fill=ink, font=ImageFont.load_default(11))


def contact_sheet(evaluation: Evaluation, side: int = 144, columns: int = 4) -> Image.Image:
    """All pictures of an evaluation, prompt and thought beneath each."""
    rows = -(-len(evaluation.prompts) // columns)
    sheet = Image.new("RGB", (columns * (side + 16) + 16, rows * (side + CAPTION) + 16), PAPER)
    for index in range(len(evaluation.prompts)):
        place = (16 + index % columns * (side + 16), 16 + index // columns * (side + CAPTION))
        _cell(sheet, place, side, evaluation, index)
    return sheet


def before_and_after(before: Evaluation, after: Evaluation, columns: int = 5, side: int = 144) -> Image.Image:
    """The same prompts and seeds, before above after, framed green where the reward is 1; prompts taken evenly."""
    sheet = Image.new("RGB", (columns * (side + 16) + 16, 2 * (side + CAPTION) + 16), PAPER)
    for column, index in enumerate(spread(len(before.prompts), columns)):
        for row, evaluation in enumerate((before, after)):
            _cell(sheet, (16 + column * (side + 16), 16 + row * (side + CAPTION)), side, evaluation, index, judged=True)
    return sheet


def spread(count: int, picks: int) -> list[int]:
    """Up to `picks` indices below `count`, an odd number apart, so that kinds of prompt that come in turn all show.

    >>> spread(10, 3)
    [0, 3, 6]
    >>> spread(256, 4)
    [0, 63, 126, 189]
    """
    step = max(1, (count // max(picks, 1) - 1) | 1)
    return list(range(0, count, step))[:picks]

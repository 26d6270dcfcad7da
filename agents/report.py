"""One self-contained page about a run: curves, and what the model thought and drew, before beside after."""

from __future__ import annotations

import base64
import html
import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
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
.prompt{grid-column:1/-1;font-weight:600} .strip{display:flex;flex-wrap:wrap;gap:.6rem;align-content:flex-start} .strip>div{width:124px;font-size:.8rem;line-height:1.3}
.strip img{width:118px;height:118px;border:3px solid #ccc;border-radius:6px;display:block} .strip.right img{border-color:#2a9d4a} .strip.wrong img{border-color:#d05a3a}
.strip .source img{border-color:#ccc} .user{font-weight:600}
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


@dataclass(frozen=True)
class Panel:
    """One step of an episode as people read it.

    Attributes:
        picture: `[3, height, width]`, or None for words that no picture follows.
        words: what the model said before it.
        user: what the user said before that.
        source: whether the picture came with the prompt.
    """

    picture: Tensor | None
    words: str = ""
    user: str = ""
    source: bool = False


def panels(evaluation: Evaluation, index: int) -> list[Panel]:
    """An episode from left to right: sources, then words and picture of each round."""
    prompt, pictures = evaluation.prompts[index], list(evaluation.pictures[index])
    turns = ["", *prompt.turns, *[""] * len(evaluation.rounds[index])]
    found = [Panel(source, source=True) for source in prompt.sources]
    for number, words in enumerate(evaluation.rounds[index]):
        found.append(Panel(pictures[number] if number < len(pictures) else None, words, turns[number]))
    return found


def _side(evaluation: Evaluation, index: int) -> str:
    verdict = "right" if _is_right(evaluation, index) else "wrong"
    shown = panels(evaluation, index)
    if len(shown) == 1:
        picture = picture_data(evaluation.images[index])
        return (
            f'<div class="side {verdict}"><img alt="" src="{picture}"><div>{html.escape(shown[0].words) or "<i>no thought</i>"}</div></div>'
        )
    cells = [
        f'<div class="{"source" if panel.source else ""}">'
        + (f'<div class="user">{html.escape(panel.user)}</div>' if panel.user else "")
        + (f'<img alt="" src="{picture_data(panel.picture)}">' if panel.picture is not None else "")
        + f"{html.escape(panel.words)}</div>"
        for panel in shown
    ]
    return f'<div class="strip {verdict}">{"".join(cells)}</div>'


def _is_right(evaluation: Evaluation, index: int) -> bool:
    """Whether the episode's own measure is met; prices that are taken off it do not count."""
    measure = next(iter(evaluation.components.values()), evaluation.reward)
    return float(measure[index]) >= 1


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


PAPER, INK, FAINT, RIGHT, WRONG, USER = (250, 250, 248), (34, 34, 40), (120, 120, 130), (42, 157, 74), (208, 90, 58), (40, 90, 170)
GAP, CAPTION, LINE, HEAD = 16, 106, 14, 22


def strip(evaluation: Evaluation, index: int, side: int = 144, *, judged: bool = False) -> Image.Image:
    """One episode as a row of pictures with the words beneath, the prompt under the first; `judged` frames what it drew by its reward."""
    shown = panels(evaluation, index)
    sheet = Image.new("RGB", (len(shown) * (side + GAP), side + CAPTION), PAPER)
    pen, wide = ImageDraw.Draw(sheet), side // 5 - 2
    for number, panel in enumerate(shown):
        left = GAP // 2 + number * (side + GAP)
        if panel.picture is not None:
            if judged and not panel.source:
                colour = RIGHT if _is_right(evaluation, index) else WRONG
                pen.rectangle((left - 4, 0, left + side + 3, side + 7), fill=colour)
            sheet.paste(enlarge(panel.picture, side), (left, 4))
        lines = [(line, INK) for line in textwrap.wrap(evaluation.prompts[index].text, wide)[:3] if number == 0]
        lines += [(line, USER) for line in textwrap.wrap(panel.user, wide)[:2]]
        lines += [(line, FAINT) for line in textwrap.wrap(panel.words, wide)[:4]]
        for row, (line, ink) in enumerate(lines[: (CAPTION - 10) // LINE]):
            pen.text((left, side + 10 + LINE * row), line, fill=ink, font=ImageFont.load_default(11))
    return sheet


def mosaic(strips: Sequence[Image.Image], columns: int) -> Image.Image:
    """Strips in rows of `columns`."""
    width, height = max(strip.width for strip in strips), max(strip.height for strip in strips)
    sheet = Image.new("RGB", (columns * width + GAP, -(-len(strips) // columns) * height + GAP), PAPER)
    for index, strip in enumerate(strips):
        sheet.paste(strip, (GAP // 2 + index % columns * width, GAP // 2 + index // columns * height))
    return sheet


def contact_sheet(evaluation: Evaluation, columns: int = 4) -> Image.Image:
    """All episodes of an evaluation; those of several pictures one below the other."""
    strips = [strip(evaluation, index) for index in range(len(evaluation.prompts))]
    return mosaic(strips, min(columns, len(strips)) if all(len(panels(evaluation, i)) == 1 for i in range(len(strips))) else 1)


def before_and_after(before: Evaluation, after: Evaluation, episodes: int = 5) -> Image.Image:
    """The same prompts and seeds, before above after (of several pictures: before beside after), framed green where the reward is met; prompts taken evenly."""
    chosen = spread(len(before.prompts), episodes)
    pairs = [[strip(evaluation, index, judged=True) for index in chosen] for evaluation in (before, after)]
    if all(len(panels(evaluation, index)) == 1 for evaluation in (before, after) for index in chosen):
        return mosaic([*pairs[0], *pairs[1]], len(chosen))
    body = mosaic([strip for pair in zip(*pairs, strict=True) for strip in pair], 2)
    sheet = Image.new("RGB", (body.width, body.height + HEAD), PAPER)
    sheet.paste(body, (0, HEAD))
    for title, left in (("before", GAP), ("after", GAP + (body.width - GAP) // 2)):
        ImageDraw.Draw(sheet).text((left, 6), title, fill=INK, font=ImageFont.load_default(14))
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

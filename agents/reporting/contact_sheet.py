"""Sheets of images: what a model wrote and drew for a list of prompts."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from agents.evaluation.accuracy import Evaluation
from unigrpo_env.rendering import BACKGROUND, FAINT, TEXT, enlarge

Colour = tuple[int, int, int]
CORRECT_COLOUR: Colour = (42, 157, 74)
WRONG_COLOUR: Colour = (208, 90, 58)
USER_COLOUR: Colour = (40, 90, 170)

# Sizes in pixels: space between panels, height of the text below an image, height of a line of
# text, height of the titles above a sheet.
GAP = 16
CAPTION_HEIGHT = 106
LINE_HEIGHT = 14
TITLE_HEIGHT = 22


@dataclass(frozen=True)
class Panel:
    """One step of an episode as people read it.

    Attributes:
        image: `[3, height, width]` float32 in [0, 1], or None for a text that no image follows.
        text: what the model wrote before the image.
        user: what the user said before that text.
        is_source: whether the image came with the prompt.
    """

    image: Tensor | None
    text: str = ""
    user: str = ""
    is_source: bool = False


def panels(evaluation: Evaluation, index: int) -> list[Panel]:
    """List an episode from left to right: its sources, then text and image of each round.

    Args:
        evaluation: the episodes.
        index: the number of the episode.
    """
    prompt = evaluation.prompts[index]
    images = evaluation.all_images[index]
    found = [Panel(source, is_source=True) for source in prompt.sources]
    for number, text in enumerate(evaluation.thoughts[index]):
        # A text after the last image has none.
        image = None
        if number < len(images):
            image = images[number]
        # The user speaks after an image, so their first turn stands before the second text.
        user = ""
        if 0 < number <= len(prompt.turns):
            user = prompt.turns[number - 1]
        found.append(Panel(image, text, user))
    return found


def is_correct(evaluation: Evaluation, index: int) -> bool:
    """Tell whether the episode met the first term of its reward, which is then 1 or more.

    Args:
        evaluation: the episodes.
        index: the number of the episode.
    """
    # Further terms of a sum, such as a penalty, are left out. A reward may have no components.
    measure = evaluation.reward
    if evaluation.components:
        measure = next(iter(evaluation.components.values()))
    return float(measure[index]) >= 1


def strip(
    evaluation: Evaluation, index: int, side: int = 144, *, judged: bool = False
) -> Image.Image:
    """Draw one episode as a row of images, with the prompt and the texts below them.

    Args:
        evaluation: the episodes.
        index: the number of the episode.
        side: the longer side of each image in pixels.
        judged: whether to put the images that the model drew on a green or a red frame; see
            `is_correct`.
    """
    shown = panels(evaluation, index)
    sheet = Image.new("RGB", (len(shown) * (side + GAP), side + CAPTION_HEIGHT), BACKGROUND)
    frame = None
    if judged:
        frame = CORRECT_COLOUR if is_correct(evaluation, index) else WRONG_COLOUR
    for number, panel in enumerate(shown):
        left = GAP // 2 + number * (side + GAP)
        # The prompt is written once, below the first image.
        prompt = ""
        if number == 0:
            prompt = evaluation.prompts[index].text
        _draw_image(sheet, left, panel, side, frame)
        _draw_caption(sheet, left, panel, side, prompt)
    return sheet


def _draw_image(
    sheet: Image.Image, left: int, panel: Panel, side: int, frame: Colour | None
) -> None:
    if panel.image is None:
        return
    if frame is not None and not panel.is_source:
        # The image covers all but the edge of the rectangle.
        box = (left - 4, 0, left + side + 3, side + 7)
        ImageDraw.Draw(sheet).rectangle(box, fill=frame)
    sheet.paste(enlarge(panel.image, side), (left, 4))


def _draw_caption(sheet: Image.Image, left: int, panel: Panel, side: int, prompt: str) -> None:
    """Write up to three lines of the prompt, two of the user and four of the model."""
    # A letter of this font is about five pixels wide.
    width = side // 5 - 2
    lines: list[tuple[str, Colour]] = []
    for text, limit, colour in (
        (prompt, 3, TEXT),
        (panel.user, 2, USER_COLOUR),
        (panel.text, 4, FAINT),
    ):
        for line in textwrap.wrap(text, width)[:limit]:
            lines.append((line, colour))
    drawing = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(11)
    for number, (line, colour) in enumerate(lines[: (CAPTION_HEIGHT - 10) // LINE_HEIGHT]):
        drawing.text((left, side + 10 + LINE_HEIGHT * number), line, fill=colour, font=font)


def arrange(strips: Sequence[Image.Image], columns: int) -> Image.Image:
    """Put images into rows.

    Args:
        strips: the images; each gets as much space as the largest.
        columns: the number of images in a row.
    """
    width = max(image.width for image in strips)
    height = max(image.height for image in strips)
    # Rounded up: the last row may not be full.
    rows = -(-len(strips) // columns)
    sheet = Image.new("RGB", (columns * width + GAP, rows * height + GAP), BACKGROUND)
    for index, image in enumerate(strips):
        row, column = divmod(index, columns)
        sheet.paste(image, (GAP // 2 + column * width, GAP // 2 + row * height))
    return sheet


def contact_sheet(evaluation: Evaluation, columns: int = 4) -> Image.Image:
    """Draw all episodes of an evaluation on one sheet.

    Args:
        evaluation: the episodes.
        columns: episodes of one panel stand in rows of this length; those of several panels
            stand one below the other.
    """
    indices = range(len(evaluation.prompts))
    strips = [strip(evaluation, index) for index in indices]
    if _has_one_panel_each(evaluation, indices):
        return arrange(strips, min(columns, len(strips)))
    return arrange(strips, 1)


def before_and_after(before: Evaluation, after: Evaluation, episodes: int = 5) -> Image.Image:
    """Draw the same prompts and seeds with the first and the last weights.

    Episodes of one panel stand before above after, those of several panels before beside after.
    The frame is green where the reward is met; see `is_correct`.

    Args:
        before: the episodes of the first weights.
        after: the episodes of the last weights, of the same prompts and seeds.
        episodes: how many prompts to show, taken evenly from all.
    """
    chosen = evenly_spaced(len(before.prompts), episodes)
    first = []
    last = []
    for index in chosen:
        first.append(strip(before, index, judged=True))
        last.append(strip(after, index, judged=True))
    if _has_one_panel_each(before, chosen) and _has_one_panel_each(after, chosen):
        return arrange([*first, *last], len(chosen))
    # Two columns: each prompt has a row, before on the left and after on the right.
    pairs: list[Image.Image] = []
    for pair in zip(first, last, strict=True):
        pairs.extend(pair)
    body = arrange(pairs, 2)
    sheet = Image.new("RGB", (body.width, body.height + TITLE_HEIGHT), BACKGROUND)
    sheet.paste(body, (0, TITLE_HEIGHT))
    drawing = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(14)
    drawing.text((GAP, 6), "before", fill=TEXT, font=font)
    drawing.text((GAP + (body.width - GAP) // 2, 6), "after", fill=TEXT, font=font)
    return sheet


def _has_one_panel_each(evaluation: Evaluation, indices: Sequence[int]) -> bool:
    return all(len(panels(evaluation, index)) == 1 for index in indices)


def evenly_spaced(count: int, picks: int) -> list[int]:
    """List up to `picks` indices below `count` at an odd distance from each other.

    Kinds of prompt that come in turn all show when the distance is odd.

    >>> evenly_spaced(10, 3)
    [0, 3, 6]
    >>> evenly_spaced(256, 4)
    [0, 63, 126, 189]

    Args:
        count: the number of things to pick from.
        picks: how many of them to pick.
    """
    # `| 1` makes the distance odd; the 1 less keeps the last index below `count`.
    step = max(1, (count // max(picks, 1) - 1) | 1)
    return list(range(0, count, step))[:picks]

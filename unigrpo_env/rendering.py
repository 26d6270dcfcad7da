"""Frames for people: the image as it stands, beside the text."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from unigrpo_env.mdp.rules import Phase

if TYPE_CHECKING:
    from unigrpo_env.episodes import Episodes

SIDE = 240
"""Longer side of the image in a frame, in pixels."""

WORDS_WIDTH = 320
"""Width of the text in a frame, in pixels."""

MARGIN = 16
"""Pixels around both."""

TEXT = (34, 34, 40)
"""RGB of text, in 0 to 255 like the other colours."""

FAINT = (120, 120, 130)
"""RGB of what is less important."""

BACKGROUND = (250, 250, 248)
"""RGB of the ground."""

ACCENT = (205, 90, 40)
"""RGB of what should be seen first."""


def check_render_mode(mode: str | None) -> str | None:
    """Return the mode, if it is one that exists.

    Args:
        mode: `rgb_array`, or None for no frames.

    Raises:
        ValueError: another mode.
    """
    if mode not in (None, "rgb_array"):
        raise ValueError(f"expected render_mode 'rgb_array' or None, got {mode!r}")
    return mode


def to_pixels(image: Tensor) -> np.ndarray:
    """An image `[3, height, width]` in [0, 1] as `(height, width, 3)` uint8."""
    # Rounded to the nearest of 256 levels; a conversion alone would cut the fraction off.
    levels = (image.detach().cpu().float().clamp(0, 1) * 255).round()
    return levels.byte().permute(1, 2, 0).numpy()


def enlarge(image: Tensor, side: int) -> Image.Image:
    """An image at another size, with sharp pixels when it grows.

    Args:
        image: `[3, height, width]` in [0, 1].
        side: its longer side in pixels.
    """
    small = Image.fromarray(to_pixels(image))
    factor = side / max(small.size)
    # Large pixels should stay squares; a smaller image should be smooth.
    size = (round(small.width * factor), round(small.height * factor))
    if factor > 1:
        return small.resize(size, Image.Resampling.NEAREST)
    return small.resize(size, Image.Resampling.LANCZOS)


def render_frame(episodes: Episodes, row: int) -> np.ndarray:
    """Render one row as `(272, 608, 3)` uint8.

    It shows the image being drawn, else the last one drawn, else the last source, else an empty
    frame; and beside it the prompt, what the episode waits for, and what the model wrote.

    Args:
        episodes: N episodes.
        row: which of them.
    """
    size = (SIDE + WORDS_WIDTH + 3 * MARGIN, SIDE + 2 * MARGIN)
    frame = Image.new("RGB", size, BACKGROUND)
    pen = ImageDraw.Draw(frame)
    image = _image_to_show(episodes, row)
    if image is None:
        edge = MARGIN + SIDE - 1
        pen.rectangle((MARGIN, MARGIN, edge, edge), outline=FAINT)
    else:
        frame.paste(enlarge(image, SIDE), (MARGIN, MARGIN))
    # There is no prompt before the first reset.
    prompt = episodes.prompts[row]
    asked = ""
    if prompt is not None:
        asked = prompt.text
    y = _write(pen, MARGIN, asked, size=16, colour=TEXT, lines=3)
    y = _write(pen, y, _status(episodes, row), size=13, colour=ACCENT, lines=1)
    _write(pen, y, episodes.texts([row])[0], size=14, colour=FAINT, lines=8)
    return np.asarray(frame)


def _image_to_show(episodes: Episodes, row: int) -> Tensor | None:
    """The image of a row `[3, height, width]`, or None if there is none yet."""
    state = episodes.state
    # While an image is drawn, the frame shows it with the noise that is left in it.
    if state.phase[row] == Phase.IMAGE or state.images_drawn[row] > 0:
        # [1, L, C]
        latent = state.latent[row : row + 1]
        return episodes.variant.processor.decode_latents(latent)[0]
    prompt = episodes.prompts[row]
    if prompt is not None and prompt.sources:
        return prompt.sources[-1]
    return None


def _status(episodes: Episodes, row: int) -> str:
    """What a row waits for."""
    phase = Phase(int(episodes.state.phase[row]))
    if phase is Phase.TEXT:
        return "thinking"
    if phase is Phase.IMAGE:
        t = float(episodes.times[episodes.state.step[row]])
        return f"drawing   t = {t:.2f}"
    return "done"


def _write(
    pen: ImageDraw.ImageDraw,
    y: int,
    text: str,
    *,
    size: int,
    colour: tuple[int, int, int],
    lines: int,
) -> int:
    """Write a paragraph beside the image, at most so many lines; the result is where it ends."""
    font = ImageFont.load_default(size)
    left = SIDE + 2 * MARGIN
    # A letter is about half as wide as it is high.
    wrapped = textwrap.wrap(text, width=round(WORDS_WIDTH / (0.52 * size)))
    for line in wrapped[:lines]:
        pen.text((left, y), line, fill=colour, font=font)
        y += size + 6
    return y + 8

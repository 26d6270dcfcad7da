"""Frames for people: the picture as it stands beside the words."""

from __future__ import annotations

import textwrap
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from unigrpo_env.episodes import Episodes
from unigrpo_env.mdp import Phase

SIDE, WORDS_WIDTH, MARGIN = 240, 320, 16
INK, FAINT, PAPER, ACCENT = (34, 34, 40), (120, 120, 130), (250, 250, 248), (205, 90, 40)


def check_render_mode(mode: str | None) -> str | None:
    """The mode, if there is such a one.

    Raises:
        ValueError: there is not.
    """
    if mode not in (None, "rgb_array"):
        raise ValueError(f"expected render_mode 'rgb_array' or None, got {mode!r}")
    return mode


def to_pixels(image: Tensor) -> np.ndarray:
    """A picture `[3, height, width]` in [0, 1] as `(height, width, 3)` uint8."""
    return (image.detach().cpu().float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()


def read_picture(path: str | Path) -> Tensor:
    """A picture file as `[3, height, width]` float32 in [0, 1]; transparency on white.

    Raises:
        ValueError: no file, or none that is a whole picture.
    """
    try:
        picture: Image.Image = Image.open(path)
        if picture.mode.startswith("I"):  # 16 bits of grey, which PIL would cut off at 255
            picture = Image.fromarray((np.asarray(picture).clip(0, 65535) / 257).round().astype(np.uint8))
        picture = picture.convert("RGBA")
    except (OSError, SyntaxError) as error:  # PIL's own errors of a missing, foreign or broken file
        raise ValueError(f"expected a whole picture at {path}, got: {error}; check the path, or save the picture anew") from error
    white = Image.new("RGBA", picture.size, "white")
    pixels = np.asarray(Image.alpha_composite(white, picture).convert("RGB"))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255


def enlarge(image: Tensor, side: int) -> Image.Image:
    """A picture as a PIL image whose longer side has `side` pixels, in hard squares when it grows."""
    small = Image.fromarray(to_pixels(image))
    factor = side / max(small.size)
    return small.resize(
        (round(small.width * factor), round(small.height * factor)), Image.Resampling.NEAREST if factor > 1 else Image.Resampling.LANCZOS
    )


def render_frame(episodes: Episodes, row: int) -> np.ndarray:
    """One row as `(272, 608, 3)` uint8: the picture being drawn, else the last one drawn, else the last source, else an empty frame."""
    state, prompt = episodes.state, episodes.prompts[row]
    phase = Phase(int(state.phase[row]))
    frame = Image.new("RGB", (SIDE + WORDS_WIDTH + 3 * MARGIN, SIDE + 2 * MARGIN), PAPER)
    pen = ImageDraw.Draw(frame)
    if phase is Phase.IMAGE or state.images_drawn[row] > 0:
        frame.paste(enlarge(episodes.variant.decode(state.latent[row : row + 1])[0], SIDE), (MARGIN, MARGIN))
    elif prompt and prompt.sources:
        frame.paste(enlarge(prompt.sources[-1], SIDE), (MARGIN, MARGIN))
    else:
        pen.rectangle((MARGIN, MARGIN, MARGIN + SIDE - 1, MARGIN + SIDE - 1), outline=FAINT)
    left, y = SIDE + 2 * MARGIN, MARGIN
    t = float(episodes.times[state.step[row]])
    status = {Phase.TEXT: "thinking", Phase.IMAGE: f"drawing   t = {t:.2f}", Phase.DONE: "done"}[phase]
    for text, size, ink, lines in (
        (prompt.text if prompt else "", 16, INK, 3),
        (status, 13, ACCENT, 1),
        (episodes.texts([row])[0], 14, FAINT, 8),
    ):
        for line in textwrap.wrap(text, width=round(WORDS_WIDTH / (0.52 * size)))[:lines]:
            pen.text((left, y), line, fill=ink, font=ImageFont.load_default(size))
            y += size + 6
        y += 8
    return np.asarray(frame)

"""Classifier-free guidance, as BAGEL samples with it: one velocity pushed away from another, and its length tamed.

UniGRPO trains without it (scale 1: one forward a step) and may evaluate with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from agents.models.seam import Context, UnifiedModel
from unigrpo_env.episodes import Decoder

RENORMS = {
    "none": "the guided velocity as it is",
    "global": "each picture's velocity no longer than without guidance",
    "channel": "the same for each latent token",
    "text_channel": "for each latent token, before images guide",
}
"""How the guided velocity's length is bounded."""


@dataclass(frozen=True)
class Guidance:
    """u = v_T + text_scale (v - v_T), v_T the velocity that follows no words; then u = v_I + image_scale (u - v_I), v_I the one that follows no pictures.

    Attributes:
        text_scale: 1 or less: no guidance at all.
        image_scale: for rows that have read a picture; 1 or less: images do not guide.
        low, high: guidance acts at low < t <= high.
        renorm: one of `RENORMS`; u is scaled by |v| / |u|, but by no less than `renorm_min` and no more than 1.
        renorm_min: see there; 1 turns renormalisation off.
    """

    text_scale: float = 1.0
    image_scale: float = 1.0
    low: float = 0.0
    high: float = 1.0
    renorm: str = "global"
    renorm_min: float = 0.0

    def __post_init__(self) -> None:
        if self.renorm not in RENORMS:
            raise ValueError(f"expected renorm to be one of {', '.join(RENORMS)}, got {self.renorm!r}")
        if not 0 <= self.low < self.high <= 1:
            raise ValueError(f"expected 0 <= low < high <= 1, got {self.low} and {self.high}")

    def acts(self, t: Tensor) -> Tensor:
        """`[N]` bool, whether guidance acts at `t` `[N]`."""
        return (t > self.low) & (t <= self.high) & (self.text_scale > 1)

    def combine(
        self, velocity: Tensor, without_text: Tensor, t: Tensor, without_image: Tensor | None = None, looked: Tensor | None = None
    ) -> Tensor:
        """The guided velocity `[N, L, C]`; `velocity` itself where guidance does not act.

        Args:
            velocity, without_text, without_image: `[N, L, C]`, after all that was read, and after all but the text or the images.
            t: `[N]`.
            looked: `[N]` bool, the rows that images guide; all if left out.
        """
        guided = without_text + self.text_scale * (velocity - without_text)
        if self.renorm == "text_channel":
            guided = self._tame(guided, velocity, (-1,))
        if without_image is not None and self.image_scale > 1:
            both = without_image + self.image_scale * (guided - without_image)
            guided = both if looked is None else torch.where(looked[:, None, None], both, guided)
        if self.renorm in ("global", "channel"):
            guided = self._tame(guided, velocity, (-2, -1) if self.renorm == "global" else (-1,))
        return torch.where(self.acts(t)[:, None, None], guided, velocity)

    def _tame(self, guided: Tensor, velocity: Tensor, over: tuple[int, ...]) -> Tensor:
        length = torch.linalg.vector_norm(velocity, dim=over, keepdim=True)
        return guided * (length / (torch.linalg.vector_norm(guided, dim=over, keepdim=True) + 1e-8)).clamp(self.renorm_min, 1.0)


@dataclass(frozen=True)
class Branches:
    """A context in three: of all that was read, of the pictures alone, and of the words alone. A `Context`.

    Attributes:
        whole, wordless: contexts of N rows.
        sightless: likewise; None where images do not guide.
        looked: `[N]` bool, rows that have read a picture.
    """

    whole: Context
    wordless: Context
    sightless: Context | None
    looked: Tensor

    @property
    def batch_size(self) -> int:
        return self.whole.batch_size

    def _each(self, change: Callable[[Any], Any]) -> Branches:
        sightless = None if self.sightless is None else change(self.sightless)
        return Branches(change(self.whole), change(self.wordless), sightless, change(self.looked))

    def select(self, rows: Tensor) -> Branches:
        """See `Context`."""
        return self._each(lambda part: part[rows] if part is self.looked else part.select(rows))

    def repeat(self, times: int) -> Branches:
        """See `Context`."""
        return self._each(lambda part: part.repeat_interleave(times) if part is self.looked else part.repeat(times))

    def detach(self) -> Branches:
        """See `Context`."""
        return self._each(lambda part: part.detach())


class Guided(UnifiedModel[Branches]):
    """A model as it paints under guidance; its words are the model's own.

    Where guidance acts a step takes a second forward, and with an image scale above 1 a third. Pictures are read twice, with that scale words too.

    Args:
        model: any model of the same verbs. Its weights stay its own.
        guidance: with a text scale above 1.
    """

    def __init__(self, model: UnifiedModel[Any], guidance: Guidance) -> None:
        super().__init__()
        self.model, self.guidance = model, guidance

    def start(self, batch_size: int) -> Branches:
        """See `UnifiedModel`."""
        whole, wordless = self.model.start(batch_size), self.model.start(batch_size)
        sightless = self.model.start(batch_size) if self.guidance.image_scale > 1 else None
        return Branches(whole, wordless, sightless, torch.zeros(batch_size, dtype=torch.bool, device=next(self.parameters()).device))

    def read_text(self, context: Branches, ids: Tensor, mask: Tensor | None = None, *, last_only: bool = False) -> tuple[Tensor, Branches]:
        """See `UnifiedModel`."""
        logits, whole = self.model.read_text(context.whole, ids, mask, last_only=last_only)
        sightless = None if context.sightless is None else self.model.read_text(context.sightless, ids, mask, last_only=True)[1]
        return logits, replace(context, whole=whole, sightless=sightless)

    def read_image(
        self,
        context: Branches,
        latent: Tensor | None = None,
        pixels: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        learn: bool = True,
    ) -> Branches:
        """See `UnifiedModel`."""
        whole, wordless = (self.model.read_image(part, latent, pixels, mask, learn=learn) for part in (context.whole, context.wordless))
        return replace(context, whole=whole, wordless=wordless, looked=context.looked | (True if mask is None else mask))

    def look_with(self, decode: Decoder | None) -> None:
        """See `UnifiedModel`."""
        self.model.look_with(decode)

    def velocity(self, context: Branches, x: Tensor, t: Tensor) -> Tensor:
        """See `UnifiedModel`; guided, see `Guidance`."""
        velocity = self.model.velocity(context.whole, x, t)
        if not self.guidance.acts(t).any():
            return velocity
        without_image = None
        if context.sightless is not None and context.looked.any():
            without_image = self.model.velocity(context.sightless, x, t)
        return self.guidance.combine(velocity, self.model.velocity(context.wordless, x, t), t, without_image, context.looked)

    def parameter_lists(self) -> dict[str, list[nn.Parameter]]:
        """The model's."""
        return self.model.parameter_lists()


def guided(model: UnifiedModel[Any], guidance: Guidance | None) -> UnifiedModel[Any]:
    """The model under guidance; the model itself where there is none to speak of."""
    return model if guidance is None or guidance.text_scale <= 1 else Guided(model, guidance)

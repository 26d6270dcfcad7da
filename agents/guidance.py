"""Classifier-free guidance, as BAGEL samples with it: one velocity pushed away from another, and its length tamed.

UniGRPO trains without it (scale 1: one forward a step) and may evaluate with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from agents.models.seam import UnifiedModel

RENORMS = {
    "none": "the guided velocity as it is",
    "global": "each picture's velocity no longer than without guidance",
    "channel": "the same for each latent token",
    "text_channel": "for each latent token, before images guide",
}
"""How the guided velocity's length is bounded."""


@dataclass(frozen=True)
class Guidance:
    """u = v_T + text_scale (v - v_T), v_T the velocity that follows no text; then u = v_I + image_scale (u - v_I), v_I the one that follows no source image.

    Attributes:
        text_scale: 1 or less: no guidance at all.
        image_scale: counts where `combine` is given a velocity without images (`guided_velocity` gives none); 1 or less: images do not guide.
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

    def combine(self, velocity: Tensor, without_text: Tensor, t: Tensor, without_image: Tensor | None = None) -> Tensor:
        """The guided velocity `[N, L, C]`; `velocity` itself where guidance does not act.

        Args:
            velocity, without_text, without_image: `[N, L, C]`, after all that was read, and after all but the text or the images.
            t: `[N]`.
        """
        guided = without_text + self.text_scale * (velocity - without_text)
        if self.renorm == "text_channel":
            guided = self._tame(guided, velocity, (-1,))
        if without_image is not None and self.image_scale > 1:
            guided = without_image + self.image_scale * (guided - without_image)
        if self.renorm in ("global", "channel"):
            guided = self._tame(guided, velocity, (-2, -1) if self.renorm == "global" else (-1,))
        return torch.where(self.acts(t)[:, None, None], guided, velocity)

    def _tame(self, guided: Tensor, velocity: Tensor, over: tuple[int, ...]) -> Tensor:
        length = torch.linalg.vector_norm(velocity, dim=over, keepdim=True)
        return guided * (length / (torch.linalg.vector_norm(guided, dim=over, keepdim=True) + 1e-8)).clamp(self.renorm_min, 1.0)


def guided_velocity(model: UnifiedModel[Any], context: Any, x: Tensor, t: Tensor, guidance: Guidance | None) -> Tensor:
    """`model.velocity` `[N, L, C]` float32 at x `[N, L, C]`, t `[N]`, guided away from what the model would paint if it had read nothing, neither words nor sources.

    A second forward only where guidance acts.
    """
    velocity = model.velocity(context, x, t)
    if guidance is None or not guidance.acts(t).any():
        return velocity
    return guidance.combine(velocity, model.velocity(model.start(len(x)), x, t), t)

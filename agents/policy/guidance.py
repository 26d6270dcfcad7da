"""Classifier-free guidance, as BAGEL samples with it.

It extrapolates from the unconditional to the conditional velocity, then limits its norm. UniGRPO
trains without it (scale 1: one forward a step) and may evaluate with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from agents.models.base import Context, UnifiedModel
from agents.models.wrapping import WrappedModel
from unigrpo_env.mdp.rules import Role

RENORMS = {
    "none": "the guided velocity as it is",
    "global": "each image's velocity no longer than without guidance",
    "channel": "the same for each latent token",
    "text_channel": "for each latent token, before images guide",
}
"""How the norm of the guided velocity is limited."""


@dataclass(frozen=True)
class Guidance:
    """Where and how strongly guidance acts.

    With v_T the velocity without the user's text and the thoughts, and v_I the one without the
    images and the thoughts:

        u = v_T + text_scale (v - v_T),   then   u = v_I + image_scale (u - v_I).

    Attributes:
        text_scale: 1 or less: no guidance at all.
        image_scale: 1 or less: v_I does not guide. Above 1 it guides even where no image was read:
            away from what the words without the thought give.
        low: guidance acts at low < t <= high.
        high: see `low`.
        renorm: one of `RENORMS`; u is scaled by |v| / |u|, but by no less than `renorm_min` and no
            more than 1.
        renorm_min: see `renorm`; 1 turns the limit off.

    Raises:
        ValueError: an unknown `renorm`, or an empty interval.
    """

    text_scale: float = 1.0
    image_scale: float = 1.0
    low: float = 0.0
    high: float = 1.0
    renorm: str = "global"
    renorm_min: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what no sampler could do."""
        if self.renorm not in RENORMS:
            known = ", ".join(RENORMS)
            raise ValueError(f"expected renorm to be one of {known}, got {self.renorm!r}")
        if not 0 <= self.low < self.high <= 1:
            raise ValueError(f"expected 0 <= low < high <= 1, got {self.low} and {self.high}")

    def is_active(self, t: Tensor) -> Tensor:
        """Whether guidance acts at `t` `[N]`, `[N]` bool."""
        return (t > self.low) & (t <= self.high) & (self.text_scale > 1)

    def combine(
        self,
        velocity: Tensor,
        without_text: Tensor,
        t: Tensor,
        without_image: Tensor | None = None,
    ) -> Tensor:
        """The guided velocity `[N, L, C]`; `velocity` itself where guidance does not act.

        Args:
            velocity: `[N, L, C]`, after all that was read.
            without_text: `[N, L, C]`, after the system's text and the images.
            t: `[N]`.
            without_image: `[N, L, C]`, after the system's text and the user's; None where images do
                not guide.
        """
        # [N, L, C]: away from what the images alone would give.
        guided = without_text + self.text_scale * (velocity - without_text)
        if self.renorm == "text_channel":
            guided = self._limit_norm(guided, velocity, (-1,))
        if without_image is not None and self.image_scale > 1:
            guided = without_image + self.image_scale * (guided - without_image)
        if self.renorm == "global":
            guided = self._limit_norm(guided, velocity, (-2, -1))
        if self.renorm == "channel":
            guided = self._limit_norm(guided, velocity, (-1,))
        return torch.where(self.is_active(t)[:, None, None], guided, velocity)

    def _limit_norm(self, guided: Tensor, velocity: Tensor, dims: tuple[int, ...]) -> Tensor:
        norm = torch.linalg.vector_norm(velocity, dim=dims, keepdim=True)
        # One norm a sample (or a token): a norm over the batch would mix samples.
        guided_norm = torch.linalg.vector_norm(guided, dim=dims, keepdim=True)
        return guided * (norm / (guided_norm + 1e-8)).clamp(self.renorm_min, 1.0)


@dataclass(frozen=True)
class GuidedContext:
    """A context in three parts; itself a `Context`.

    Attributes:
        full: of all that was read.
        without_text: of the system's text and the images.
        without_image: of the system's text and the user's; None where it does not guide.
    """

    full: Context
    without_text: Context
    without_image: Context | None

    @property
    def batch_size(self) -> int:
        """Rows."""
        return self.full.batch_size

    def branches(self) -> list[Context]:
        """Its parts."""
        parts = [self.full, self.without_text]
        if self.without_image is not None:
            parts.append(self.without_image)
        return parts

    def _map(self, change: Callable[[Any], Any]) -> GuidedContext:
        without_image = self.without_image
        if without_image is not None:
            without_image = change(without_image)
        return GuidedContext(change(self.full), change(self.without_text), without_image)

    def select(self, rows: Tensor) -> GuidedContext:
        """See `Context`."""
        return self._map(lambda part: part.select(rows))

    def repeat_interleave(self, times: int) -> GuidedContext:
        """See `Context`."""
        return self._map(lambda part: part.repeat_interleave(times))

    def detach(self) -> GuidedContext:
        """See `Context`."""
        return self._map(lambda part: part.detach())


class GuidedModel(WrappedModel[GuidedContext]):
    """A model that draws under guidance; its text is the model's own.

    Where guidance acts a step takes a second forward, and with an image scale above 1 a third.
    Images and the system's text are read twice, and with that scale the user's text too.

    Args:
        model: any `UnifiedModel`. Its weights stay its own.
        guidance: with a text scale above 1.
    """

    def __init__(self, model: UnifiedModel[Any], guidance: Guidance) -> None:
        super().__init__()
        self.model = model
        self.guidance = guidance

    def empty_context(self, batch_size: int) -> GuidedContext:
        """See `UnifiedModel`."""
        without_image = None
        if self.guidance.image_scale > 1:
            without_image = self.model.empty_context(batch_size)
        return GuidedContext(
            self.model.empty_context(batch_size),
            self.model.empty_context(batch_size),
            without_image,
        )

    def append_text(
        self, context: GuidedContext, ids: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, GuidedContext]:
        """See `UnifiedModel`. The text counts as the user's; `append_hidden` takes roles."""
        logits, full = self.model.append_text(context.full, ids, mask)
        return logits, self._append_to_branches(replace(context, full=full), ids, mask, None)

    def append_hidden(
        self,
        context: GuidedContext,
        ids: Tensor,
        mask: Tensor | None = None,
        *,
        roles: Tensor | None = None,
    ) -> tuple[Tensor, GuidedContext]:
        """See `UnifiedModel`. Text of which no role is given counts as the user's."""
        hidden, full = self.model.append_hidden(context.full, ids, mask, roles=roles)
        return hidden, self._append_to_branches(replace(context, full=full), ids, mask, roles)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """The model's."""
        return self.model.compute_logits(hidden)

    def _append_to_branches(
        self, context: GuidedContext, ids: Tensor, mask: Tensor | None, roles: Tensor | None
    ) -> GuidedContext:
        if mask is None:
            mask = torch.ones_like(ids, dtype=torch.bool)
        if roles is None:
            roles = torch.full_like(ids, Role.USER)
        # The system's text is no condition that could be left out.
        without_text = self._append_part(context.without_text, ids, mask & (roles == Role.SYSTEM))
        without_image = context.without_image
        if without_image is not None:
            # A thought may tell what an image shows, so it goes with the images.
            without_image = self._append_part(without_image, ids, mask & (roles != Role.MODEL))
        return replace(context, without_text=without_text, without_image=without_image)

    def _append_part(self, context: Context, ids: Tensor, mask: Tensor) -> Context:
        if not mask.any():
            return context
        _, grown = self.model.append_hidden(context, ids, mask)
        return grown

    def append_image(
        self,
        context: GuidedContext,
        latent: Tensor | None = None,
        pixels: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        with_grad: bool = True,
    ) -> GuidedContext:
        """See `UnifiedModel`."""

        def _append(part: Context) -> Context:
            return self.model.append_image(part, latent, pixels, mask, with_grad=with_grad)

        return replace(
            context, full=_append(context.full), without_text=_append(context.without_text)
        )

    def reserve(self, context: GuidedContext, tokens: int, images: int) -> None:
        """See `UnifiedModel`. The thoughts, which are long, are read by one part alone."""
        self.model.reserve(context.full, tokens, images)

    def velocity_bytes(self, context: GuidedContext) -> int:
        """The model's for all branches: with gradient all of them are held at once."""
        return sum(self.model.velocity_bytes(part) for part in context.branches())

    def prepare_velocity(self, context: GuidedContext) -> None:
        """See `UnifiedModel`."""
        for part in context.branches():
            self.model.prepare_velocity(part)

    def predict_velocity(self, context: GuidedContext, x: Tensor, t: Tensor) -> Tensor:
        """See `UnifiedModel`; guided, see `Guidance`."""
        velocity = self.model.predict_velocity(context.full, x, t)
        # Outside the interval the further forwards are saved.
        if not self.guidance.is_active(t).any():
            return velocity
        without_image = None
        if context.without_image is not None:
            without_image = self.model.predict_velocity(context.without_image, x, t)
        without_text = self.model.predict_velocity(context.without_text, x, t)
        return self.guidance.combine(velocity, without_text, t, without_image)

    def parameters_by_expert(self) -> dict[str, list[nn.Parameter]]:
        """The model's."""
        return self.model.parameters_by_expert()


def guided(model: UnifiedModel[Any], guidance: Guidance | None) -> UnifiedModel[Any]:
    """The model under guidance; the model itself where there is none to speak of."""
    if guidance is None or guidance.text_scale <= 1:
        return model
    return GuidedModel(model, guidance)

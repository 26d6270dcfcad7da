"""Reading prompts: each different one once, however many episodes share it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from agents.models.base import Context, UnifiedModel
from agents.policy.segments import ImageSegment, image_contents, image_inputs, segments


@dataclass(frozen=True)
class Sources:
    """The images inside prompts, S of each at most.

    Attributes:
        latents: `[N, S, L, C]` float32.
        pixels: `[N, S, 3, height, width]` uint8; see `image_inputs`.
        positions: `[N, S]` int64, where in the prompt each stands; -1: nowhere.
    """

    latents: Tensor
    pixels: Tensor
    positions: Tensor

    @classmethod
    def of(
        cls, images: Tensor, pixels: Tensor, image_positions: Tensor, prompt_length: Tensor
    ) -> Sources:
        """Those of all stored images that stand inside the prompt.

        Args:
            images: `[N, M, L, C]`, sources first.
            pixels: `[N, M, 3, height, width]`.
            image_positions: `[N, M]`, where in the stream each stands; -1: nowhere.
            prompt_length: `[N]`.
        """
        if images.shape[1] == 0:
            return cls(images, pixels, image_positions)
        # Drawn images stand behind the prompt, sources inside it.
        within = (image_positions >= 0) & (image_positions < prompt_length[:, None])
        most = int(within.sum(1).max())
        positions = image_positions[:, :most].masked_fill(~within[:, :most], -1)
        return cls(images[:, :most], pixels[:, :most], positions)

    def contents(self) -> Tensor:
        """`[N, ...]`, equal for equal images."""
        return image_contents(self.latents, self.pixels).flatten(1)


def read_prompts(
    model: UnifiedModel[Any],
    ids: Tensor,
    lengths: Tensor,
    roles: Tensor | None = None,
    sources: Sources | None = None,
    *,
    with_grad: bool = True,
) -> tuple[Tensor, Context]:
    """Read each different prompt once, and hand its context to all rows that share it.

    Args:
        model: the model.
        ids: `[N, P]` int64, equal beyond `lengths` for equal prompts.
        lengths: `[N]` int64.
        roles: `[N, P]` int64, a `Role` each, which guidance needs.
        sources: the images in the prompts; none if left out.
        with_grad: whether gradients reach the reading of images.

    Returns:
        Logits after the prompt, `[N, 1, V]`, and a context of N rows.
    """
    key = ids
    positions = ids[:, :0]
    if sources is not None and sources.positions.shape[1]:
        positions = sources.positions
        # Which sources a prompt has is a part of what it is.
        _, which = torch.unique(sources.contents(), dim=0, return_inverse=True)
        key = torch.cat([which[:, None].to(ids.device), ids], 1)
    key = torch.cat([lengths[:, None], key], 1)
    # Length, sources and tokens together say which prompts are the same.
    unique, inverse = torch.unique(key, dim=0, return_inverse=True)
    # Some row of each group stands for all of it.
    rows = torch.arange(len(ids), device=ids.device)
    chosen = torch.zeros(len(unique), dtype=torch.int64, device=ids.device)
    chosen = chosen.scatter(0, inverse, rows)
    device = model.device
    context = model.empty_context(len(unique))
    logits: Tensor | None = None
    start = torch.zeros_like(chosen)
    if roles is not None:
        roles = roles[chosen]
    walk = segments(ids[chosen], start, lengths[chosen], positions[chosen], roles=roles)
    for part in walk:
        if isinstance(part, ImageSegment):
            assert sources is not None
            place = chosen, part.numbers
            latent, pixels = image_inputs(sources.latents[place], sources.pixels[place])
            context = model.append_image(
                context, latent, pixels, partial_mask(part.reads, device), with_grad=with_grad
            )
        elif part.ids.shape[1]:
            logits, context = append_and_predict(
                model, context, part.ids, part.mask, part.roles, logits
            )
    if logits is None:
        # No prompt has a word: nothing can be sampled from it, an image can only follow.
        logits = torch.zeros(len(unique), 1, model.vocab_size, device=device)
    inverse = inverse.to(device)
    return logits[inverse], context.select(inverse)


def append_and_predict(
    model: UnifiedModel[Any],
    context: Context,
    ids: Tensor,
    mask: Tensor,
    roles: Tensor | None,
    before: Tensor | None = None,
) -> tuple[Tensor, Context]:
    """Read a ragged text; the logits after each row's last token alone, and the grown context.

    Args:
        model: the model.
        context: what came before.
        ids: `[N, T]` int64, T at least 1.
        mask: `[N, T]` bool, which of them count; they stand first.
        roles: `[N, T]` int64, a `Role` each, which guidance needs.
        before: `[N, 1, V]`, the logits of rows that read nothing.

    Returns:
        `[N, 1, V]`, and the context.
    """
    device = model.device
    # A model need not be told of a mask that hides nothing.
    partial = partial_mask(mask, device)
    if roles is not None:
        roles = roles.to(device, non_blocking=True)
    hidden, context = model.append_hidden(
        context, ids.to(device, non_blocking=True), partial, roles=roles
    )
    # The head is the most expensive part of a long text: it runs on one position.
    if ids.shape[1] > 1:
        last = (mask.sum(1) - 1).clamp(min=0).to(device, non_blocking=True)
        rows = torch.arange(len(ids), device=device)
        hidden = hidden[rows, last].unsqueeze(1)
    logits = model.compute_logits(hidden)
    if before is None or partial is None:
        return logits, context
    return torch.where(partial[:, :1, None], logits, before), context


def partial_mask(mask: Tensor, device: torch.device) -> Tensor | None:
    """A mask on the device; None where it is True throughout."""
    if mask.all():
        return None
    return mask.to(device, non_blocking=True)

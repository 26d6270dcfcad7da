"""The seam between the library and a model: four verbs on one linear context.

Sampling and training call the same verbs, so a backbone that implements them can be stepped, trained and evaluated by everything in
`agents`. `Bagel` is the real one; `ToyModel` is the smallest.

Conventions said here once: flow time t = 1 is noise and t = 0 is the image; a velocity is v = dx/dt = noise - image; latents are tokens
`[rows, latent_tokens, latent_dim]` in float32.
"""

from __future__ import annotations

from typing import Protocol, Self

import torch
from torch import Tensor, nn


class Context(Protocol):
    """Everything a model has read, one row per episode; opaque to callers but for these."""

    @property
    def batch_size(self) -> int: ...

    def select(self, rows: Tensor) -> Self:
        """Rows by index `[M]` int64, repeats allowed: how the members of a group share a prompt that was read once."""

    def repeat(self, times: int) -> Self:
        """Each row `times` times in a row (row 0, row 0, ..., row 1, ...)."""

    def detach(self) -> Self:
        """The same context, cut from the autograd graph."""


class UnifiedModel(Protocol):
    """A model that writes and draws. Reading an image back in (a fifth method, `read_image`) comes with multi-round tasks."""

    def start(self, batch_size: int) -> Context:
        """An empty context of `batch_size` rows."""

    def read_text(self, context: Context, ids: Tensor, mask: Tensor | None = None, *, last_only: bool = False) -> tuple[Tensor, Context]:
        """Read text after `context`.

        Args:
            context: what came before.
            ids: `[N, T]` int64.
            mask: `[N, T]` bool, False where a position is padding; padding leaves no trace in the context.
            last_only: give the logits of each row's last unmasked position alone (a row without one: of position 0).

        Returns:
            Logits of the next token, `[N, T, V]` (`[N, 1, V]` with `last_only`), and the grown context. Without gradient a model may
            grow the given context in place; use the returned one.
        """

    def velocity(self, context: Context, x: Tensor, t: Tensor) -> Tensor:
        """v(x_t, t) of the image being drawn after `context`, which stays as it is: noise is never remembered.

        Args:
            context: the text so far, its last token having opened the image.
            x: `[N, L, C]` float32, the noisy latent.
            t: `[N]` float32 in [0, 1], 1 is noise.

        Returns:
            `[N, L, C]` float32.
        """

    def parameter_lists(self) -> dict[str, list[nn.Parameter]]:
        """The trainable parameters by expert, `{"text": [...], "image": [...]}`: what a learning rate or a freeze applies to."""


def device_of(model: nn.Module) -> torch.device:
    """The device of a model's first parameter."""
    return next(model.parameters()).device

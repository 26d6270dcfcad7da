"""A causal language model of transformers, read piece by piece."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from agents.models.recompute import run_again_in_backward
from agents.models.thinker_painter.cache import empty_cache


class Thinker:
    """The forward of a language model, in the two halves that are needed here.

    Args:
        model: a causal language model, or one that also sees images.

    Attributes:
        model: the same.
        vocab_size: entries of the logits.

    Raises:
        ValueError: its layers are no pure attention, its logits are made in another way than by its
            head alone, or it does not read ragged rows piece by piece.
    """

    model: Any

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        config = self.model.config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or [])
        name = type(model).__name__
        if kinds - {"full_attention", "sliding_attention"}:
            raise ValueError(
                f"expected a thinker of attention layers alone, got {name} with "
                f"{', '.join(sorted(kinds))}: a state would carry the padding of ragged rows "
                "along; choose a model without such layers"
            )
        head = self.model.get_output_embeddings()
        if head is None:
            raise ValueError(
                f"expected a thinker that can write, got {name} without a head; load it as a "
                "causal language model"
            )
        self._softcap = getattr(config, "final_logit_softcapping", None)
        self._window = getattr(config, "sliding_window", None)
        if kinds and "sliding_attention" not in kinds:
            self._window = None
        # A family of one kind of layers takes one mask for all of them.
        self._has_kinds = bool(kinds)
        self.vocab_size = int(head.weight.shape[0])
        self._check_reading(name)

    @torch.no_grad()
    def _check_reading(self, name: str) -> None:
        """Some families make their logits, or count their positions, in ways of their own."""
        ids = torch.arange(1, 4, device=self.model.device)[None]
        expected = self.model(input_ids=ids, use_cache=False).logits
        found = self.logits(self.model.base_model(input_ids=ids, use_cache=False)[0])
        if not self.are_close(found, expected):
            raise ValueError(
                f"expected a thinker whose logits are its head of its last states, got {name}, "
                "which does more; choose a model of another family"
            )
        # Again in two pieces with padding between them, as a row of a ragged batch is read.
        cache = empty_cache()
        valid = torch.tensor([[True, False, True, True]], device=ids.device)
        positions = torch.tensor([[0, 1, 1, 2]], device=ids.device)
        self.states(ids[:, [0, 0]], valid[:, :2], positions[:, :2], cache)
        later = self.states(ids[:, 1:], valid, positions[:, 2:], cache)
        if not self.are_close(self.logits(later), expected[:, 1:]):
            raise ValueError(
                f"expected a thinker that reads a text in pieces with padding between them as it "
                f"reads it at once, got {name}, which does not; choose a model of another family"
            )

    @staticmethod
    def are_close(found: Tensor, expected: Tensor) -> bool:
        """Whether logits differ by no more than rounding."""
        tolerance = 1e-4 if expected.dtype == torch.float32 else 5e-2
        distance = (found.float() - expected.float()).norm()
        return bool(distance <= tolerance * expected.float().norm())

    def whole_logits(self, ids: Tensor, image: dict[str, Tensor], is_image: Tensor) -> Tensor:
        """Logits `[N, T, V]` of the model's own whole forward, with its own positions.

        Args:
            ids: `[N, T]` int64.
            image: what the model takes beside them to see an image.
            is_image: `[N, T]` bool, the places of its patches.
        """
        try:
            kinds = is_image.int()
            return self.model(
                input_ids=ids, mm_token_type_ids=kinds, use_cache=False, **image
            ).logits
        finally:
            # It would move the positions of a later text.
            self.model.base_model.rope_deltas = None

    def states(
        self,
        ids: Tensor,
        valid: Tensor | None,
        positions: Tensor,
        cache: Cache,
        *,
        checkpointing: bool = False,
        **image: Any,
    ) -> Tensor:
        """Read `ids` after what the cache holds, which grows.

        Args:
            ids: `[N, T]` int64.
            valid: `[N, S + T]` bool, also of the slots before; None: all.
            positions: `[N, T]` int64, or `[3, N, T]` for a model that sees.
            cache: of N rows and S slots.
            checkpointing: compute each layer again in the backward pass. The cache must be
                repeatable then.
            **image: what else the model takes to see an image.

        Returns:
            `[N, T, H]`, the states before the head.
        """
        with _checkpointed(self.model, checkpointing and torch.is_grad_enabled()):
            output = self.model.base_model(
                input_ids=ids,
                attention_mask=self._mask(valid, ids.shape[1]),
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                **image,
            )
        return output[0]

    def _mask(self, valid: Tensor | None, length: int) -> Any:
        """The attention mask of the last `length` slots."""
        if valid is None:
            return None
        slots = valid.shape[1]
        if self._window is None or slots <= self._window:
            return valid.long()
        # Transformers counts slots in a window, and so would count padding.
        count = valid.cumsum(1)
        asking = count[:, -length:, None]
        slot = torch.arange(slots, device=valid.device)
        allowed = valid[:, None] & (slot <= slot[-length:, None])
        near = allowed & (asking - count[:, None] < self._window)
        masks = {"full_attention": allowed, "sliding_attention": near}
        dtype = self.model.dtype
        least = torch.finfo(dtype).min
        # Added to the scores, [N, 1, T, S]; a row of least values alone has no NaN.
        added = {
            kind: torch.zeros(mask.shape, dtype=dtype, device=mask.device)
            .masked_fill(~mask, least)
            .unsqueeze(1)
            for kind, mask in masks.items()
        }
        return added if self._has_kinds else added["sliding_attention"]

    def logits(self, states: Tensor) -> Tensor:
        """Logits `[..., V]` of states `[..., H]`."""
        logits = self.model.get_output_embeddings()(states)
        if self._softcap is not None:
            # Of Gemma 2.
            logits = torch.tanh(logits / self._softcap) * self._softcap
        return logits


@contextmanager
def _checkpointed(model: nn.Module, active: bool) -> Iterator[None]:
    """Let each layer keep no activations in a `with` block.

    Transformers has this too, but drops the cache then.
    """
    layers = [part for part in model.modules() if isinstance(part, GradientCheckpointingLayer)]
    if not active:
        layers = []
    try:
        for layer in layers:
            layer.__dict__["forward"] = partial(_run_again, layer.forward)
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def _run_again(forward: Any, *args: Any, **kwargs: Any) -> Any:
    return run_again_in_backward(partial(forward, **kwargs), *args)

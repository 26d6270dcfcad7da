"""Which weights stay in float32, whatever the others are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


def cast_parts(
    parts: Iterable[nn.Module], dtype: torch.dtype, kept: Iterable[nn.Parameter]
) -> None:
    """Convert floating weights in place.

    Weights that their own class keeps in float32 are left out, because its code counts on that.

    Args:
        parts: models of transformers or diffusers; they may share weights.
        dtype: of the weights.
        kept: further weights that are left as they are.
    """
    parts = list(parts)
    left = {id(weight) for weight in kept}
    for part in parts:
        left.update(id(weight) for weight in _kept_in_float32(part))
    for part in parts:
        for weight in part.parameters():
            if weight.is_floating_point() and weight.dtype != dtype and id(weight) not in left:
                weight.data = weight.data.to(dtype)


def _kept_in_float32(part: Any) -> list[nn.Parameter]:
    """The weights in modules that a class of transformers or diffusers names for this."""
    # Transformers has two lists; the one without `strict` is about float16 alone.
    is_diffusers = hasattr(part, "register_to_config")
    attribute = "_keep_in_fp32_modules" + ("" if is_diffusers else "_strict")
    names = set(getattr(part, attribute, None) or ())
    return [weight for name, weight in part.named_parameters() if names & set(name.split("."))]

"""Computing again in the backward pass what would take too much memory to keep."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.utils.checkpoint import checkpoint

ResultT = TypeVar("ResultT")


def run_again_in_backward(
    function: Callable[..., ResultT], *arguments: Any, active: bool = True
) -> ResultT:
    """Call a function that keeps no activations, but runs again in the backward pass.

    Args:
        function: takes tensors and gives some; it draws no random numbers.
        arguments: of the function.
        active: False for a plain call. Without gradient a call is always plain.
    """
    if not (active and torch.is_grad_enabled()):
        return function(*arguments)
    # Random states are not kept: that would wait for the device.
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)

"""All that an actor draws for its episodes, keyed by their seeds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unigrpo_env.mdp.noise import keyed_noise

TOKEN_NOISE = 1_000_001
"""Key of an episode's noise for tokens; the env's own keys are image numbers."""
STEP_NOISE = 1_000_002
"""Key of an episode's noise for SDE steps, plus the number of images in its stream."""


class EpisodeNoise:
    """Random numbers of N episodes; row i depends on `seeds[i]` alone.

    Args:
        seeds: one a row.
        tokens: positions of the token buffer.
        device: where the numbers are wanted.
    """

    def __init__(self, seeds: Sequence[int], tokens: int, device: torch.device) -> None:
        self.seeds = list(seeds)
        normal = keyed_noise([(seed, TOKEN_NOISE) for seed in self.seeds], (tokens,))
        # One uniform number a token, in (0, 1], inverts the cumulative distribution, whatever the
        # size of the vocabulary.
        uniform = torch.special.ndtr(normal.double())
        self._uniform = uniform.clamp_(min=1e-300).to(device)
        self._steps: Tensor | None = None
        self._steps_of: list[int] = []

    def token_uniform(self, position: Tensor) -> Tensor:
        """`[N, 1]` float64 in (0, 1], for the tokens at `position` `[N, 1]` int64."""
        return self._uniform.gather(1, position)

    def step_noise(self, images_before: list[int], index: Tensor, window: int, x: Tensor) -> Tensor:
        """Standard normal noise `[N, L, C]` float32 for one SDE step; one keyed draw a window.

        Args:
            images_before: images in each row's stream.
            index: `[N]` int64, which step of the window.
            window: steps of the window.
            x: `[N, L, C]`, the latent that the noise is for.
        """
        if self._steps is None or images_before != self._steps_of:
            self._steps_of = images_before
            numbers = zip(self.seeds, images_before, strict=True)
            # Row i depends on its own seed and image alone, whatever else is in the batch.
            keys = [(seed, STEP_NOISE + number) for seed, number in numbers]
            drawn = keyed_noise(keys, (window, *x.shape[1:]))
            self._steps = drawn.flatten(0, 1).to(x.device)
        # [N W, L, C]: row i has its W steps at i W ... i W + W - 1.
        rows = torch.arange(len(x), device=x.device)
        return self._steps.index_select(0, rows * window + index)

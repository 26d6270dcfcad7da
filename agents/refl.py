"""ReFL's reward: of latents, with the gradient that leads back to them."""

from __future__ import annotations

import torch
from torch import Tensor

from rewards import EpisodeBatch, UnscoredError, WeightedReward
from unigrpo_env.episodes import Variant
from unigrpo_env.tasks import Prompt


class LatentScore:
    """Decodes latents and scores the pictures; words are not shown to it, and what it cannot score counts 0.

    Args:
        variant: its decoder, and its reward if none is named.
        reward: a registered name or a sum of them; empty for the variant's.
        max_unscored: share of pictures without a score above which it stops.

    Attributes:
        prompts: of each group, by its id; set them before a batch of episodes is scored.
    """

    def __init__(self, variant: Variant, reward: str, max_unscored: float) -> None:
        self.variant, self.name, self.max_unscored = variant, reward or variant.reward, max_unscored
        self.reward = WeightedReward(self.name)
        self.prompts: list[Prompt] = []

    def __call__(self, latents: Tensor, groups: Tensor) -> Tensor:
        """Rewards `[N]` float32 of latents `[N, L, C]` and their groups `[N]` int64.

        Raises:
            UnscoredError: more than the allowed share could not be scored.
            ValueError: the reward has no gradient.
        """
        scored = self._score(latents, groups)
        unknown = scored.isnan()
        if unknown.any():
            share = float(unknown.float().mean())
            if share == 1 or share > self.max_unscored:
                raise UnscoredError(
                    f"{int(unknown.sum())} of {len(latents)} pictures could not be scored by refl's reward {self.name!r}: it returned NaN or infinity. "
                    "Do the prompts say what it needs? Mend it, or name another in algorithm.refl_reward"
                )
            known = (~unknown).nonzero()[:, 0]
            # Again, so that no NaN is on the way of a gradient.
            scored = torch.zeros_like(scored).index_put((known,), self._score(latents[known], groups[known]))
        if latents.requires_grad and not scored.requires_grad:
            raise ValueError(
                f"expected a differentiable reward for refl, got {self.name!r}, which gives no gradient; name one in algorithm.refl_reward, such as soft_shapes"
            )
        return scored

    def _score(self, latents: Tensor, groups: Tensor) -> Tensor:
        prompts = [self.prompts[group] for group in groups.tolist()]
        images = self.variant.decode(latents)
        batch = EpisodeBatch([p.text for p in prompts], [""] * len(prompts), images, [p.metadata for p in prompts])
        return self.reward(batch, keep_gradient=True).reward.to(latents.device)

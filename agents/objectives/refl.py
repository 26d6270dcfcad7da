"""The reward of ReFL: of latents, with the gradient that leads back to them."""

from __future__ import annotations

from torch import Tensor

from rewards import EpisodeBatch, UnscoredError, WeightedReward
from unigrpo_env.tasks.task import Prompt
from unigrpo_env.variants.variant import Variant


class LatentScore:
    """Decodes latents and scores the images.

    Text is not shown to the reward, and what it cannot score counts 0.

    Args:
        variant: its processor, and its reward if none is named.
        reward: a registered name or a sum of them; empty for the variant's.
        max_unscored: share of images without a score above which it stops.

    Attributes:
        prompts: of each group, by its id; set them before a batch of episodes is scored.
    """

    def __init__(self, variant: Variant, reward: str, max_unscored: float) -> None:
        self.variant = variant
        self.name = reward or variant.reward
        self.max_unscored = max_unscored
        self.reward = WeightedReward(self.name)
        self.prompts: list[Prompt] = []
        self._images: int | None = None
        self._unscored = 0

    def begin(self, images: int) -> None:
        """Say how many images follow, in one call or in several.

        The share without a score is then one of all of them, so it does not depend on the split.

        Args:
            images: of the update.
        """
        self._images = images
        self._unscored = 0

    def __call__(self, latents: Tensor, groups: Tensor) -> Tensor:
        """Rewards `[N]` float32 of latents.

        Args:
            latents: `[N, L, C]`.
            groups: `[N]` int64, their groups.

        Raises:
            UnscoredError: more than the allowed share could not be scored.
            ValueError: the reward has no gradient.
        """
        scored = self._score(latents, groups)
        unknown = scored.isnan()
        self._check_share(int(unknown.sum()), len(latents))
        if latents.requires_grad and not scored.requires_grad:
            raise ValueError(
                f"expected a differentiable reward for refl, got {self.name!r}, which gives no "
                "gradient; name one in algorithm.refl_reward, such as soft_shapes, for a processor "
                "whose decode_latents keeps the gradient"
            )
        if unknown.any():
            known = (~unknown).nonzero()[:, 0]
            # Zeros with a gradient, for a part of an update in which nothing has a score.
            scored = 0 * latents.flatten(1).sum(1)
            if len(known):
                # Scored again, so that no NaN is on the way of a gradient.
                again = self._score(latents[known], groups[known])
                scored = scored.index_put((known,), again)
        return scored

    def _check_share(self, unscored: int, images: int) -> None:
        if self._images is not None:
            self._unscored += unscored
            unscored = self._unscored
            images = self._images
        if unscored and (unscored == images or unscored > self.max_unscored * images):
            raise UnscoredError(
                f"{unscored} of {images} images could not be scored by refl's "
                f"reward {self.name!r}: it returned NaN or infinity. Do the prompts say what it "
                "needs? Mend it, or name another in algorithm.refl_reward"
            )

    def _score(self, latents: Tensor, groups: Tensor) -> Tensor:
        prompts = [self.prompts[group] for group in groups.tolist()]
        images = self.variant.processor.decode_latents(latents)
        batch = EpisodeBatch(
            [prompt.text for prompt in prompts],
            [""] * len(prompts),
            images,
            [prompt.metadata for prompt in prompts],
        )
        return self.reward(batch, keep_gradient=True).reward.to(latents.device)

"""The reward of ReFL: of latents, with the gradient that leads back to them."""

from __future__ import annotations

from torch import Tensor

from rewards import EpisodeBatch, Failures, Scores, UnscoredError, WeightedReward
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
        self.reward = WeightedReward(self.name, variant.reward_options)
        self.prompts: list[Prompt] = []
        self._images: int | None = None
        self._unscored = 0
        self._failures = Failures()

    def begin(self, images: int) -> None:
        """Say how many images follow, in one call or in several.

        The share without a score is then one of all of them, so it does not depend on the split.

        Args:
            images: of the update.
        """
        self._images = images
        self._unscored = 0
        self._failures = Failures()

    def __call__(self, latents: Tensor, groups: Tensor) -> Tensor:
        """Rewards `[N]` float32 of latents.

        Args:
            latents: `[N, L, C]`.
            groups: `[N]` int64, their groups.

        Raises:
            UnscoredError: more than the allowed share could not be scored. The first failure that
                the reward reported is its cause.
            ValueError: the reward has no gradient.
        """
        scores = self._score(latents, groups)
        scored = scores.reward.to(latents.device)
        unknown = scored.isnan()
        self._check_share(int(unknown.sum()), len(latents), scores.failures)
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
                again = self._score(latents[known], groups[known]).reward.to(latents.device)
                scored = scored.index_put((known,), again)
        return scored

    def _check_share(self, unscored: int, images: int, failures: Failures) -> None:
        if self._images is not None:
            self._unscored += unscored
            self._failures = self._failures.merged(failures)
            unscored = self._unscored
            images = self._images
            failures = self._failures
        if unscored and (unscored == images or unscored > self.max_unscored * images):
            reason = str(failures) or "it returned NaN or infinity"
            raise UnscoredError(
                f"{unscored} of {images} images could not be scored by refl's "
                f"reward {self.name!r}: {reason}. Do the prompts say what it "
                "needs? Mend it, or name another in algorithm.refl_reward"
            ) from failures.first

    def _score(self, latents: Tensor, groups: Tensor) -> Scores:
        prompts = [self.prompts[group] for group in groups.tolist()]
        images = self.variant.processor.decode_latents(latents)
        batch = EpisodeBatch(
            [prompt.text for prompt in prompts],
            [""] * len(prompts),
            images,
            [prompt.metadata for prompt in prompts],
        )
        return self.reward(batch, keep_gradient=True)

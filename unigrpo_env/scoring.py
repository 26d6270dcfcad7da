"""Which rewards a step pays: for a thought, for an image, and at the end of an episode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rewards import EpisodeBatch, Failures, Scores, WeightedReward
from unigrpo_env.variants.variant import Variant


@dataclass(frozen=True)
class Payment:
    """What a step paid.

    Attributes:
        reward: `[N]` float32, all of it: at the end, for a thought, for an image. 0 for rows that
            were paid nothing, NaN for one that could not be scored.
        parts: of `reward`, `[N]` float32 each, 0 elsewhere: `reward` at the end, `thought_reward`
            and `round_reward` before it. A part that no row is due in this step is left out.
        components: named parts of the reward at the end, `[N]` float32, NaN elsewhere.
        failures: why rewards could not score, where they said so.
    """

    reward: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)
    components: dict[str, Tensor] = field(default_factory=dict)
    failures: Failures = field(default_factory=Failures)


BatchOf = Callable[[Sequence[int]], EpisodeBatch]
"""Some rows as a reward sees them."""


class Scorer:
    """The rewards of a variant, each called once for all rows that are due.

    Args:
        variant: names its rewards.

    Attributes:
        final: paid at the end of an episode.
        intermediate: `thought_reward` and `round_reward`, those that the variant has.
    """

    def __init__(self, variant: Variant) -> None:
        options = variant.reward_options
        self.final = WeightedReward(variant.reward, options)
        self.intermediate: dict[str, WeightedReward] = {}
        if variant.thought_reward is not None:
            self.intermediate["thought_reward"] = WeightedReward(variant.thought_reward, options)
        if variant.round_reward is not None:
            self.intermediate["round_reward"] = WeightedReward(variant.round_reward, options)
        self._lowest_reward = variant.lowest_reward
        self._asks_for_images = variant.rules.image_budget > 0

    def pay(
        self, batch: BatchOf, opened: Tensor, drawn: Tensor, ended: Tensor, images_drawn: Tensor
    ) -> Payment:
        """Score what a step brought.

        Args:
            batch: gives rows as a reward sees them.
            opened: rows whose thought ended and opened an image. Like the other rows they are int64
                indices on the CPU.
            drawn: rows that finished an image.
            ended: rows that ended.
            images_drawn: `[N]` images of each row.

        Raises:
            Exception: whatever a reward raised, unchanged.
        """
        nothing = torch.zeros(len(images_drawn))
        parts: dict[str, Tensor] = {}
        failures = Failures()
        for name, rows in (("thought_reward", opened), ("round_reward", drawn)):
            if name in self.intermediate and len(rows):
                scores = self.intermediate[name](batch(rows.tolist()))
                # Not in place: `nothing` is still zero for the next part.
                parts[name] = nothing.index_put((rows,), scores.reward)
                failures = failures.merged(scores.failures)
        components: dict[str, Tensor] = {}
        if len(ended):
            final = self._pay_end(batch, ended, images_drawn, nothing)
            parts["reward"] = final.reward
            components = final.components
            failures = failures.merged(final.failures)
        return Payment(sum(parts.values(), nothing), parts, components, failures)

    def _pay_end(
        self, batch: BatchOf, ended: Tensor, images_drawn: Tensor, nothing: Tensor
    ) -> Scores:
        """The reward at the end, `[N]` with 0 elsewhere, and its components, NaN elsewhere."""
        # [ended] bool. An episode that lacks the image it was asked for is not scored.
        is_scored = images_drawn[ended] > 0
        if not self._asks_for_images:
            is_scored = torch.ones_like(is_scored)
        lowest = torch.tensor(self._lowest_reward)
        # [N]
        reward = nothing.index_put((ended[~is_scored],), lowest)
        rows = ended[is_scored]
        if len(rows) == 0:
            return Scores(reward)
        scores = self.final(batch(rows.tolist()))
        reward[rows] = scores.reward
        # [N]: NaN, not 0, so that a mean leaves out the rows that have no such component.
        unknown = torch.full_like(nothing, torch.nan)
        components = {}
        for name, values in scores.components.items():
            components[name] = unknown.index_put((rows,), values)
        return Scores(reward, components, scores.failures)

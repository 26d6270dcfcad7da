"""What a reward is given and what it returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor


@dataclass(frozen=True)
class EpisodeBatch:
    """Episodes as a reward sees them.

    They are finished, or, for a reward that is paid before the end, as far as they have come.

    Attributes:
        prompts: the text of each prompt.
        texts: everything that the model wrote in each episode.
        images: the last finished image of each episode, `[N, 3, height, width]` float32 in
            [0, 1]; black before the first.
        metadata: what the task knows about each prompt and the model does not see.
        all_images: all finished images of each episode, in order, `[drawn, 3, height, width]`
            float32 each. If left out, `images`, one for each episode.
        thoughts: the text before each image of an episode, and after the last if there is any.
            If left out, `texts`, one for each episode.
        sources: the images that came with each prompt, `[sources, 3, height, width]` float32
            each. If left out, none.
    """

    prompts: list[str]
    texts: list[str]
    images: Tensor
    metadata: list[Mapping[str, Any]]
    all_images: list[Tensor] = field(default_factory=list)
    thoughts: list[list[str]] = field(default_factory=list)
    sources: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Fill in the lists that were left out."""
        # The dataclass is frozen, and a list that the caller gave must stay as it is.
        if not self.all_images:
            # `split` gives one empty tensor for a batch without episodes: cut it off.
            one_each = list(self.images.split(1))[: len(self)]
            object.__setattr__(self, "all_images", one_each)
        if not self.thoughts:
            object.__setattr__(self, "thoughts", [[text] for text in self.texts])
        if not self.sources:
            # [0, 3, height, width], so that code for sources needs no special case.
            object.__setattr__(self, "sources", [self.images[:0]] * len(self))

    def __len__(self) -> int:
        """The number of episodes, N."""
        return len(self.prompts)


class Reward(Protocol):
    """Any batched callable that scores episodes.

    It returns one number for each episode (a tensor `[N]` or a sequence), or a mapping of such
    with the key `reward`; the other entries of a mapping are only logged.

    NaN means "could not be scored", which is not 0: that episode is left out. An exception stops
    the run.
    """

    def __call__(
        self, episodes: EpisodeBatch
    ) -> Tensor | Sequence[float] | Mapping[str, Tensor | Sequence[float]]:
        """Score a batch of episodes."""
        ...


class UnscoredError(RuntimeError):
    """Too many episodes have no score. Training would go on with a bug."""


@dataclass(frozen=True)
class Scores:
    """What a batch of episodes is worth.

    Attributes:
        reward: `[N]` float32; NaN where an episode could not be scored.
        components: each named part of the reward, `[N]` float32, before it is weighted.
    """

    reward: Tensor
    components: dict[str, Tensor] = field(default_factory=dict)

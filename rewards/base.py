"""What a reward is given and what it returns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
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


def kind_of(error: Exception) -> str:
    """The short kind by which an error is counted: its `kind` if it has one, else its class.

    Args:
        error: what kept a sample from being scored.
    """
    return str(getattr(error, "kind", "") or type(error).__name__)


@dataclass(frozen=True)
class Failures:
    """What kept samples from being scored.

    Attributes:
        counts: the number of failures by short kind, such as "HTTP 500" or "timeout".
        first: one of the errors, the earliest that is known.
    """

    counts: dict[str, int] = field(default_factory=dict)
    first: Exception | None = None

    @classmethod
    def of(
        cls, errors: Iterable[Exception], kind: Callable[[Exception], str] = kind_of
    ) -> Failures:
        """Count errors, one for each sample that failed.

        Args:
            errors: in the order of the samples.
            kind: gives the short kind of an error.
        """
        listed = list(errors)
        return cls(dict(Counter(map(kind, listed))), next(iter(listed), None))

    def merged(self, other: Failures) -> Failures:
        """These failures and others.

        Args:
            other: added to these; its first error is kept only if these have none.
        """
        counts = Counter(self.counts)
        counts.update(other.counts)
        first = self.first
        if first is None:
            first = other.first
        return Failures(dict(counts), first)

    def under(self, name: str) -> Failures:
        """The same, each kind with a name in front, such as "ocr: timeout".

        Args:
            name: of the reward that failed.
        """
        counts = {f"{name}: {kind}": count for kind, count in self.counts.items()}
        return Failures(counts, self.first)

    def __bool__(self) -> bool:
        """Whether anything failed."""
        return bool(self.counts)

    def __str__(self) -> str:
        """The counts, the commonest kind first, and the text of the first error."""
        ordered = sorted(self.counts.items(), key=lambda entry: -entry[1])
        text = ", ".join(f"{count} x {kind}" for kind, count in ordered)
        if self.first is not None:
            text += f"; the first: {str(self.first) or type(self.first).__name__}"
        return text


@dataclass(frozen=True)
class Scores:
    """What a batch of episodes is worth.

    Attributes:
        reward: `[N]` float32; NaN where an episode could not be scored.
        components: each named part of the reward, `[N]` float32, before it is weighted.
        failures: why episodes have no score, where that is known.
    """

    reward: Tensor
    components: dict[str, Tensor] = field(default_factory=dict)
    failures: Failures = field(default_factory=Failures)


RewardResult = Tensor | Sequence[float] | Mapping[str, Tensor | Sequence[float]] | Scores
"""What a reward may return; see `Reward`."""


class Reward(Protocol):
    """Any batched callable that scores episodes.

    It returns one number for each episode (a tensor `[N]` or a sequence); a mapping of such with
    the key `reward`, whose other entries are only logged; or `Scores`, which also say what failed.

    NaN means "could not be scored", which is not 0: that episode is left out. An exception stops
    the run.

    A reward may have two more methods. `prepare()` is called before the first episode, and raises
    what would keep it from scoring. `submit(episodes)` begins to score elsewhere and returns a
    `concurrent.futures.Future` of what a call returns.
    """

    def __call__(self, episodes: EpisodeBatch) -> RewardResult:
        """Score a batch of episodes."""
        ...


class UnscoredError(RuntimeError):
    """Too many episodes have no score. Training would go on with a bug."""

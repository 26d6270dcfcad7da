"""Things by name, and the calling of rewards."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any, Generic, Protocol, TypeVar, cast

import torch
from torch import Tensor

T = TypeVar("T")


def closest(name: str, known: Sequence[str]) -> str:
    """The end of an error message about an unknown name: near misses, and everything known unless that is long."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    guess = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    return guess if near and len(known) > 12 else f"{guess}Known: {', '.join(sorted(known)) or 'none'}"


class Registry(Generic[T]):
    """Names to things. Exact case; a name taken twice is an error; an entry may be lazy (`"module:attribute"`) or come from a plug-in.

    Args:
        kind: what the entries are, for messages.
        entry_point_group: installed packages add entries under this group.

    >>> colours = Registry("colour")
    >>> colours.add("red", 1)
    >>> colours["red"]
    1
    >>> colours["rad"]
    Traceback (most recent call last):
    ValueError: unknown colour 'rad'; did you mean 'red'? Known: red
    """

    def __init__(self, kind: str, entry_point_group: str | None = None) -> None:
        self.kind = kind
        self._group = entry_point_group
        self._entries: dict[str, T | str] = {}
        self._plugins_loaded = entry_point_group is None

    def add(self, name: str, entry: T | str) -> None:
        """Raises ValueError if `name` is taken."""
        if name in self._entries:
            raise ValueError(f"{self.kind} {name!r} is already registered; choose another name")
        self._entries[name] = entry

    def _load_plugins(self) -> None:
        if not self._plugins_loaded:
            self._plugins_loaded = True
            for point in entry_points(group=cast(str, self._group)):
                self._entries.setdefault(point.name, f"{point.module}:{point.attr}")

    def __getitem__(self, name: str) -> T:
        """Raises ValueError, with the closest names, if there is no such entry."""
        self._load_plugins()
        if name not in self._entries:
            raise ValueError(f"unknown {self.kind} {name!r}; {closest(name, list(self._entries))}")
        entry = self._entries[name]
        if isinstance(entry, str):
            module, _, attribute = entry.partition(":")
            entry = getattr(importlib.import_module(module), attribute)
            self._entries[name] = entry
        return cast(T, entry)

    def __iter__(self) -> Iterator[str]:
        self._load_plugins()
        return iter(sorted(self._entries))

    def __contains__(self, name: object) -> bool:
        self._load_plugins()
        return name in self._entries


@dataclass(frozen=True)
class EpisodeBatch:
    """Episodes as a reward sees them: finished, or, for a reward on the way, as far as they have come.

    Attributes:
        prompts: what was asked for.
        texts: what the model wrote.
        images: the last finished picture of each, `[N, 3, height, width]` float32 in [0, 1]; black before the first.
        metadata: what the task knows of each prompt and the model was not told.
        pictures: all that each episode drew, in order, `[drawn, 3, height, width]` float32; if left out, `images`, one each.
        rounds: the words before each of them, and after the last; if left out, `texts`, one each.
        sources: pictures that came with each prompt, `[sources, 3, height, width]`; if left out, none.
    """

    prompts: list[str]
    texts: list[str]
    images: Tensor
    metadata: list[Mapping[str, Any]]
    pictures: list[Tensor] = field(default_factory=list)
    rounds: list[list[str]] = field(default_factory=list)
    sources: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.pictures:
            self.pictures.extend(self.images.split(1))
        if not self.rounds:
            self.rounds.extend([text] for text in self.texts)
        if not self.sources:
            self.sources.extend([self.images[:0]] * len(self))

    def __len__(self) -> int:
        return len(self.prompts)


class Reward(Protocol):
    """Any batched callable: a number an episode (`[N]` tensor or list), or a dict of such with the key `reward`; the other keys are logged.

    NaN says "could not be scored", which is not 0: the sample is left out. An exception stops the run.
    """

    def __call__(self, episodes: EpisodeBatch) -> Tensor | Sequence[float] | Mapping[str, Tensor | Sequence[float]]: ...


REWARDS: Registry[Reward] = Registry("reward", entry_point_group="unigrpo.rewards")
for _name, _place in {
    "shapes": "rewards.shapes:shapes",
    "shapes_score": "rewards.shapes:shapes_score",
    "shapes_thought": "rewards.shapes:shapes_thought",
    "crispness": "rewards.shapes:crispness",
    "soft_shapes": "rewards.soft_shapes:soft_shapes",
    "edit": "rewards.rounds:edit",
    "edit_thought": "rewards.rounds:edit_thought",
    "story": "rewards.rounds:story",
    "dialogue": "rewards.rounds:dialogue",
    "reflect": "rewards.rounds:reflect",
    "extra_pictures": "rewards.rounds:extra_pictures",
    "brevity": "rewards.text:brevity",
    "toy": "rewards.toy:toy",
}.items():
    REWARDS.add(_name, _place)


def register_reward(name: str) -> Callable[[Reward], Reward]:
    """Decorator: make a batched function known as `name` in Python, in configs and on the command line."""

    def register(reward: Reward) -> Reward:
        REWARDS.add(name, reward)
        return reward

    return register


class UnscoredError(RuntimeError):
    """Too many episodes without a score: training on would train on a bug."""


@dataclass(frozen=True)
class Scores:
    """What a batch of episodes is worth.

    Attributes:
        reward: `[N]` float32; NaN where an episode could not be scored.
        components: each named part, `[N]` float32, unweighted.
    """

    reward: Tensor
    components: dict[str, Tensor] = field(default_factory=dict)


def parse_weights(text: str) -> dict[str, float]:
    """Weights by name from a sum in words.

    >>> parse_weights("shapes + 0.1 * brevity")
    {'shapes': 1.0, 'brevity': 0.1}
    """
    weights: dict[str, float] = {}
    for term in text.split("+"):
        factor, _, name = term.rpartition("*")
        try:
            weights[name.strip()] = weights.get(name.strip(), 0.0) + (float(factor) if factor.strip() else 1.0)
        except ValueError:
            raise ValueError(f"expected a reward such as 'shapes + 0.1 * brevity', got {text!r}: {factor.strip()!r} is no number") from None
    return weights


class WeightedReward:
    """A weighted sum of registered rewards.

    Args:
        weights: a name, a sum as for `parse_weights`, a callable, or a mapping from names to weights.

    Raises:
        ValueError: an unknown name, no reward at all, or a weight that is not finite.
    """

    def __init__(self, weights: str | Reward | Mapping[str, float]) -> None:
        if callable(weights):
            self._parts = [(getattr(weights, "__name__", type(weights).__name__), weights, 1.0)]
        else:
            named = parse_weights(weights) if isinstance(weights, str) else dict(weights)
            if not named:
                raise ValueError(f"expected at least one reward, got none; {closest('', list(REWARDS))}")
            self._parts = [(name, REWARDS[name], float(weight)) for name, weight in named.items()]
        for name, _, weight in self._parts:
            if weight != weight or abs(weight) == float("inf"):
                raise ValueError(f"expected a finite weight for reward {name!r}, got {weight}")

    def __call__(self, episodes: EpisodeBatch, keep_gradient: bool = False) -> Scores:
        """Score finished episodes, with the gradient to their images if it is asked for and the parts have one.

        Raises:
            ValueError: a part returned the wrong shape or no `reward`.
            Exception: whatever a part raised, unchanged, with a note of its name.
        """
        total = torch.zeros(len(episodes))
        components: dict[str, Tensor] = {}
        for name, reward, weight in self._parts:
            try:
                result = reward(episodes)
                named = dict(result) if isinstance(result, Mapping) else {"reward": result}
                if "reward" not in named:
                    raise ValueError(f"reward {name!r} returned the components {sorted(named)}; expected one of them to be 'reward'")
                parts = {part: _per_episode(values, f"{name}/{part}", len(episodes), keep_gradient) for part, values in named.items()}
            except Exception as error:
                error.add_note(f"raised by reward {name!r} on {len(episodes)} episodes")
                raise
            components |= {name if part == "reward" else f"{name}/{part}": values for part, values in parts.items()}
            total = total + weight * components[name]
        return Scores(total, components)


def _per_episode(values: Tensor | Sequence[float], label: str, count: int, keep_gradient: bool) -> Tensor:
    tensor = torch.as_tensor(values, dtype=torch.float32).cpu()
    tensor = tensor if keep_gradient else tensor.detach()
    if tensor.shape != (count,):
        raise ValueError(f"reward {label!r} returned shape {list(tensor.shape)}; expected one number an episode, [{count}]")
    return tensor.masked_fill(~tensor.isfinite(), torch.nan)

"""Weighted sums of rewards."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rewards.base import EpisodeBatch, Failures, Reward, RewardResult, Scores
from rewards.expression import parse_sum
from rewards.factory import BUILT_IN, REWARDS, Options, check_entry, make_reward, register_reward
from rewards.registry import did_you_mean

__all__ = ["BUILT_IN", "REWARDS", "RewardLike", "WeightedReward", "register_reward"]

RewardLike = str | Reward | Mapping[Any, float] | Sequence[str | Reward]
"""Everything that `WeightedReward` takes for a reward."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Part:
    """One reward of a sum, with the name by which its components are logged."""

    name: str
    reward: Reward
    weight: float


class WeightedReward:
    """A weighted sum of rewards: the sum of `weight * reward` over its parts.

    Args:
        weights: a name, a sum as for `rewards.expression.parse_sum`, a callable, a mapping from
            names or callables to weights, or a sequence of names and callables, whose weights
            are 1.
        options: of rewards by their names, as for `make_reward`. Those that stand in the sum
            itself come before them. Names that the sum lacks are left alone, because several sums
            share one mapping.

    Raises:
        ValueError: an unknown name or option, no reward at all, or a weight that is not finite.
        TypeError: something else than a reward; a class; a coroutine function.
    """

    def __init__(self, weights: RewardLike, options: Options | None = None) -> None:
        self._parts: list[_Part] = []
        self._known_failures: set[str] = set()
        options = options or {}
        for entry, weight, written in _terms(weights, options):
            if isinstance(entry, str):
                name = entry
                reward = make_reward(name, {**options.get(name, {}), **written})
            else:
                name = getattr(entry, "__name__", type(entry).__name__)
                reward = _callable(name, entry)
            # Two functions may have one name, such as "<lambda>"; the log needs two.
            taken = {part.name for part in self._parts}
            self._parts.append(_Part(_unused(name, taken), reward, _finite(name, weight)))
        if not self._parts:
            known = did_you_mean("", list(REWARDS))
            raise ValueError(f"expected at least one reward, got none; {known}")

    def prepare(self) -> None:
        """Let each part load what it needs, so that a missing package or server shows at once.

        Raises:
            Exception: whatever a part raised, with a note of its name.
        """
        for part in self._parts:
            prepare = getattr(part.reward, "prepare", None)
            if prepare is not None:
                with _noting(f"raised while reward {part.name!r} was prepared"):
                    prepare()

    def __call__(self, episodes: EpisodeBatch, keep_gradient: bool = False) -> Scores:
        """Score a batch of episodes.

        Parts with a `submit` begin first, and the others run meanwhile.

        Args:
            episodes: what to score.
            keep_gradient: keep the gradient to the images, where the parts have one.

        Raises:
            ValueError: a part returned the wrong shape or no `reward`.
            Exception: whatever a part raised, unchanged, with a note of its name.
        """
        total = torch.zeros(len(episodes))
        components: dict[str, Tensor] = {}
        failures = Failures()
        for part, result in zip(self._parts, self._results(episodes), strict=True):
            with _noting(_raised_by(part, episodes)):
                components |= _components(part, result, len(episodes), keep_gradient)
            # A NaN stays NaN with any weight, 0 too: the episode could not be scored.
            total = total + part.weight * components[part.name]
            if isinstance(result, Scores):
                failures = failures.merged(result.failures.under(part.name))
        self._log_new_kinds(failures)
        return Scores(total, components, failures)

    def _results(self, episodes: EpisodeBatch) -> list[RewardResult]:
        """What each part returns, in order."""
        begun: dict[int, Future[RewardResult]] = {}
        results: dict[int, RewardResult] = {}
        try:
            for index, part in enumerate(self._parts):
                submit = getattr(part.reward, "submit", None)
                if submit is not None:
                    with _noting(_raised_by(part, episodes)):
                        begun[index] = submit(episodes)
            for index, part in enumerate(self._parts):
                if index not in begun:
                    with _noting(_raised_by(part, episodes)):
                        results[index] = part.reward(episodes)
            for index, future in begun.items():
                with _noting(_raised_by(self._parts[index], episodes)):
                    results[index] = future.result()
        except BaseException:
            # Nothing may score on in the background, for a batch that nobody waits for.
            wait([future for future in begun.values() if not future.cancel()])
            raise
        return [results[index] for index in range(len(self._parts))]

    def _log_new_kinds(self, failures: Failures) -> None:
        """Say each kind of failure once: below the allowed share nothing else would tell of it."""
        new = set(failures.counts) - self._known_failures
        if new:
            self._known_failures |= new
            logger.warning("some episodes have no score (each kind is said once): %s", failures)


@contextmanager
def _noting(note: str) -> Iterator[None]:
    """Add a note to what is raised inside."""
    try:
        yield
    except Exception as error:
        error.add_note(note)
        raise


def _raised_by(part: _Part, episodes: EpisodeBatch) -> str:
    return f"raised by reward {part.name!r} on {len(episodes)} episodes"


def reward_names(weights: RewardLike, options: Options | None = None) -> list[str]:
    """The names that stand in a reward; its callables are left out.

    Args:
        weights: as for `WeightedReward`.
        options: likewise.

    Raises:
        ValueError: a text that is no sum.
        TypeError: something else than a reward.
    """
    return [entry for entry, _, _ in _terms(weights, options or {}) if isinstance(entry, str)]


def _terms(weights: RewardLike, options: Options) -> list[tuple[Any, Any, Mapping[str, Any]]]:
    """Names or callables with their weights and the options beside them, in order."""
    terms: list[tuple[Any, Any, Mapping[str, Any]]]
    if isinstance(weights, str) and (weights in REWARDS or weights in options):
        # Also a name that cannot stand in a sum, such as one with a space.
        terms = [(weights, 1.0, {})]
    elif isinstance(weights, str):
        terms = [(term.name, term.weight, term.options) for term in parse_sum(weights)]
    # A mapping that can be called is meant as a reward, so this comes first.
    elif callable(weights):
        terms = [(weights, 1.0, {})]
    elif isinstance(weights, Mapping):
        terms = [(entry, weight, {}) for entry, weight in weights.items()]
    elif isinstance(weights, Sequence):
        terms = [(entry, 1.0, {}) for entry in weights]
    else:
        raise _not_a_reward(weights)
    for entry, _, _ in terms:
        if not isinstance(entry, str) and not callable(entry):
            raise _not_a_reward(entry)
    return terms


def _not_a_reward(thing: object) -> TypeError:
    return TypeError(
        "expected a reward: a name, a sum such as 'shapes + 0.1 * brevity', a callable, a mapping "
        "from names or callables to weights, or a sequence of names and callables; "
        f"got {thing!r} ({type(thing).__name__})"
    )


def _callable(name: str, entry: Reward) -> Reward:
    """A reward that was given as an object, if it can be called on episodes."""
    # A class is callable too, so it would fail only after the first episodes are played.
    if inspect.isclass(entry):
        raise TypeError(
            f"reward {name!r} is the class {entry.__name__}, and calling it makes an object "
            f"instead of scores; give an instance, such as {entry.__name__}()"
        )
    check_entry(name, entry)
    return entry


def _unused(name: str, taken: set[str]) -> str:
    """The name, or the name with a number where another part already has it."""
    unique = name
    number = 2
    while unique in taken:
        unique = f"{name}_{number}"
        number += 1
    return unique


def _finite(name: str, weight: Any) -> float:
    """The weight as a number, if it is one."""
    # Weights come from config files too, where a typing error gives a string.
    try:
        number = float(weight)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"expected a finite weight for reward {name!r}, got {weight!r}")
    return number


def _components(
    part: _Part, result: RewardResult, count: int, keep_gradient: bool
) -> dict[str, Tensor]:
    """Check what a reward returned: `[N]` float32 by the names for the log."""
    values: Mapping[str, Tensor | Sequence[float]]
    if isinstance(result, Scores):
        values = {**result.components, "reward": result.reward}
    elif isinstance(result, Mapping):
        values = result
    else:
        values = {"reward": result}
    if "reward" not in values:
        raise ValueError(
            f"reward {part.name!r} returned the components {sorted(values)}; "
            "expected one of them to be 'reward'"
        )
    components = {}
    for key, entry in values.items():
        label = f"{part.name}/{key}"
        checked = _per_episode(entry, label, count, keep_gradient)
        # The reward itself is logged by the bare name, what is beside it by name/key.
        if key == "reward":
            components[part.name] = checked
        else:
            components[label] = checked
    return components


def _per_episode(
    values: Tensor | Sequence[float], label: str, count: int, keep_gradient: bool
) -> Tensor:
    """Values as float32 on the CPU, NaN wherever they are not finite."""
    # A reward may compute on a GPU or in another precision.
    tensor = torch.as_tensor(values, dtype=torch.float32).cpu()
    if not keep_gradient:
        tensor = tensor.detach()
    if tensor.shape != (count,):
        raise ValueError(
            f"reward {label!r} returned shape {list(tensor.shape)}; "
            f"expected one number an episode, [{count}]"
        )
    # An infinite reward would spoil the mean of its whole group.
    return tensor.masked_fill(~tensor.isfinite(), torch.nan)

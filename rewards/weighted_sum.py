"""The registered rewards, and weighted sums of them."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rewards.base import EpisodeBatch, Reward, Scores
from rewards.registry import Registry, did_you_mean

RewardLike = str | Reward | Mapping[Any, float] | Sequence[str | Reward]
"""Everything that `WeightedReward` takes for a reward."""

BUILT_IN = {
    "shapes": "rewards.shapes.verifier:shapes",
    "shapes_score": "rewards.shapes.verifier:shapes_score",
    "shapes_thought": "rewards.shapes.verifier:shapes_thought",
    "crispness": "rewards.shapes.verifier:crispness",
    "soft_shapes": "rewards.shapes.soft:soft_shapes",
    "edit": "rewards.shapes.multi_image:edit",
    "edit_thought": "rewards.shapes.multi_image:edit_thought",
    "story": "rewards.shapes.multi_image:story",
    "dialogue": "rewards.shapes.multi_image:dialogue",
    "reflect": "rewards.shapes.multi_image:reflect",
    "extra_images": "rewards.shapes.multi_image:extra_images",
    "brevity": "rewards.text:brevity",
    "toy": "rewards.toy:toy",
}
"""Where the rewards of this library are. They are imported when they are first used."""

REWARDS: Registry[Reward] = Registry("reward", entry_point_group="unigrpo.rewards")
"""All rewards by name. Installed packages add theirs by entry points `unigrpo.rewards`."""

for _name, _location in BUILT_IN.items():
    REWARDS.add(_name, _location)


def register_reward(name: str) -> Callable[[Reward], Reward]:
    """Decorator that makes a batched function known by a name.

    Args:
        name: its name in Python, in configs and on the command line.

    Raises:
        ValueError: the name is taken.
        TypeError: what is decorated is a class, a coroutine function or not callable.
    """

    def register(reward: Reward) -> Reward:
        """Add the reward and return it unchanged."""
        _check_callable(name, reward)
        REWARDS.add(name, reward)
        return reward

    return register


def _check_callable(name: str, reward: object) -> None:
    """Refuse what cannot be called on a batch of episodes to get scores."""
    # A class is callable, so it would fail only after the first episodes are played.
    if inspect.isclass(reward):
        raise TypeError(
            f"reward {name!r} is the class {reward.__name__}, and calling it makes an object "
            f"instead of scores; register an instance, such as {reward.__name__}()"
        )
    if not callable(reward):
        raise TypeError(
            f"expected reward {name!r} to be a callable that takes an EpisodeBatch, "
            f"got {type(reward).__name__}"
        )
    # An object may have a coroutine function as its `__call__`.
    call = getattr(reward, "__call__", None)  # noqa: B004 (the method itself is asked for)
    if inspect.iscoroutinefunction(reward) or inspect.iscoroutinefunction(call):
        raise TypeError(
            f"reward {name!r} is a coroutine function; expected a plain function that returns "
            "its scores (it may call asyncio.run inside)"
        )


# The sign in front of a number belongs to the term, the one after `e` to the number.
_NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_NAME = r"[^\W\d]\w*(?:[-./:][^\W\d]\w*)*"
# A sign; a number and `*`, or not; a name; `*` and a number, or not. Then the next sign or the end.
_TERM = re.compile(
    rf"\s*(?P<sign>[+-]?\s*-?)\s*(?:(?P<before>{_NUMBER})\s*\*\s*)?(?P<name>{_NAME})"
    rf"(?:\s*\*\s*(?P<after>-?{_NUMBER}))?\s*(?=[+-]|$)"
)


def parse_weights(text: str) -> dict[str, float]:
    """Read weights by name from a sum.

    A term is a name, or a name and a number joined by `*`, in either order. A name may hold `-`
    before a letter, so a minus between two names needs a space after it.

    Args:
        text: the sum.

    Returns:
        The weight of each name, in order; of a name that stands twice, the sum.

    Raises:
        ValueError: the text is not such a sum.

    >>> parse_weights("shapes + 0.1 * brevity")
    {'shapes': 1.0, 'brevity': 0.1}
    >>> parse_weights("shapes - brevity * 0.1")
    {'shapes': 1.0, 'brevity': -0.1}
    """
    weights: dict[str, float] = {}
    position = 0
    while text[position:].strip():
        term = _TERM.match(text, position)
        if term is None:
            raise ValueError(
                f"expected a reward such as 'shapes + 0.1 * brevity', got {text!r}: "
                f"{text[position:].strip()!r} does not begin with a name, or with a number, "
                "`*` and a name"
            )
        # A number that is left out is 1. Both orders are allowed, so either may be there.
        weight = float(term["before"] or 1.0) * float(term["after"] or 1.0)
        # "a + -b" has a sign of its own after that of the sum, and "a - -b" has two.
        if term["sign"].count("-") == 1:
            weight = -weight
        weights[term["name"]] = weights.get(term["name"], 0.0) + weight
        position = term.end()
    return weights


@dataclass(frozen=True)
class _Part:
    """One reward of a sum, with the name by which its components are logged."""

    name: str
    reward: Reward
    weight: float


class WeightedReward:
    """A weighted sum of rewards: the sum of `weight * reward` over its parts.

    Args:
        weights: a name, a sum as for `parse_weights`, a callable, a mapping from names or
            callables to weights, or a sequence of names and callables, whose weights are 1.

    Raises:
        ValueError: an unknown name, no reward at all, or a weight that is not finite.
        TypeError: something else than a reward; a class; a coroutine function.
    """

    def __init__(self, weights: RewardLike) -> None:
        self._parts: list[_Part] = []
        for entry, weight in _terms(weights):
            if isinstance(entry, str):
                name = entry
                reward = REWARDS[entry]
            else:
                name = getattr(entry, "__name__", type(entry).__name__)
                reward = entry
            _check_callable(name, reward)
            # Two functions may have one name, such as "<lambda>"; the log needs two.
            taken = {part.name for part in self._parts}
            self._parts.append(_Part(_unused(name, taken), reward, _finite(name, weight)))
        if not self._parts:
            known = did_you_mean("", list(REWARDS))
            raise ValueError(f"expected at least one reward, got none; {known}")

    def __call__(self, episodes: EpisodeBatch, keep_gradient: bool = False) -> Scores:
        """Score a batch of episodes.

        Args:
            episodes: what to score.
            keep_gradient: keep the gradient to the images, where the parts have one.

        Raises:
            ValueError: a part returned the wrong shape or no `reward`.
            Exception: whatever a part raised, unchanged, with a note of its name.
        """
        total = torch.zeros(len(episodes))
        components: dict[str, Tensor] = {}
        for part in self._parts:
            try:
                components |= _components(part, episodes, keep_gradient)
            except Exception as error:
                error.add_note(f"raised by reward {part.name!r} on {len(episodes)} episodes")
                raise
            # A NaN stays NaN with any weight, 0 too: the episode could not be scored.
            total = total + part.weight * components[part.name]
        return Scores(total, components)


def _terms(weights: RewardLike) -> list[tuple[Any, Any]]:
    """Names or callables with their weights, in order."""
    terms: list[tuple[Any, Any]]
    if isinstance(weights, str) and weights in REWARDS:
        # Also a name that cannot stand in a sum, such as one with a space.
        terms = [(weights, 1.0)]
    elif isinstance(weights, str):
        terms = list(parse_weights(weights).items())
    # A mapping that can be called is meant as a reward, so this comes first.
    elif callable(weights):
        terms = [(weights, 1.0)]
    elif isinstance(weights, Mapping):
        terms = list(weights.items())
    elif isinstance(weights, Sequence):
        terms = [(entry, 1.0) for entry in weights]
    else:
        raise _not_a_reward(weights)
    for entry, _weight in terms:
        if not isinstance(entry, str) and not callable(entry):
            raise _not_a_reward(entry)
    return terms


def _not_a_reward(thing: object) -> TypeError:
    return TypeError(
        "expected a reward: a name, a sum such as 'shapes + 0.1 * brevity', a callable, a mapping "
        "from names or callables to weights, or a sequence of names and callables; "
        f"got {thing!r} ({type(thing).__name__})"
    )


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


def _components(part: _Part, episodes: EpisodeBatch, keep_gradient: bool) -> dict[str, Tensor]:
    """Call one reward and check what it returns: `[N]` float32 by the names for the log."""
    result = part.reward(episodes)
    if not isinstance(result, Mapping):
        result = {"reward": result}
    if "reward" not in result:
        raise ValueError(
            f"reward {part.name!r} returned the components {sorted(result)}; "
            "expected one of them to be 'reward'"
        )
    components = {}
    for key, values in result.items():
        label = f"{part.name}/{key}"
        checked = _per_episode(values, label, len(episodes), keep_gradient)
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

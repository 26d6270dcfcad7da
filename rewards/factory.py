"""The registered rewards, and one instance of each for the options that it is asked for with."""

from __future__ import annotations

import inspect
import json
import threading
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

from rewards.base import Reward
from rewards.registry import Registry, did_you_mean

RewardEntry = Reward | type[Any]
"""A batched callable, or a class whose instances are such callables."""

Entry = TypeVar("Entry", bound=RewardEntry)

Options = Mapping[str, Mapping[str, Any]]
"""The options of each reward by its name, see `make_reward`."""

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
    "ocr": "rewards.ocr:Ocr",
    "jpeg": "rewards.jpeg:Jpeg",
    "clip": "rewards.vision.clip:Clip",
    "pickscore": "rewards.vision.clip:PickScore",
    "hpsv2": "rewards.vision.clip:HpsV2",
    "siglip": "rewards.vision.clip:SigLip",
    "aesthetic": "rewards.vision.aesthetic:Aesthetic",
    "dino": "rewards.vision.dino:Dino",
    "geneval": "rewards.geneval.reward:GenEval",
    "judge": "rewards.judge.reward:Judge",
    "remote": "rewards.service.remote:Remote",
    "readback": "agents.evaluation.readback:Readback",
}
"""Where the rewards of this library are. They are imported when they are first used."""

REWARDS: Registry[RewardEntry] = Registry("reward", entry_point_group="unigrpo.rewards")
"""All rewards by name. Installed packages add theirs by entry points `unigrpo.rewards`."""

for _name, _location in BUILT_IN.items():
    REWARDS.add(_name, _location)

_lock = threading.RLock()
_instances: dict[tuple[RewardEntry, str], Reward] = {}


def register_reward(name: str) -> Callable[[Entry], Entry]:
    """Decorator that makes a reward known by a name.

    It takes a batched function, or a class whose instances are called on a batch and whose
    keyword arguments are the reward's options.

    Args:
        name: its name in Python, in configs and on the command line.

    Raises:
        ValueError: the name is taken.
        TypeError: what is decorated cannot be called on a batch, or is a coroutine function.
    """

    def register(reward: Entry) -> Entry:
        """Add the reward and return it unchanged."""
        check_entry(name, reward)
        REWARDS.add(name, reward)
        return reward

    return register


def make_reward(name: str, options: Mapping[str, Any] | None = None) -> Reward:
    """The reward of a name, with options where its entry is a class.

    A process holds one instance for each class and options, so a model that several sums use is
    loaded once.

    Args:
        name: a registered name; or any other one, where the option `use` holds a registered name.
        options: keyword arguments of the class, of the types that JSON has. A tuple reaches the
            class as a list.

    Raises:
        ValueError: an unknown name or option, one that is missing, or one that JSON cannot hold.
        TypeError: the entry cannot be called on a batch, or takes no options.
    """
    given = dict(options or {})
    entry = REWARDS[_registered_name(name, given.pop("use", name))]
    check_entry(name, entry)
    if not inspect.isclass(entry):
        if given:
            raise TypeError(
                f"reward {name!r} is a function and takes no options, got {sorted(given)}; "
                "leave them out, or register a class with these keyword arguments"
            )
        return cast(Reward, entry)
    _check_options(name, entry, given)
    written = _as_json(name, given)
    with _lock:
        if (entry, written) not in _instances:
            try:
                # The written form is read back, so that equal keys always mean equal options.
                made = entry(**json.loads(written))
            except Exception as error:
                # Their values may hold a token, which belongs in no log.
                error.add_note(f"raised while reward {name!r} was made with {sorted(given)}")
                raise
            _instances[entry, written] = cast(Reward, made)
        return _instances[entry, written]


def check_entry(name: str, reward: object) -> None:
    """Refuse what cannot score a batch of episodes, nor can its instances.

    Args:
        name: of the reward, for the message.
        reward: a callable, or a class.

    Raises:
        TypeError: it is neither, or it is a coroutine function.
    """
    if inspect.isclass(reward):
        # `callable` would find the `__call__` of `type`, which makes instances.
        calls = [vars(base)["__call__"] for base in reward.__mro__ if "__call__" in vars(base)]
        if not calls:
            raise TypeError(
                f"reward {name!r} is the class {reward.__name__} without __call__; expected one "
                "whose instances are called on an EpisodeBatch"
            )
        call = calls[0]
    elif callable(reward):
        # An object may have a coroutine function as its `__call__`.
        call = getattr(reward, "__call__", None)  # noqa: B004 (the method itself is asked for)
    else:
        raise TypeError(
            f"expected reward {name!r} to be a callable that takes an EpisodeBatch, or a class of "
            f"such, got {type(reward).__name__}"
        )
    if inspect.iscoroutinefunction(reward) or inspect.iscoroutinefunction(call):
        raise TypeError(
            f"reward {name!r} is a coroutine function; expected a plain function that returns "
            "its scores (it may call asyncio.run inside)"
        )


def _registered_name(name: str, used: object) -> str:
    """The name of the entry that a reward uses, its own or another."""
    if not isinstance(used, str):
        raise ValueError(
            f"expected the option 'use' of reward {name!r} to be the name of a reward, got {used!r}"
        )
    # Two meanings of one name would be told apart only by a look at the options.
    if used != name and name in REWARDS:
        raise ValueError(
            f"the reward {name!r} is registered, so it cannot stand for {used!r}; choose another "
            "name for the one with the option 'use'"
        )
    return used


def _check_options(name: str, entry: type[Any], options: Mapping[str, Any]) -> None:
    """Refuse options that the class does not take, and say which it needs."""
    takes_any = False
    named = []
    for parameter in inspect.signature(entry).parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            takes_any = True
        elif parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            named.append(parameter)
    known = [parameter.name for parameter in named]
    for option in options:
        if option not in known and not takes_any:
            hint = did_you_mean(str(option), known)
            raise ValueError(f"the reward {name!r} has no option {option!r}; {hint}")
    for parameter in named:
        if parameter.default is parameter.empty and parameter.name not in options:
            option = parameter.name
            raise ValueError(
                f"the reward {name!r} needs the option {option!r}, got {sorted(options)}; "
                f"write {name}({option}=...) in Python, or set env.reward_options.{name}.{option}"
            )


def _as_json(name: str, options: Mapping[str, Any]) -> str:
    """The options in one line, the same for equal options whatever their order."""
    try:
        return json.dumps(options, sort_keys=True)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"expected options of reward {name!r} that JSON can hold (texts, numbers, true or "
            f"false, null, lists and mappings), got {dict(options)!r}: {error}; to give it other "
            "objects, make an instance in Python and use it as the reward"
        ) from error

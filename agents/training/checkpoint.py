"""Stop and go on: weights, their float32 copies and average, optimiser, reference, random states.

No pickle; a crash while saving leaves the last checkpoint whole.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from agents.models.base import UnifiedModel
from agents.storage import (
    check_expected_shapes,
    check_weights,
    read_tensors,
    write_json,
    write_tensors,
)
from agents.training.optimization import Optimization

STATE = "state.json"
MODEL = "model"
REFERENCE = "reference.safetensors"
OPTIMIZER = "optimizer.safetensors"
MASTERS = "masters.safetensors"
AVERAGE = "average.safetensors"
RANDOM = "random.safetensors"
LAYOUT = 3
"""Version of the layout of a checkpoint; others are refused by name."""
MOMENTS = ("step", "exp_avg", "exp_avg_sq")
"""What AdamW keeps of each parameter."""


def _random_state() -> tuple[dict[str, Any], Tensor]:
    version, words, gauss = random.getstate()
    legacy = cast(tuple[Any, ...], np.random.get_state(legacy=True))
    name, keys, place, has_gauss, cached = legacy
    numpy_state = [name, keys.tolist(), int(place), int(has_gauss), float(cached)]
    state = {"python": [version, list(words), gauss], "numpy": numpy_state}
    return state, torch.get_rng_state()


def _set_random_state(state: dict[str, Any], torch_state: Tensor) -> None:
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(torch_state)


def save_checkpoint(
    folder: Path,
    model: UnifiedModel[Any],
    optimization: Optimization,
    reference: nn.Module | None,
    state: dict[str, Any],
    keep: int,
) -> Path:
    """Write `folder/<iteration>` and drop all but the newest checkpoints.

    Args:
        folder: holds all checkpoints of a run.
        model: what is trained; written with `save_pretrained`, so with adapters these alone.
        optimization: its moments, masters and average are written under the names of the
            parameters.
        reference: the frozen model of the penalties, if there is one. That of a model with adapters
            has no weights of its own, and is not written.
        state: anything JSON; `iteration` names the checkpoint.
        keep: how many to keep, at least 1.
    """
    place = folder / f"{state['iteration']:06d}"
    # Written beside its place and then moved: a crash leaves no half checkpoint.
    part = folder / f"{place.name}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    model.save_pretrained(part / MODEL)
    for name, tensors in (
        (REFERENCE, _own_weights(reference)),
        (MASTERS, optimization.masters),
        (AVERAGE, _averages(optimization)),
    ):
        # What a run does not have leaves no file.
        if tensors:
            write_tensors(tensors, part / name)
    write_tensors(_moments_by_name(optimization), part / OPTIMIZER)
    randomness, torch_state = _random_state()
    write_tensors({"torch": torch_state}, part / RANDOM)
    write_json({"layout": LAYOUT, **state, "random": randomness}, part / STATE)
    _put_in_place(folder, part, place)
    _drop_old(folder, place, keep)
    return place


def _own_weights(reference: nn.Module | None) -> dict[str, Tensor]:
    if reference is None:
        return {}
    return reference.state_dict()


def _averages(optimization: Optimization) -> dict[str, Tensor]:
    if optimization.average is None:
        return {}
    return optimization.average.averages


def _moments_by_name(optimization: Optimization) -> dict[str, Tensor]:
    moments: dict[str, Tensor] = {}
    for index, entry in optimization.optimizer.state_dict()["state"].items():
        for moment, value in entry.items():
            moments[f"{moment}.{optimization.names[index]}"] = value
    return moments


def _put_in_place(folder: Path, part: Path, place: Path) -> None:
    if place.exists():
        # An older branch of the run came this far: it is moved away whole before it goes.
        stale = folder / f"{place.name}.stale"
        shutil.rmtree(stale, ignore_errors=True)
        place.replace(stale)
    part.replace(place)
    for stale in folder.glob("*.stale"):
        shutil.rmtree(stale)


def _drop_old(folder: Path, place: Path, keep: int) -> None:
    # A run that went back to an older checkpoint leaves newer ones behind, of another branch.
    later = [path for path in checkpoints(folder) if path.name > place.name]
    earlier = [path for path in checkpoints(folder) if path not in later]
    for old in later + earlier[: -max(keep, 1)]:
        shutil.rmtree(old)


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    found = []
    for path in folder.glob("[0-9]*"):
        if path.name.isdigit() and (path / STATE).is_file():
            found.append(path)
    return sorted(found)


def latest_checkpoint(folder: Path) -> Path:
    """The newest checkpoint of a run, or the one that `folder` is.

    Args:
        folder: of a run, of its checkpoints, or of one checkpoint.

    Raises:
        ValueError: there is none.
    """
    if (folder / STATE).is_file():
        return folder
    found = checkpoints(folder) or checkpoints(folder / "checkpoints")
    if not found:
        raise ValueError(
            f"expected a run with checkpoints at {folder}, found none; "
            "give the folder of a run that saved one"
        )
    return found[-1]


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What `save_checkpoint` was given as `state`.

    Args:
        checkpoint: its folder.

    Raises:
        ValueError: it is damaged, another program's, or of another layout.
    """
    path = checkpoint / STATE
    try:
        state = json.loads(path.read_text())
        for key in ("iteration", "config", "random"):
            state[key]
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not the state of a run ({error!r}); "
            "it may be damaged or from another program"
        ) from error
    layout = state.get("layout", 1)
    if layout != LAYOUT:
        raise ValueError(
            f"expected a checkpoint of layout {LAYOUT} at {checkpoint}, got layout {layout}; "
            "it was saved by another version of this library: go on with that one, or start anew "
            f"from its weights with model.name={checkpoint / MODEL}"
        )
    return state


def load_checkpoint(
    checkpoint: Path,
    model: UnifiedModel[Any],
    optimization: Optimization,
    reference: nn.Module | None,
) -> dict[str, Any]:
    """Bring everything back to where `save_checkpoint` left it; returns the state.

    Args:
        checkpoint: its folder.
        model: what is trained.
        optimization: of this run. Its learning rates and betas stay; moments, masters and average
            are loaded.
        reference: the frozen model of the penalties, if there is one.

    Raises:
        ValueError: a damaged, truncated or foreign checkpoint; nothing has changed then.
    """
    state = read_state(checkpoint)
    # Everything is read and checked before anything is changed.
    reference_weights: dict[str, Tensor] = {}
    if _own_weights(reference):
        reference_weights = read_tensors(checkpoint / REFERENCE)
    moments = _read_moments(checkpoint / OPTIMIZER, optimization)
    masters = _read_like(checkpoint / MASTERS, optimization.masters)
    averages = _read_like(checkpoint / AVERAGE, _averages(optimization))
    torch_state = read_tensors(checkpoint / RANDOM).get("torch")
    if torch_state is None:
        raise ValueError(f"{checkpoint / RANDOM} holds no random state; it is from another program")
    if reference is not None:
        check_weights(reference, reference_weights, str(checkpoint / REFERENCE))
    # It checks the model's weights, and changes nothing if they do not fit.
    model.load_saved(checkpoint / MODEL)
    if reference is not None:
        reference.load_state_dict(reference_weights)
    optimization.load_masters(masters)
    if optimization.average is not None:
        optimization.average.load(averages)
    # The settings of this run decide its learning rates; what was saved are the moments.
    groups = optimization.optimizer.state_dict()["param_groups"]
    optimization.optimizer.load_state_dict({"state": moments, "param_groups": groups})
    _set_random_state(state["random"], torch_state)
    return state


def _read_like(path: Path, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Read tensors with the names and shapes of those that this run has; none if it has none."""
    if not expected and not path.is_file():
        return {}
    if not expected or not path.is_file():
        got = "got one" if path.is_file() else "found none"
        raise ValueError(
            f"expected {'a' if expected else 'no'} safetensors file at {path}, {got}; keep the "
            "model.dtype and the optimizer.ema that the run had before, or use another checkpoint"
        )
    tensors = read_tensors(path)
    wanted = {name: tensor.shape for name, tensor in expected.items()}
    found = {name: tensor.shape for name, tensor in tensors.items()}
    check_expected_shapes(wanted, found, str(path), "the weights of this run")
    return tensors


def _read_moments(path: Path, optimization: Optimization) -> dict[int, dict[str, Tensor]]:
    """AdamW's state by the index of the parameter.

    Raises:
        ValueError: an entry fits no parameter of this model, or a moment is missing.
    """
    index_of = {name: index for index, name in enumerate(optimization.names)}
    parameters = []
    for group in optimization.optimizer.param_groups:
        parameters += group["params"]
    entries: dict[int, dict[str, Tensor]] = {}
    for key, value in read_tensors(path).items():
        moment, _, name = key.partition(".")
        index = index_of.get(name, -1)
        # `step` is a number; the other moments have the shape of their parameter.
        fits = index >= 0 and moment in MOMENTS
        if fits and moment != "step":
            fits = value.shape == parameters[index].shape
        if not fits:
            raise ValueError(
                f"{path}: {key} {list(value.shape)} fits no parameter of this model; "
                "it is from another run or program"
            )
        entries.setdefault(index, {})[moment] = value
    for index, entry in entries.items():
        for moment in MOMENTS:
            if moment not in entry:
                raise ValueError(
                    f"{path}: expected {moment}.{optimization.names[index]} beside the other "
                    "moments, got none; it is damaged or from another program"
                )
    return entries

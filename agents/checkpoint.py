"""Stop and go on: weights, optimiser, reference, random states, place in the run. No pickle; a crash leaves the last checkpoint whole."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from agents.models import UnifiedModel
from agents.models.files import WEIGHTS, check_weights, load_weights, read_tensors, write_json, write_tensors

STATE = "state.json"


def _random_state() -> tuple[dict[str, Any], Tensor]:
    version, words, gauss = random.getstate()
    name, keys, place, has_gauss, cached = np.random.get_state(legacy=True)
    numpy_state = [name, keys.tolist(), int(place), int(has_gauss), float(cached)]  # type: ignore[union-attr]
    return {"python": [version, list(words), gauss], "numpy": numpy_state}, torch.get_rng_state()


def _set_random_state(state: dict[str, Any], torch_state: Tensor) -> None:
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(torch_state)


def save_checkpoint(
    folder: Path, model: UnifiedModel[Any], optimizer: torch.optim.Optimizer, reference: nn.Module | None, state: dict[str, Any], keep: int
) -> Path:
    """Write `folder/<iteration>` and drop all but the `keep` newest.

    Args:
        folder: holds all checkpoints of a run.
        model: what is trained; written with `save_pretrained`.
        optimizer: its tensors go to safetensors, its groups to JSON.
        reference: the frozen model of the velocity penalty, if there is one.
        state: anything JSON; `iteration` names the checkpoint.
        keep: how many to keep, at least 1.
    """
    place = folder / f"{state['iteration']:06d}"
    part = folder / f"{place.name}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    model.save_pretrained(part / "model")
    if reference is not None:
        write_tensors(reference.state_dict(), part / "reference.safetensors")
    saved = optimizer.state_dict()
    write_tensors(
        {f"{index}.{name}": value for index, entry in saved["state"].items() for name, value in entry.items()},
        part / "optimizer.safetensors",
    )
    randomness, torch_state = _random_state()
    write_tensors({"torch": torch_state}, part / "random.safetensors")
    write_json(state | {"random": randomness}, part / STATE)
    if place.exists():  # an older branch of the run came this far: move it away whole before it goes
        stale = folder / f"{place.name}.stale"
        shutil.rmtree(stale, ignore_errors=True)
        place.replace(stale)
    part.replace(place)
    for stale in folder.glob("*.stale"):
        shutil.rmtree(stale)
    later = [path for path in checkpoints(folder) if path.name > place.name]
    for old in later + [path for path in checkpoints(folder) if path not in later][: -max(keep, 1)]:
        shutil.rmtree(old)
    return place


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    return sorted(path for path in folder.glob("[0-9]*") if path.name.isdigit() and (path / STATE).is_file())


def latest_checkpoint(folder: Path) -> Path:
    """Raises ValueError if there is none."""
    if (folder / STATE).is_file():
        return folder
    found = checkpoints(folder) or checkpoints(folder / "checkpoints")
    if not found:
        raise ValueError(f"expected a run with checkpoints at {folder}, found none; give the folder of a run that saved one")
    return found[-1]


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Raises ValueError if the checkpoint is damaged or another program's."""
    try:
        state = json.loads((checkpoint / STATE).read_text())
        for key in ("iteration", "config", "random"):
            state[key]
        return state
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{checkpoint / STATE} is not the state of a run ({error!r}); it may be damaged or from another program"
        ) from error


def load_checkpoint(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer, reference: nn.Module | None) -> dict[str, Any]:
    """Bring everything back to where `save_checkpoint` left it; returns the state.

    Raises:
        ValueError: a damaged, truncated or foreign checkpoint; nothing has changed then.
    """
    state = read_state(checkpoint)
    weights = read_tensors(checkpoint / "model" / WEIGHTS)
    anchor = read_tensors(checkpoint / "reference.safetensors") if reference is not None else {}
    moments = _read_moments(checkpoint / "optimizer.safetensors", optimizer)
    torch_state = read_tensors(checkpoint / "random.safetensors").get("torch")
    if torch_state is None:
        raise ValueError(f"{checkpoint / 'random.safetensors'} holds no random state; it is from another program")
    check_weights(model, weights, str(checkpoint))
    if reference is not None:
        load_weights(reference, anchor, str(checkpoint / "reference.safetensors"))
    load_weights(model, weights, str(checkpoint))
    # The settings of this run decide its learning rates and betas; what was saved are the moments.
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    _set_random_state(state["random"], torch_state)
    return state


def _read_moments(path: Path, optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Tensor]]:
    """AdamW's state by the number of the parameter; raises ValueError unless every entry fits its parameter."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    entries: dict[int, dict[str, Tensor]] = {}
    for name, value in read_tensors(path).items():
        index, _, key = name.partition(".")
        fits = index.isdigit() and int(index) < len(parameters) and key in ("step", "exp_avg", "exp_avg_sq")
        if not fits or (key != "step" and value.shape != parameters[int(index)].shape):
            raise ValueError(f"{path}: {name} {list(value.shape)} fits no parameter of this model; it is from another run or program")
        entries.setdefault(int(index), {})[key] = value
    return entries

"""Read and write weights (safetensors) and settings (JSON).

A file is written wholly or not at all.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

WEIGHTS = "model.safetensors"
"""Name of the weights file in a model's folder."""
CONFIG = "config.json"
"""Name of the settings file in a model's folder."""
SHOWN_PROBLEMS = 4
"""How many misfits of a weights file an error message names."""


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        ValueError: the file is missing or damaged.
    """
    if not path.is_file():
        raise ValueError(
            f"expected a safetensors file at {path}, found none; check the path, or save the "
            "model there first"
        )
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({error}); it may be cut off: copy it again "
            "or use another checkpoint"
        ) from error


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file next to `path`, then move it: a crash leaves the old file whole."""
    part = _part_of(path)
    # Copies, because safetensors refuses tensors that share memory.
    copies = {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}
    save_file(copies, part)
    # A move within a folder is atomic.
    part.replace(path)


def write_json(value: Any, path: Path) -> None:
    """Write a JSON file in the same way as `write_tensors`."""
    part = _part_of(path)
    part.write_text(json.dumps(value, indent=2) + "\n")
    part.replace(path)


def _part_of(path: Path) -> Path:
    # In the same folder, because a move between file systems would be a copy.
    return path.with_suffix(path.suffix + ".part")


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        ValueError: the file is missing, is not JSON, or holds something else than an object.
    """
    if not path.is_file():
        raise ValueError(f"expected a JSON file at {path}, found none; check the path")
    try:
        fields = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); its folder may be damaged") from error
    if not isinstance(fields, dict):
        raise ValueError(f"expected a JSON object in {path}, got {type(fields).__name__}")
    return fields


def read_config(folder: Path) -> dict[str, Any]:
    """Read `config.json` of a saved model.

    Raises:
        ValueError: the file is missing or is not a JSON object.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(
            f"expected a model folder with {CONFIG} and {WEIGHTS}, found no {path}; "
            "known built-in model: 'tiny'"
        )
    return read_json_object(path)


def load_weights(module: nn.Module, weights: dict[str, Tensor], source: str) -> None:
    """Copy `weights` into `module`, if all of them fit.

    Args:
        module: the module to fill; it is unchanged if the weights do not fit.
        weights: tensors by the names of the module's state.
        source: where the weights come from, for the error message.

    Raises:
        ValueError: see `check_weights`.
    """
    check_weights(module, weights, source)
    module.load_state_dict(weights)


def check_weights(module: nn.Module, weights: dict[str, Tensor], source: str) -> None:
    """Check that every name and shape of `weights` fits `module`.

    Args:
        module: the module that the weights are for.
        weights: tensors by the names of the module's state.
        source: where the weights come from, for the error message.

    Raises:
        ValueError: a weight is missing, unknown or of another shape; the first few are named.
    """
    # All misfits are collected first: the pattern of the names often shows the cause.
    own = module.state_dict()
    problems = [f"missing {name}" for name in own if name not in weights]
    problems += [f"unexpected {name}" for name in weights if name not in own]
    for name, tensor in own.items():
        # Named above as missing.
        if name not in weights:
            continue
        expected = tuple(tensor.shape)
        got = tuple(weights[name].shape)
        if expected != got:
            problems.append(f"{name}: expected {expected}, got {got}")
    if not problems:
        return
    shown = "; ".join(problems[:SHOWN_PROBLEMS])
    if len(problems) > SHOWN_PROBLEMS:
        shown += f"; and {len(problems) - SHOWN_PROBLEMS} more"
    raise ValueError(
        f"{source} does not fit this {type(module).__name__}: {shown}. "
        "Was it saved with another config or by another program?"
    )

"""Files of weights and settings: safetensors and JSON, written whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

WEIGHTS, CONFIG = "model.safetensors", "config.json"


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A safetensors file; raises ValueError with the remedy if it is missing or damaged."""
    if not path.is_file():
        raise ValueError(f"expected a safetensors file at {path}, found none; check the path, or save the model there first")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({error}); it may be cut off: copy it again or use another checkpoint"
        ) from error


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write beside the place and move: a crash leaves the old file whole."""
    part = path.with_suffix(path.suffix + ".part")
    save_file({name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}, part)
    part.replace(path)


def write_json(value: Any, path: Path) -> None:
    """As `write_tensors`, for JSON."""
    part = path.with_suffix(path.suffix + ".part")
    part.write_text(json.dumps(value, indent=2) + "\n")
    part.replace(path)


def load_weights(module: nn.Module, weights: dict[str, Tensor], source: str) -> None:
    """Copy `weights` into `module`; see `check_weights`."""
    check_weights(module, weights, source)
    module.load_state_dict(weights)


def check_weights(module: nn.Module, weights: dict[str, Tensor], source: str) -> None:
    """Every name and shape must fit `module`; raises ValueError naming what does not."""
    own = module.state_dict()
    problems = [f"missing {name}" for name in own if name not in weights]
    problems += [f"unexpected {name}" for name in weights if name not in own]
    problems += [
        f"{name}: expected {tuple(own[name].shape)}, got {tuple(weights[name].shape)}"
        for name in own
        if name in weights and own[name].shape != weights[name].shape
    ]
    if problems:
        shown = "; ".join(problems[:4]) + (f"; and {len(problems) - 4} more" if len(problems) > 4 else "")
        raise ValueError(
            f"{source} does not fit this {type(module).__name__}: {shown}. Was it saved with another config or by another program?"
        )


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a saved model; raises ValueError if it is missing or no JSON object."""
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(f"expected a model folder with {CONFIG} and {WEIGHTS}, found no {path}; known built-in model: 'tiny'")
    try:
        fields = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}); the model folder may be damaged") from error
    if not isinstance(fields, dict):
        raise ValueError(f"expected a JSON object in {path}, got {type(fields).__name__}")
    return fields

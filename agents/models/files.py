"""Saving and loading a model: a folder with `config.json` and `model.safetensors`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

WEIGHTS, CONFIG = "model.safetensors", "config.json"
ConfigT = TypeVar("ConfigT")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A safetensors file; raises ValueError with the remedy if it is missing or damaged."""
    if not path.is_file():
        raise ValueError(f"expected a safetensors file at {path}, found none; check the path, or save the model there first")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); it may be cut off: copy it again or use another checkpoint") from error


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
    """Copy `weights` into `module`; every name and shape must fit. Raises ValueError naming what does not."""
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
        raise ValueError(f"{source} does not fit this {type(module).__name__}: {shown}. Was it saved with another config or by another program?")
    module.load_state_dict(weights)


class Saveable(Generic[ConfigT]):
    """`save_pretrained` and `from_pretrained` for a module built from one dataclass config."""

    config_class: ClassVar[type]
    config: ConfigT

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write config and weights to `folder` (made if need be); returns it."""
        assert isinstance(self, nn.Module)
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(self.state_dict(), folder / WEIGHTS)
        config = {"model": type(self).__name__} | dataclasses.asdict(self.config)  # type: ignore[call-overload]
        write_json(config, folder / CONFIG)
        return folder

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> Self:
        """Load what `save_pretrained` wrote.

        Raises:
            ValueError: a file is missing or damaged, the config is another model's, or the weights do not fit it.
        """
        folder = Path(folder)
        fields = read_config(folder)
        name = fields.pop("model", cls.__name__)
        known = {field.name for field in dataclasses.fields(cls.config_class)}
        if name != cls.__name__ or not fields.keys() <= known:
            foreign = sorted(fields.keys() - known)
            raise ValueError(f"{folder / CONFIG} describes {name!r} with unknown keys {foreign}; expected the config of a {cls.__name__}")
        model = cls(cls.config_class(**fields))
        assert isinstance(model, nn.Module)
        load_weights(model, read_tensors(folder / WEIGHTS), str(folder / WEIGHTS))
        return model.to(device=device, dtype=dtype)


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

"""Read and write weights (safetensors) and settings (JSON).

A file is written wholly or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, TensorSpec, safe_open, serialize_file
from torch import Tensor, nn

WEIGHTS = "model.safetensors"
"""Name of the weights file in a model's folder."""
CONFIG = "config.json"
"""Name of the settings file in a model's folder."""
SHOWN_PROBLEMS = 4
"""How many misfits of a weights file an error message names."""


def read_tensors(
    path: Path,
    names: Iterable[str] | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> dict[str, Tensor]:
    """Read a safetensors file into memory of its own, tensor by tensor.

    Args:
        path: the file.
        names: the tensors to read; all if left out.
        dtype: floating tensors are converted to it; if left out, they keep the file's.
        device: where the tensors are to be.

    Raises:
        ValueError: the file is missing or damaged, or does not hold one of `names`.
    """
    tensors = {}
    with _open_tensors(path, device) as file:
        held = dict.fromkeys(file.keys())
        for name in held if names is None else names:
            if name not in held:
                raise ValueError(
                    f"{path} does not contain tensor {name}; it is of another model, or the index "
                    "that names it is of other files: copy them again"
                )
            tensor = file.get_tensor(name)
            if dtype is not None and tensor.is_floating_point():
                tensor = tensor.to(dtype)
            tensors[name] = tensor
    return tensors


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Read the names and shapes of a safetensors file from its header, but no tensor.

    Raises:
        ValueError: the file is missing, damaged or cut off.
    """
    with _open_tensors(path) as file:
        names = file.keys()
        return {name: tuple(file.get_slice(name).get_shape()) for name in names}


@contextmanager
def _open_tensors(path: Path, device: str | torch.device = "cpu") -> Iterator[Any]:
    if not path.is_file():
        raise ValueError(
            f"expected a safetensors file at {path}, found none; check the path, or save the "
            "model there first"
        )
    try:
        # A mapped file ("mmap") would stay in use by its tensors, and each page that was converted
        # would stay in memory beside the result.
        with safe_open(path, "pt", device=str(device), backend="pread") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({error}); it may be cut off: copy it again "
            "or use another checkpoint"
        ) from error


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file next to `path`, then move it: a crash leaves the old file whole.

    Args:
        tensors: they may share memory, and each becomes a tensor of its own in the file.
        path: the file.

    Raises:
        OSError: the file cannot be written, for example because the disk is full.
    """
    # A tensor that lies whole in CPU memory is not copied. The list keeps those that had to be.
    kept = []
    specs = {}
    for name, tensor in tensors.items():
        whole = tensor.detach().cpu().contiguous()
        kept.append(whole)
        # `safetensors.torch.save_file` refuses tensors that share memory.
        specs[name] = TensorSpec(
            dtype=str(whole.dtype).removeprefix("torch."),
            shape=whole.shape,
            data_ptr=whole.data_ptr(),
            data_len=whole.nbytes,
        )
    part = _part_of(path)
    try:
        part.touch()
        mode = part.stat().st_mode
        serialize_file(specs, part)
        # The library leaves a file that its owner alone may read.
        part.chmod(mode)
        # A move within a folder is atomic.
        part.replace(path)
    except SafetensorError as error:
        raise OSError(f"{path} could not be written ({error})") from error
    finally:
        # Weights are large: what could not be finished does not stay.
        part.unlink(missing_ok=True)


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


def check_weights(module: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Check that every name and shape of `weights` fits `module`; see `check_shapes`.

    Args:
        module: the module that the weights are for.
        weights: tensors by the names of the module's state.
        source: where the weights come from, for the error message.

    Raises:
        ValueError: a weight is missing, unknown or of another shape; the first few are named.
    """
    check_shapes(module, {name: weight.shape for name, weight in weights.items()}, source)


def check_shapes(module: nn.Module, shapes: Mapping[str, Sequence[int]], source: str) -> None:
    """Check that weights fit `module`, before they are read.

    Args:
        module: the module that the weights are for; it may be on the device `meta`.
        shapes: of each weight, by the names of the module's state.
        source: where the weights come from, for the error message.

    Raises:
        ValueError: a weight is missing, unknown or of another shape; the first few are named.
    """
    expected = {name: tensor.shape for name, tensor in module.state_dict().items()}
    check_expected_shapes(expected, shapes, source, f"this {type(module).__name__}")


def check_expected_shapes(
    expected: Mapping[str, Sequence[int]],
    found: Mapping[str, Sequence[int]],
    source: str,
    owner: str,
) -> None:
    """Check that a file holds tensors of exactly these names and shapes.

    Args:
        expected: shapes by name.
        found: shapes by name.
        source: where they were found, for the error message.
        owner: what they are for, for the error message.

    Raises:
        ValueError: a tensor is missing, unknown or of another shape; the first few are named.
    """
    # All misfits are collected first: the pattern of the names often shows the cause.
    problems = [f"missing {name}" for name in expected if name not in found]
    problems += [f"unexpected {name}" for name in found if name not in expected]
    for name, shape in expected.items():
        # Named above as missing.
        if name not in found:
            continue
        if tuple(shape) != tuple(found[name]):
            problems.append(f"{name}: expected {tuple(shape)}, got {tuple(found[name])}")
    if not problems:
        return
    shown = "; ".join(problems[:SHOWN_PROBLEMS])
    if len(problems) > SHOWN_PROBLEMS:
        shown += f"; and {len(problems) - SHOWN_PROBLEMS} more"
    raise ValueError(
        f"{source} does not fit {owner}: {shown}. "
        "Was it saved with another config or by another program?"
    )

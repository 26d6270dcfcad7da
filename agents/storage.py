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
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

WEIGHTS = "model.safetensors"
"""Name of the weights file in a model's folder."""
CONFIG = "config.json"
"""Name of the settings file in a model's folder."""
SHOWN_PROBLEMS = 4
"""How many misfits of a weights file an error message names."""
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""What a safetensors file calls the types of its tensors."""


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
        for name in file.keys() if names is None else names:
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
    """
    layout = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    write_tensor_stream(tensors.items(), layout, path)


def write_tensor_stream(
    tensors: Iterable[tuple[str, Tensor]],
    layout: Mapping[str, tuple[torch.dtype, Sequence[int]]],
    path: Path,
) -> None:
    """Write a safetensors file from tensors that are made one at a time.

    Args:
        tensors: names and tensors, in any order; only one is in use at a time.
        layout: dtype and shape of each, because the file begins with them.
        path: the file; it is replaced when the new one is complete.

    Raises:
        ValueError: a tensor is missing, unknown, or differs from its entry in `layout`.
    """
    header, starts = _make_header(layout)
    part = _part_of(path)
    missing = set(layout)
    try:
        with part.open("wb") as file:
            file.write(header)
            for name, tensor in tensors:
                found = (tensor.dtype, tuple(tensor.shape))
                expected = layout.get(name)
                if expected is None or found != (expected[0], tuple(expected[1])):
                    raise ValueError(f"{path}: {name}: expected {expected}, got {found}")
                file.seek(len(header) + starts[name])
                file.write(_bytes_of(tensor))
                missing.discard(name)
        if missing:
            raise ValueError(f"{path}: expected {len(missing)} more tensors: {sorted(missing)[:4]}")
        # A move within a folder is atomic.
        part.replace(path)
    finally:
        # Weights are large: what could not be finished does not stay.
        part.unlink(missing_ok=True)


def _make_header(
    layout: Mapping[str, tuple[torch.dtype, Sequence[int]]],
) -> tuple[bytes, dict[str, int]]:
    """Make the first bytes of a safetensors file, and find the place of each tensor behind them."""
    fields = {}
    starts = {}
    end = 0
    # Wide types first: so each tensor starts at a multiple of its own width.
    for name, (dtype, shape) in sorted(layout.items(), key=lambda item: -item[1][0].itemsize):
        starts[name] = end
        end += dtype.itemsize * torch.Size(shape).numel()
        offsets = [starts[name], end]
        fields[name] = {"dtype": DTYPE_NAMES[dtype], "shape": [*shape], "data_offsets": offsets}
    text = json.dumps(fields, separators=(",", ":")).encode()
    # Spaces up to a multiple of eight bytes.
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, starts


def _bytes_of(tensor: Tensor) -> memoryview:
    """Give the values of a tensor as bytes, without a copy where it lies whole in CPU memory."""
    # NumPy knows no bfloat16, so the bytes are handed over as such.
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


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

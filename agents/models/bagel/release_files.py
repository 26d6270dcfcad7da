"""The files of a released BAGEL: which there are, and how to write such a folder.

`ema.safetensors` holds the model under the names of `Bagel`, `ae.safetensors` the auto-encoder.
Sizes are in `llm_config.json` and `vit_config.json`, and otherwise follow from the tensors. The
file `config.json` is never used: copies of the release differ in it, and some hold no JSON there.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from agents.models.base import UnifiedModel
from agents.models.lora import base_tensors
from agents.storage import (
    CONFIG,
    check_expected_shapes,
    read_json_object,
    read_shapes,
    read_tensors,
    write_tensors,
)

WEIGHTS = "ema.safetensors"
"""The model's weights."""
INDEX = "model.safetensors.index.json"
"""Says in which file each weight is, where there are several."""
LLM_CONFIG = "llm_config.json"
"""Sizes of the language model."""
VIT_CONFIG = "vit_config.json"
"""Sizes of the vision encoder."""
AUTOENCODER = "ae.safetensors"
"""The auto-encoder's weights."""
SMALL_FILES = (
    LLM_CONFIG,
    VIT_CONFIG,
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "preprocessor_config.json",
    # For other programs.
    CONFIG,
)
"""What `write_release` copies where it is there."""
VISION_PARTS = ("vit_model.", "connector.", "vit_pos_embed.")
"""The beginnings of the names of all weights that a model without a vision encoder lacks."""


def is_release(folder: str | Path) -> bool:
    """Whether a folder holds a model in the layout of the release."""
    folder = Path(folder)
    has_weights = (folder / WEIGHTS).is_file() or (folder / INDEX).is_file()
    return has_weights and (folder / LLM_CONFIG).is_file()


def has_release_files(folder: Path) -> bool:
    """Whether a folder is in that layout, but may lack a file."""
    return (folder / LLM_CONFIG).is_file() or (folder / WEIGHTS).is_file()


def find_weights(folder: Path, *, vision: bool = True) -> dict[str, Path]:
    """Find the file of each weight.

    Args:
        folder: with `ema.safetensors`, or an index and the files that it names.
        vision: whether those of the vision encoder are wanted too.

    Raises:
        ValueError: the index is damaged, or a file is missing or damaged.
    """
    if (folder / WEIGHTS).is_file():
        files = dict.fromkeys(read_shapes(folder / WEIGHTS), folder / WEIGHTS)
    else:
        index = read_json_object(folder / INDEX).get("weight_map")
        if not isinstance(index, dict):
            raise ValueError(
                f"expected a `weight_map` of names and files in {folder / INDEX}, got {index!r}; "
                "copy the file again"
            )
        files = {name: folder / str(file) for name, file in index.items()}
    if vision:
        return files
    return {name: path for name, path in files.items() if not name.startswith(VISION_PARTS)}


def weight_shapes(files: Mapping[str, Path]) -> dict[str, tuple[int, ...]]:
    """Read the shapes of weights from the headers of their files.

    Args:
        files: of each weight.

    Returns:
        Those that are in their file.

    Raises:
        ValueError: a file is missing or damaged.
    """
    found = {path: read_shapes(path) for path in set(files.values())}
    return {name: found[path][name] for name, path in files.items() if name in found[path]}


def read_weights(
    files: Mapping[str, Path],
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> dict[str, Tensor]:
    """Read weights tensor by tensor.

    Args:
        files: of each weight.
        dtype: they are converted to it; if left out, they keep their file's.
        device: where they are to be.

    Raises:
        ValueError: a file is missing or damaged, or a weight is not in it.
    """
    tensors = {}
    for path in dict.fromkeys(files.values()):
        names = [name for name in files if files[name] == path]
        tensors.update(read_tensors(path, names, dtype=dtype, device=device))
    return tensors


def write_release(
    model: UnifiedModel[Any], folder: str | Path, tensors: Mapping[str, Tensor]
) -> None:
    """Write a model as the release is laid out, for `load_release` and for other programs.

    Everything but the weights comes from the folder `model.source`. If the model was loaded without
    its vision encoder, the weights of that do too.

    Args:
        model: of a released folder, with adapters or without.
        folder: made if it is missing.
        tensors: all weights of the model by their names in the release.

    Raises:
        ValueError: the model comes from no released folder, a weight that is to be copied from
            there is missing, `folder` is that folder itself, or `tensors` are not the model's.
    """
    source = Path(model.source)
    folder = Path(folder)
    if not model.source or not is_release(source):
        raise ValueError(
            f"expected a model from a released folder, got one from {model.source!r}; set "
            f"`model.source` to a folder with {LLM_CONFIG} and {WEIGHTS}"
        )
    if folder.exists() and folder.samefile(source):
        raise ValueError(
            f"expected another folder than {source}, from which the model was loaded; give a new "
            "one, so that the weights there are kept"
        )
    expected = {name: tensor.shape for name, tensor in base_tensors(model).items()}
    found = {name: tensor.shape for name, tensor in tensors.items()}
    check_expected_shapes(expected, found, "what is to be written", f"this {type(model).__name__}")
    rest = {name: path for name, path in find_weights(source).items() if name not in tensors}
    # Read before anything is written: a damaged source leaves no folder behind.
    copied = read_weights(rest, dtype=next(iter(tensors.values())).dtype)
    read_shapes(source / AUTOENCODER)
    folder.mkdir(parents=True, exist_ok=True)
    for name in SMALL_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    _link(source / AUTOENCODER, folder / AUTOENCODER)
    # Last, because the folder is complete with it.
    write_tensors({**tensors, **copied}, folder / WEIGHTS)


def _link(source: Path, target: Path) -> None:
    """Let a file appear in two folders; where that is not possible, copy it."""
    target.unlink(missing_ok=True)
    try:
        # The file itself, because a link to a link would depend on the folder that it is in.
        target.hardlink_to(source.resolve())
    except OSError:
        shutil.copyfile(source, target)

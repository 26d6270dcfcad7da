"""A thinker-painter in files that transformers, diffusers and PEFT read too.

A folder holds `config.json`, `thinker/` and `painter/`. With adapters `thinker/` is a folder of
PEFT, and `painter/` one that a pipeline's `load_lora_weights` takes. Without, they hold the whole
weights of both parts, as the parts' own `save_pretrained` writes them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers.loaders import SD3LoraLoaderMixin
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from agents.models.adapter_files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    fill_adapters,
    saved_alpha,
)
from agents.models.base import UnifiedModel
from agents.models.lora import ADAPTER, adapter_weights, lora_layers
from agents.storage import read_json_object, read_tensors, write_json, write_tensors

THINKER = "thinker"
"""Folder of the language model."""
PAINTER = "painter"
"""Folder of the pipeline's transformer."""
LORA_WEIGHTS = "pytorch_lora_weights.safetensors"
"""Name of the adapters that diffusers looks for."""
LORA_METADATA = "lora_adapter_metadata"
"""Entry of that file's header in which diffusers looks for rank and alpha."""
TRANSFORMER_WEIGHTS = "diffusion_pytorch_model.safetensors"
"""Name of the whole weights of a part of diffusers."""
TRANSFORMER = "transformer"
"""Name of the painter's network, in the model, the pipeline and its folder."""
ONE_FILE = {"max_shard_size": "999GB"}
"""For `save_pretrained`: a part of one file cannot be of another training step."""
PEFT_PREFIX = "base_model.model."
"""Before the names of a model in a file of PEFT."""


def write_adapters(model: UnifiedModel[Any], pipeline: Any, folder: Path, base: str) -> None:
    """Write the adapters of both parts.

    Args:
        model: a `ThinkerPainter` with adapters.
        pipeline: the painter's.
        folder: made if it is missing.
        base: name of the model that the thinker's adapters belong to.
    """
    thinker, painter = adapter_tensors(model)
    if thinker:
        (folder / THINKER).mkdir(parents=True, exist_ok=True)
        named = {PEFT_PREFIX + name: tensor for name, tensor in thinker.items()}
        write_tensors(named, folder / THINKER / ADAPTER_WEIGHTS)
        config = {**_lora_config(model, THINKER), "base_model_name_or_path": base or None}
        write_json({**config, "task_type": "CAUSAL_LM"}, folder / THINKER / ADAPTER_CONFIG)
    if painter:
        # Some pipelines have no loader of adapters; the file is the same for all.
        writer: Any = pipeline if hasattr(pipeline, "save_lora_weights") else SD3LoraLoaderMixin
        writer.save_lora_weights(
            folder / PAINTER,
            transformer_lora_layers=painter,
            # Without it alpha would be lost, and the adapters would count with another factor.
            transformer_lora_adapter_metadata=_lora_config(model, TRANSFORMER),
        )


def adapter_tensors(model: UnifiedModel[Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The adapters of thinker and painter, under their names in each part."""
    parts: dict[str, dict[str, Tensor]] = {THINKER: {}, TRANSFORMER: {}}
    for name, weight in adapter_weights(model).items():
        part, _, own = name.removeprefix(PEFT_PREFIX).partition(".")
        parts[part][own] = weight.detach()
    return parts[THINKER], parts[TRANSFORMER]


def _lora_config(model: UnifiedModel[Any], part: str) -> dict[str, Any]:
    """The settings of one part's adapters, as PEFT writes them."""
    from peft import LoraConfig

    layers = {}
    for name, layer in lora_layers(model).items():
        owner, _, own = name.partition(".")
        if owner == part:
            layers[own] = layer
    names = sorted(layers)
    ranks = {name: layers[name].r[ADAPTER] for name in names}
    alphas = {name: layers[name].lora_alpha[ADAPTER] for name in names}
    # Those of another program may differ from layer to layer.
    rank, alpha = ranks[names[0]], alphas[names[0]]
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=names,
        rank_pattern={name: own for name, own in ranks.items() if own != rank},
        alpha_pattern={name: own for name, own in alphas.items() if own != alpha},
    )
    # PEFT makes a set of the names, which JSON does not have.
    return {**config.to_dict(), "target_modules": names}


def has_adapters_in(folder: Path) -> bool:
    """Whether `write_adapters` wrote to the folder."""
    return (folder / THINKER / ADAPTER_CONFIG).is_file() or (
        folder / PAINTER / LORA_WEIGHTS
    ).is_file()


def read_adapters(model: UnifiedModel[Any], folder: Path) -> None:
    """Fill the model's adapters, or give it such, from what `write_adapters` wrote.

    Raises:
        ValueError: a file is damaged, or the adapters do not fit; nothing has changed then.
    """
    tensors: dict[str, Tensor] = {}
    alphas: dict[str, float] = {}
    if (folder / THINKER / ADAPTER_CONFIG).is_file():
        fields = read_json_object(folder / THINKER / ADAPTER_CONFIG)
        for name, tensor in read_tensors(folder / THINKER / ADAPTER_WEIGHTS).items():
            own = name.removeprefix(PEFT_PREFIX)
            _add(tensors, alphas, f"{THINKER}.{own}", tensor, fields)
    path = folder / PAINTER / LORA_WEIGHTS
    if path.is_file():
        fields = _lora_metadata(path)
        for name, tensor in read_tensors(path).items():
            _add(tensors, alphas, name, tensor, fields)
    fill_adapters(model, tensors, alphas, f"{folder}, adapters,")


def _add(
    tensors: dict[str, Tensor],
    alphas: dict[str, float],
    name: str,
    tensor: Tensor,
    fields: Mapping[str, Any],
) -> None:
    """Add a tensor, and the alpha of its layer.

    Args:
        tensors: grows.
        alphas: grows.
        name: of the tensor, with the part that it is in.
        tensor: A or B.
        fields: settings of the part's adapters.
    """
    tensors[PEFT_PREFIX + name] = tensor
    layer, _, matrix = name.partition(".lora_")
    if matrix.startswith("A"):
        # A has as many rows as the rank. A file without alpha was made for a factor of 1.
        rank = len(tensor)
        own = layer.partition(".")[2]
        alphas[layer] = saved_alpha({"lora_alpha": rank, **fields}, own, rank)


def _lora_metadata(path: Path) -> dict[str, Any]:
    """The settings of the transformer's adapters in the header of a file; none if it has none."""
    try:
        with safe_open(path, "pt") as file:
            found = json.loads((file.metadata() or {}).get(LORA_METADATA, "{}"))
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({error}); copy it again, or use another "
            "checkpoint"
        ) from error
    prefix = f"{TRANSFORMER}."
    return {key.removeprefix(prefix): found[key] for key in found if key.startswith(prefix)}


def part_of(tensors: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    """The tensors of one part of a model, under their names in it.

    Args:
        tensors: of the model.
        part: name of a module in it.
    """
    prefix = f"{part}."
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def write_transformer(part: Any, folder: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a part of diffusers as its own `save_pretrained` does, in one file.

    Args:
        part: its class and config are written down.
        folder: made if it is missing.
        tensors: its weights.
    """
    part.save_config(folder)
    write_tensors(tensors, Path(folder) / TRANSFORMER_WEIGHTS)


def write_parts(
    thinker: nn.Module, transformer: nn.Module, folder: Path, tensors: Mapping[str, Tensor]
) -> None:
    """Write whole weights of both parts, which their own `from_pretrained` reads.

    Args:
        thinker: of transformers; its class and config are written down.
        transformer: of diffusers; likewise.
        folder: made if it is missing.
        tensors: of both, under the names of the `ThinkerPainter`.
    """
    model: Any = thinker
    model.save_pretrained(folder / THINKER, state_dict=part_of(tensors, THINKER), **ONE_FILE)
    place = folder / PAINTER / TRANSFORMER
    write_transformer(transformer, place, part_of(tensors, TRANSFORMER))


def read_parts(thinker: nn.Module, transformer: nn.Module, folder: Path) -> dict[str, Tensor]:
    """Read what `write_parts` wrote, under the names of the `ThinkerPainter`.

    Args:
        thinker: its class reads the weights, because it may rename some.
        transformer: likewise.
        folder: of both.

    Raises:
        ValueError: a file is missing or damaged.
    """
    tensors: dict[str, Tensor] = {}
    places = {
        THINKER: (thinker, folder / THINKER),
        TRANSFORMER: (transformer, folder / PAINTER / TRANSFORMER),
    }
    for name, (part, place) in places.items():
        cls: Any = type(part)
        try:
            # Without a network, which a path that is no folder would be looked for in.
            saved = cls.from_pretrained(place, dtype=part.dtype, local_files_only=True)
        except Exception as error:
            raise ValueError(
                f"expected the weights of a {cls.__name__} in {place}, got none that it reads "
                f"({error})"
            ) from error
        tensors.update({f"{name}.{key}": value for key, value in saved.state_dict().items()})
    return tensors

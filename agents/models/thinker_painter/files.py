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

from safetensors import safe_open
from torch import Tensor, nn

from agents.models.adapter_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, fill_adapters
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
        type(pipeline).save_lora_weights(
            folder / PAINTER,
            transformer_lora_layers=painter,
            # Without it alpha would be lost, and the adapters would count with another factor.
            transformer_lora_adapter_metadata=_lora_config(model, "transformer"),
        )


def adapter_tensors(model: UnifiedModel[Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The adapters of thinker and painter, under their names in each part."""
    parts: dict[str, dict[str, Tensor]] = {THINKER: {}, "transformer": {}}
    for name, weight in adapter_weights(model).items():
        part, _, own = name.removeprefix(PEFT_PREFIX).partition(".")
        parts[part][own] = weight.detach()
    return parts[THINKER], parts["transformer"]


def _lora_config(model: UnifiedModel[Any], part: str) -> dict[str, Any]:
    """The settings of one part's adapters, as PEFT writes them."""
    from peft import LoraConfig

    layers = {}
    for name, layer in lora_layers(model).items():
        owner, _, own = name.partition(".")
        if owner == part:
            layers[own] = layer
    # All adapters of an expert have one rank and one alpha.
    first: Any = next(iter(layers.values()))
    rank = first.r[ADAPTER]
    config = LoraConfig(
        r=rank, lora_alpha=first.scaling[ADAPTER] * rank, target_modules=sorted(layers)
    )
    fields = config.to_dict()
    fields["target_modules"] = sorted(layers)
    return fields


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
            _add(tensors, alphas, f"{THINKER}.{own}", tensor, fields.get("lora_alpha"))
    path = folder / PAINTER / LORA_WEIGHTS
    if path.is_file():
        alpha = _lora_metadata(path).get("transformer.lora_alpha")
        for name, tensor in read_tensors(path).items():
            _add(tensors, alphas, name, tensor, alpha)
    fill_adapters(model, tensors, alphas, f"{folder}, adapters,")


def _add(
    tensors: dict[str, Tensor], alphas: dict[str, float], name: str, tensor: Tensor, alpha: Any
) -> None:
    layer, _, matrix = name.partition(".lora_")
    tensors[PEFT_PREFIX + name] = tensor
    # A file without alpha was made for a factor of 1; A has as many rows as the rank.
    if matrix.startswith("A"):
        alphas[layer] = len(tensor) if alpha is None else float(alpha)


def _lora_metadata(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        found: dict[str, Any] = json.loads((file.metadata() or {}).get(LORA_METADATA, "{}"))
        return found


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
    parts: dict[str, dict[str, Tensor]] = {THINKER: {}, "transformer": {}}
    for name, tensor in tensors.items():
        part, _, own = name.partition(".")
        parts[part][own] = tensor
    model: Any = thinker
    # In one file, so that a part of it cannot be of another training step.
    model.save_pretrained(folder / THINKER, state_dict=parts[THINKER], max_shard_size="999GB")
    place = folder / PAINTER / "transformer"
    painter: Any = transformer
    painter.save_config(place)
    write_tensors(parts["transformer"], place / TRANSFORMER_WEIGHTS)


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
        "transformer": (transformer, folder / PAINTER / "transformer"),
    }
    for name, (part, place) in places.items():
        cls: Any = type(part)
        try:
            saved = cls.from_pretrained(place, torch_dtype="auto")
        except Exception as error:
            raise ValueError(
                f"expected the weights of a {cls.__name__} in {place}, got none that it reads "
                f"({error})"
            ) from error
        tensors.update({f"{name}.{key}": value for key, value in saved.state_dict().items()})
    return tensors

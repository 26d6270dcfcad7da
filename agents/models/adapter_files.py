"""Adapters in files, in the format of PEFT: those of a run are small, so they are saved alone."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from agents.models.base import UnifiedModel
from agents.models.lora import (
    ADAPTER,
    adapter_weights,
    has_adapters,
    inject,
    linear_layers,
    lora_layers,
    saved_names,
)
from agents.storage import (
    check_expected_shapes,
    read_json_object,
    read_tensors,
    write_json,
    write_tensors,
)

ADAPTER_WEIGHTS = "adapter_model.safetensors"
"""Name of the weights file in a folder of adapters."""
ADAPTER_CONFIG = "adapter_config.json"
"""Name of the settings file in a folder of adapters."""
SAVED_A = re.compile(r"base_model\.model\.(.+)\.lora_A\.weight")
"""The name of an A in the weights file, with the name of the layer."""


def save_adapters(model: UnifiedModel[Any], folder: str | Path) -> None:
    """Write the adapters alone, in a format that `PeftModel.from_pretrained` reads too.

    Args:
        model: with adapters. Its `source` is written down as the model that they belong to.
        folder: made if it is missing.

    Raises:
        ValueError: the model has no adapters.
    """
    if not has_adapters(model):
        raise ValueError(
            f"expected a {type(model).__name__} with adapters, got one without; add some first, or "
            "save the whole model with save_pretrained"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(dict(adapter_weights(model)), folder / ADAPTER_WEIGHTS)
    config = cast(dict[str, Any], model.peft_config)[ADAPTER]
    config.base_model_name_or_path = model.source or None
    write_json(config.to_dict(), folder / ADAPTER_CONFIG)


def load_adapters(model: UnifiedModel[Any], folder: str | Path) -> None:
    """Fill the model's adapters with saved ones; a model without adapters gets them first.

    Args:
        model: the model that the adapters were made for. It is unchanged if they do not fit.
        folder: written by `save_adapters`, or by PEFT with plain LoRA in linear layers.

    Raises:
        ValueError: a file is missing or damaged, or the adapters do not fit; the first few misfits
            are named, with expected and found shape or alpha.
    """
    folder = Path(folder)
    fields = read_json_object(folder / ADAPTER_CONFIG)
    tensors = read_tensors(folder / ADAPTER_WEIGHTS)
    ranks = _saved_ranks(tensors)
    if fields.get("peft_type") != "LORA" or "lora_alpha" not in fields or not ranks:
        raise ValueError(
            f"expected LoRA adapters of linear layers in {folder}, got "
            f"{fields.get('peft_type')!r} with {len(tensors)} tensors; other adapters of PEFT are "
            "not supported"
        )
    alphas = {name: saved_alpha(fields, name, rank) for name, rank in ranks.items()}
    source = f"{folder}, adapters of {fields.get('base_model_name_or_path')!r},"
    fill_adapters(model, tensors, alphas, source)


def fill_adapters(
    model: UnifiedModel[Any],
    tensors: Mapping[str, Tensor],
    alphas: Mapping[str, float],
    source: str,
) -> None:
    """Fill the model's adapters; a model without adapters gets them first.

    Args:
        model: it is unchanged if they do not fit.
        tensors: under the names that `adapter_weights` gives.
        alphas: by the name of the layer.
        source: what they are, for an error message.

    Raises:
        ValueError: they do not fit; the first few misfits are named.
    """
    ranks = _saved_ranks(tensors)
    if has_adapters(model):
        expected = {name: tuple(weight.shape) for name, weight in adapter_weights(model).items()}
    else:
        expected = _expected_shapes(model, ranks)
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    check_expected_shapes(expected, found, source, f"this {type(model).__name__}")
    if has_adapters(model):
        _check_alphas(model, alphas, source)
    else:
        inject(model, ranks, dict(alphas), seed=0)
    with torch.no_grad():
        for name, weight in adapter_weights(model).items():
            weight.copy_(tensors[name])


def _saved_ranks(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """The rank of each layer that a weights file names."""
    ranks: dict[str, int] = {}
    for name, tensor in tensors.items():
        match = SAVED_A.fullmatch(name)
        if match:
            ranks[match[1]] = len(tensor)
    return ranks


def saved_alpha(fields: Mapping[str, Any], name: str, rank: int) -> float:
    """The alpha of one layer.

    Args:
        fields: settings that PEFT wrote, with `lora_alpha`.
        name: of the layer.
        rank: of its adapter.
    """
    from peft.utils.other import get_pattern_key

    patterns = fields.get("alpha_pattern") or {}
    alpha: float = patterns.get(get_pattern_key(list(patterns), name), fields["lora_alpha"])
    if fields.get("use_rslora"):
        # This kind divides by the square root of the rank, ours by the rank.
        alpha *= math.sqrt(rank)
    return alpha


def _expected_shapes(
    model: UnifiedModel[Any], ranks: Mapping[str, int]
) -> dict[str, tuple[int, ...]]:
    """Shapes of adapters of these ranks, for the layers that the model has."""
    layers = linear_layers(model)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, rank in ranks.items():
        if name not in layers:
            continue
        layer = cast(nn.Linear, model.get_submodule(name))
        name_of_a, name_of_b = saved_names(name)
        shapes[name_of_a] = (rank, layer.in_features)
        shapes[name_of_b] = (layer.out_features, rank)
    return shapes


def _check_alphas(model: UnifiedModel[Any], alphas: Mapping[str, float], source: str) -> None:
    """Refuse values that would count with another factor than where they were trained."""
    for name, layer in lora_layers(model).items():
        expected = layer.scaling[ADAPTER] * layer.r[ADAPTER]
        if not math.isclose(expected, alphas[name]):
            raise ValueError(
                f"{source} does not fit this {type(model).__name__}: {name}: expected alpha "
                f"{expected:g}, got {alphas[name]:g}; give the adapters the alpha that they were "
                "trained with"
            )

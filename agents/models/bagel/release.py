"""Loads BAGEL as it was released: see `release_files` for the folder.

Nothing is held twice: the model is built without memory, names and shapes are checked against the
headers of the files, and then each tensor is read to where it stays.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from agents.models.bagel.config import BagelConfig
from agents.models.bagel.model import Bagel
from agents.models.bagel.processor import BagelProcessor
from agents.models.bagel.release_files import (
    AUTOENCODER,
    INDEX,
    LLM_CONFIG,
    VIT_CONFIG,
    WEIGHTS,
    find_weights,
    is_release,
    read_weights,
    weight_shapes,
)
from agents.models.bagel.vae import latent_sizes
from agents.models.bagel.vision import VisionConfig
from agents.storage import check_shapes, read_json_object, read_shapes

MARKERS = ["<|vision_start|>", "<|vision_end|>"]
"""The tokens around an image."""
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
"""Sizes that both JSON files hold."""

Shapes = Mapping[str, tuple[int, ...]]


def load_release(
    folder: str | Path,
    *,
    height: int | None = None,
    width: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
    vision: bool = True,
) -> Bagel:
    """Load a released folder, with a processor for its tokens and images.

    Args:
        folder: with `llm_config.json` and `ema.safetensors`, or an index of several files.
        height: of the images that are drawn, in pixels; a multiple of 16. If left out, it is the
            largest for which there are positions: 1024 for the release.
        width: likewise.
        dtype: of the weights, and so of the computations.
        device: where the weights are to be.
        vision: whether the model gets its vision encoder.

    Raises:
        ValueError: a file is missing or damaged, the weights do not fit the sizes, the tokenizer
            lacks a token, or there are no positions for an image of this size.
    """
    folder = Path(folder)
    if not is_release(folder):
        found = [name for name in (LLM_CONFIG, WEIGHTS, INDEX) if (folder / name).is_file()]
        raise ValueError(
            f"expected a released BAGEL in {folder}, with {LLM_CONFIG}, and {WEIGHTS} or {INDEX}, "
            f"found {' and '.join(found) or 'none of them'}; check the path, or copy the missing "
            "file there"
        )
    files = find_weights(folder, vision=vision)
    shapes = weight_shapes(files)
    config = _read_sizes(folder, shapes, vision)
    largest = config.token_side * config.max_latent_size
    config = config.with_image_size(
        largest if height is None else height, largest if width is None else width
    )
    processor = BagelProcessor.from_release(folder, config, device=device)
    start, end = processor.tokenizer.convert_tokens_to_ids(MARKERS)
    config = replace(config, image_start_id=start, image_end_id=end)
    with torch.device("meta"):
        model = Bagel(config)
    check_shapes(model, shapes, str(folder))
    model.load_state_dict(read_weights(files, dtype=dtype, device=device), assign=True)
    # The buffers, which no file holds.
    model.to(device)
    model.processor = processor
    # Absolute, because it is looked for again when the model is saved.
    model.source = str(folder.absolute())
    return model


def _read_sizes(folder: Path, shapes: Shapes, vision: bool) -> BagelConfig:
    """Take all sizes but that of the images from the JSON files and the shapes of the tensors."""
    path = folder / LLM_CONFIG
    fields = read_json_object(path)
    source = str(folder)
    latent_dim = _shape(shapes, "vae2llm.weight", source)[1]
    channels, downsampling = latent_sizes(read_shapes(folder / AUTOENCODER))
    # Values of a channel in a latent token; no file says how many.
    square = BagelConfig.latent_patch_size**2
    if latent_dim != channels * square:
        raise ValueError(
            f"expected an auto-encoder of {latent_dim // square} channels in {folder}, as the "
            f"model takes them, got {channels}; copy {AUTOENCODER} of the same release"
        )
    return BagelConfig(
        vocab_size=_shape(shapes, "language_model.model.embed_tokens.weight", source)[0],
        **_integers(fields, (*SIZES, "num_key_value_heads"), path),
        rope_theta=_rope_theta(fields, path),
        rms_norm_eps=fields.get("rms_norm_eps", BagelConfig.rms_norm_eps),
        hidden_act=fields.get("hidden_act", BagelConfig.hidden_act),
        z_channels=channels,
        downsampling=downsampling,
        max_latent_size=_side(shapes, "latent_pos_embed.pos_embed", source),
        vision=_read_vision_sizes(folder, shapes) if vision else None,
    )


def _read_vision_sizes(folder: Path, shapes: Shapes) -> VisionConfig:
    path = folder / VIT_CONFIG
    fields = read_json_object(path)
    sizes = _integers(fields, (*SIZES, "image_size", "patch_size"), path)
    # The last layer is counted, but it is not used and not in the weights.
    sizes["num_hidden_layers"] -= 1
    return VisionConfig(
        **sizes,
        layer_norm_eps=fields.get("layer_norm_eps", VisionConfig.layer_norm_eps),
        hidden_act=fields.get("hidden_act", VisionConfig.hidden_act),
        max_patches=_side(shapes, "vit_pos_embed.pos_embed", str(folder)),
    )


def _integers(fields: Mapping[str, Any], keys: Iterable[str], path: Path) -> dict[str, Any]:
    for key in keys:
        if not isinstance(fields.get(key), int):
            raise ValueError(
                f"expected a whole number as {key!r} in {path}, got {fields.get(key)!r}; use the "
                "file of the release"
            )
    return {key: fields[key] for key in keys}


def _rope_theta(fields: Mapping[str, Any], path: Path) -> float:
    """The base of the rotary positions, under its old key or in the form of transformers 5."""
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    theta = rope.get("rope_theta", fields.get("rope_theta"))
    if kind != "default" or theta is None:
        raise ValueError(
            f"expected plain rotary positions with a 'rope_theta' in {path}, got {kind!r} with "
            f"{theta!r}; use the file of the release"
        )
    return float(theta)


def _shape(shapes: Shapes, name: str, source: str) -> tuple[int, ...]:
    if name not in shapes:
        hint = "copy the files of the release again"
        if name.startswith("vit"):
            hint = "load it with vision=False if it has no vision encoder"
        raise ValueError(f"{source} does not fit a Bagel: missing {name}; {hint}")
    return shapes[name]


def _side(shapes: Shapes, name: str, source: str) -> int:
    """Rows and columns of a square position table, which has one entry for each place."""
    entries = _shape(shapes, name, source)[0]
    side = math.isqrt(entries)
    if side * side != entries:
        raise ValueError(
            f"{source}: {name}: expected as many entries as a square has places, got {entries}; "
            "was it saved by another program?"
        )
    return side

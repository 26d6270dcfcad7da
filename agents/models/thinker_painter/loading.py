"""From folders, ids of the hub and registered names to a thinker-painter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
)
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from agents.models.thinker_painter.config import INSIDE, ThinkerPainterConfig
from agents.models.thinker_painter.files import PAINTER, THINKER
from agents.models.thinker_painter.model import ThinkerPainter
from agents.models.thinker_painter.painter import Painter
from agents.models.thinker_painter.vision import Vision
from agents.storage import read_json_object
from rewards.registry import Registry

ENCODER = "text_encoder"
"""The part of a pipeline that may be a language model."""
HALF = (0.5, 0.5, 0.5)

PAINTERS: Registry[Callable[[], DiffusionPipeline]] = Registry(
    "painter", entry_point_group="unigrpo.painters"
)
"""Functions that make a pipeline, by a name that stands in place of a folder."""
THINKERS: Registry[Callable[[], tuple[nn.Module, Any]]] = Registry(
    "thinker", entry_point_group="unigrpo.thinkers"
)
"""Functions that make a language model and its tokenizer, likewise."""


def load_thinker_painter(
    thinker: str = INSIDE,
    painter: str = "",
    *,
    height: int | None = None,
    width: int | None = None,
    tells: str = "prompt_and_answer",
    reads_base: bool = False,
    strict: bool = False,
    thinking: bool | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    **rest: Any,
) -> ThinkerPainter:
    """Put a language model and a pipeline together.

    Args:
        thinker: folder, id of the hub or registered name; `inside`: the painter's text encoder.
        painter: likewise, of a pipeline.
        height: of the images, in pixels; the pipeline's own if left out.
        width: likewise.
        tells: what the painter is told, see `Telling`.
        reads_base: see `ThinkerPainterConfig`.
        strict: likewise.
        thinking: likewise.
        dtype: of all weights.
        device: of all parts.
        **rest: further fields of `ThinkerPainterConfig`.

    Raises:
        ValueError: a part is not there, or the two do not fit, see `ThinkerPainter`.
    """
    if not painter:
        raise ValueError(
            "expected a painter, got none; give the folder or the hub id of a diffusers pipeline "
            "as model.painter"
        )
    config = ThinkerPainterConfig(
        thinker, painter, height, width, tells, reads_base, strict, thinking, **rest
    )
    return build(config, dtype=dtype, device=device)


def build(
    config: ThinkerPainterConfig,
    folder: Path | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> ThinkerPainter:
    """Load the parts that a config names.

    Args:
        config: of the model.
        folder: where parts that were made in memory were saved.
        dtype: of all weights.
        device: of all parts.
    """
    painter_name, thinker_name = config.painter, config.thinker
    if folder is not None:
        painter_name = painter_name or str(folder / PAINTER)
        thinker_name = thinker_name or str(folder / THINKER)
    parts: dict[str, Any] = {}
    tokenizer = None
    thinker: Any = None
    if thinker_name != INSIDE:
        thinker, tokenizer = _load_thinker(thinker_name, dtype)
    elif painter_name not in PAINTERS:
        thinker = _load(painter_name, dtype, subfolder=ENCODER)
        parts[ENCODER] = _in_the_class_of(painter_name, thinker)
    pipeline = _load_painter(painter_name, dtype, parts)
    if thinker is None:
        # A registered pipeline brings a text encoder that can write.
        thinker = pipeline.components[ENCODER]
    if folder is not None and (folder / THINKER / "tokenizer_config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(folder / THINKER)
    elif tokenizer is None:
        tokenizer = pipeline.components["tokenizer"]
    painter = Painter(pipeline, config.height, config.width, strict=config.strict, **config.call)
    vision = _find_vision(thinker, pipeline)
    model = ThinkerPainter(thinker, painter, tokenizer, config, vision=vision)
    return model.cast_weights(dtype).to(device)


def _load_thinker(name: str, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    if name in THINKERS:
        return THINKERS[name]()
    model = _load(name, dtype)
    try:
        return model, AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the tokenizer of the thinker {name!r} cannot be read ({error}); copy its files into "
            "the model's folder"
        ) from error


def _load(name: str, dtype: torch.dtype, **options: Any) -> nn.Module:
    """A language model, one that sees where the config says so."""
    try:
        config = AutoConfig.from_pretrained(name, **options)
        kind: Any = AutoModelForCausalLM
        if hasattr(config, "vision_config"):
            kind = AutoModelForImageTextToText
        model: nn.Module = kind.from_pretrained(name, dtype=dtype, **options)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the thinker {name!r} cannot be loaded ({_first_line(error)}); give a folder, or the "
            "id of a model of the hub that was downloaded or can be"
        ) from error
    return model


def _in_the_class_of(painter: str, model: nn.Module) -> nn.Module:
    """The part of the thinker that has the class which the pipeline was saved with."""
    saved = DiffusionPipeline.load_config(painter).get(ENCODER)
    if saved is None:
        raise ValueError(
            f"expected a painter with a text encoder that can write, got {painter!r} without one; "
            "give a thinker of its own"
        )
    for part in (model, getattr(model, "base_model", None)):
        if type(part).__name__ == saved[1]:
            return part  # type: ignore[return-value]
    raise ValueError(
        f"expected {saved[1]}, the text encoder of {painter!r}, as a part of a language model, got "
        f"{type(model).__name__}; give a thinker of its own"
    )


def _load_painter(name: str, dtype: torch.dtype, parts: dict[str, Any]) -> Any:
    if name in PAINTERS:
        return PAINTERS[name]()
    try:
        return DiffusionPipeline.from_pretrained(name, torch_dtype=dtype, **parts)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the painter {name!r} cannot be loaded ({_first_line(error)}); give the folder of a "
            "diffusers pipeline, or the id of one of the hub that was downloaded or can be"
        ) from error


def _find_vision(model: nn.Module, pipeline: Any) -> Vision | None:
    """How the thinker sees, with the numbers of its image processor."""
    config: Any = model.config
    # Those of Qwen2.5-VL; Qwen3-VL and later ones take plain halves.
    mean, std = tuple(OPENAI_CLIP_MEAN), tuple(OPENAI_CLIP_STD)
    if "qwen3" in config.model_type:
        mean = std = HALF
    folder = Path(config.name_or_path or "")
    processor = getattr(pipeline.components.get("processor"), "image_processor", None)
    if (folder / "preprocessor_config.json").is_file():
        fields = read_json_object(folder / "preprocessor_config.json")
        mean, std = tuple(fields.get("image_mean", mean)), tuple(fields.get("image_std", std))
    elif processor is not None:
        mean, std = tuple(processor.image_mean), tuple(processor.image_std)
    return Vision.of(config, mean, std)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", maxsplit=1)[0]

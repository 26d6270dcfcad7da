"""From folders, ids of the hub and registered names to a thinker-painter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
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

from agents.models.thinker_painter.config import INSIDE, SYSTEM_PROMPT, ThinkerPainterConfig
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
PAINTERS.add("shapes", "agents.models.thinker_painter.tiny_shapes:make_painter")
THINKERS: Registry[Callable[[], tuple[nn.Module, Any]]] = Registry(
    "thinker", entry_point_group="unigrpo.thinkers"
)
"""Functions that make a language model and its tokenizer, likewise."""
THINKERS.add("shapes", "agents.models.thinker_painter.tiny_shapes:make_thinker")


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
    system: str = SYSTEM_PROMPT,
    call: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
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
        system: likewise.
        call: likewise.
        dtype: of all weights.
        device: of all parts.

    Raises:
        ValueError: a part is not there, or the two do not fit, see `ThinkerPainter`.
    """
    if not painter:
        raise ValueError(
            "expected a painter, got none; give the folder or the hub id of a diffusers pipeline "
            "as model.painter"
        )
    config = ThinkerPainterConfig(
        source_of_part(thinker, THINKERS),
        source_of_part(painter, PAINTERS),
        height,
        width,
        tells,
        reads_base,
        strict,
        thinking,
        system,
        call or {},
    )
    return build(config, dtype=dtype, device=device)


def source_of_part(name: str, known: Registry[Any]) -> str:
    """What is written down of a part's name: a folder's is absolute, to be found from anywhere.

    Args:
        name: folder, id of the hub, registered name or `inside`.
        known: names of which none is a folder.
    """
    if name in known or name == INSIDE or not Path(name).is_dir():
        return name
    return str(Path(name).absolute())


def with_moved_parts(
    config: ThinkerPainterConfig, thinker: str | None, painter: str | None, folder: Path
) -> ThinkerPainterConfig:
    """A saved config with the places to which its parts were moved.

    Args:
        config: as it was saved.
        thinker: where it is now; None: where it was.
        painter: likewise.
        folder: that the config is in, for the error message.

    Raises:
        ValueError: another part is given than the one that was saved, which is still there.
    """
    for part, given, known in (("thinker", thinker, THINKERS), ("painter", painter, PAINTERS)):
        if given is None:
            continue
        saved = getattr(config, part)
        source = source_of_part(given, known)
        was_moved = saved not in (INSIDE, "") and saved not in known and not Path(saved).is_dir()
        if source != saved and not was_moved:
            raise ValueError(
                f"expected the {part} {saved or 'that was made in memory'!r}, to which the weights "
                f"in {folder} belong, got {given!r}; leave it out, or start from another model"
            )
        change: dict[str, Any] = {part: source}
        config = replace(config, **change)
    return config


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
        folder: where the model was saved whole, with those parts that were made in memory.
        dtype: of all weights.
        device: of all parts.

    Raises:
        ValueError: a part is not there, or does not fit the other.
    """
    painter_name, thinker_name = config.painter, config.thinker
    if folder is not None:
        painter_name = painter_name or str(folder / PAINTER)
        thinker_name = thinker_name or str(folder / THINKER)
    if not painter_name or not thinker_name:
        raise ValueError(
            "expected the names of thinker and painter in the config, got none for a part that was "
            "made in memory; save the model whole, and add adapters to the model of that folder"
        )
    tokenizer = None
    thinker: Any = None
    parts: dict[str, Any] = {}
    if thinker_name != INSIDE:
        thinker, tokenizer = _load_thinker(thinker_name, dtype)
    elif painter_name not in PAINTERS:
        thinker, parts[ENCODER] = _load_inside(painter_name, dtype)
    pipeline = _load_painter(painter_name, dtype, parts)
    if thinker is None:
        thinker = _with_head(pipeline.components[ENCODER])
    if folder is not None and (folder / THINKER / "tokenizer_config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(folder / THINKER)
    elif tokenizer is None:
        tokenizer = pipeline.components["tokenizer"]
    # Before the painter is tried out: a forward of a large one takes minutes on a CPU.
    pipeline.to(device)
    painter = Painter(pipeline, config.height, config.width, strict=config.strict, **config.call)
    vision = _find_vision(thinker, pipeline)
    model = ThinkerPainter(thinker, painter, tokenizer, config, vision=vision)
    return model.cast_weights(dtype).to(device)


def _with_head(encoder: nn.Module) -> nn.Module:
    """A registered pipeline's text encoder, as a language model that has its embeddings as head."""
    part: Any = encoder
    if part.get_output_embeddings() is not None or not part.config.tie_word_embeddings:
        return part
    model: Any = AutoModelForCausalLM.from_config(part.config)
    setattr(model, model.base_model_prefix, part)
    model.tie_weights()
    return model


def _load_thinker(name: str, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    """A language model and its tokenizer."""
    if name in THINKERS:
        return THINKERS[name]()
    try:
        model = _load(name, dtype)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the thinker {name!r} cannot be loaded ({_first_line(error)}); give a folder, or the "
            "id of a model of the hub that was downloaded or can be"
        ) from error
    try:
        _check_tokenizer(Path(name))
        return model, AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the tokenizer of the thinker {name!r} cannot be read ({_first_line(error)}); copy "
            "its files into the model's folder"
        ) from error


def _check_tokenizer(folder: Path) -> None:
    """Transformers makes up an empty tokenizer where a folder has none."""
    patterns = ("tokenizer*", "vocab*")
    if folder.is_dir() and not any(path for name in patterns for path in folder.glob(name)):
        raise ValueError("there is none in the folder")


def _load(name: str, dtype: torch.dtype, **options: Any) -> nn.Module:
    """A language model, one that sees where the config says so."""
    config = AutoConfig.from_pretrained(name, **options)
    kind: Any = AutoModelForCausalLM
    if hasattr(config, "vision_config"):
        kind = AutoModelForImageTextToText
    model: nn.Module
    model, found = kind.from_pretrained(name, dtype=dtype, output_loading_info=True, **options)
    missing = sorted(found["missing_keys"])
    if missing:
        # Transformers fills them with random values.
        raise ValueError(
            f"expected all weights of a {type(model).__name__}, found no {', '.join(missing[:3])}"
        )
    return model


def _load_inside(painter: str, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """A painter's text encoder as a language model, and as the pipeline takes it."""
    saved = _pipeline_config(painter).get(ENCODER)
    advice = "give a thinker of its own (model.thinker)"
    if saved is None:
        raise ValueError(
            f"expected a painter with a text encoder that can write, got {painter!r} without one; "
            f"{advice}"
        )
    try:
        model = _load(painter, dtype, subfolder=ENCODER)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"expected a painter whose text encoder can write, got {painter!r} with a {saved[1]} "
            f"({_first_line(error)}); {advice}"
        ) from error
    for part in (model, getattr(model, "base_model", None)):
        if part is not None and type(part).__name__ == saved[1]:
            return model, part
    raise ValueError(
        f"expected {saved[1]}, the text encoder of {painter!r}, as a part of a language model, got "
        f"{type(model).__name__}; {advice}"
    )


def _pipeline_config(name: str) -> dict[str, Any]:
    """The classes of a pipeline's parts, by name."""
    try:
        found: dict[str, Any] = DiffusionPipeline.load_config(name)
    except (OSError, ValueError) as error:
        raise _no_painter(name, error) from error
    return found


def _load_painter(name: str, dtype: torch.dtype, parts: dict[str, Any]) -> Any:
    if name in PAINTERS:
        return PAINTERS[name]()
    _pipeline_config(name)
    try:
        return DiffusionPipeline.from_pretrained(name, dtype=dtype, **parts)
    except (OSError, ValueError) as error:
        raise _no_painter(name, error) from error


def _no_painter(name: str, error: Exception) -> ValueError:
    return ValueError(
        f"the painter {name!r} cannot be loaded ({_first_line(error)}); give the folder of a "
        "diffusers pipeline, or the id of one of the hub that was downloaded or can be"
    )


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

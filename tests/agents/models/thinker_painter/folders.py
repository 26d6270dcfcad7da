"""Folders that hold the parts of a model, as users have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from tiny import FAMILIES, INSIDE, make_thinker
from tiny_parts import chat_tokenizer

from agents.models.registry import load_model
from agents.models.thinker_painter.model import ThinkerPainter

HEADLESS = ("zimage", "sana", "lumina2")
"""Families whose releases hold a text encoder without its head."""


def save_parts(folder: Path, name: str) -> dict[str, Any]:
    """Save a pipeline, and a thinker beside it where the family has none inside.

    Args:
        folder: new.
        name: one of `FAMILIES`.

    Returns:
        Arguments of `load_model("thinker_painter", ...)`.
    """
    pipeline, call = FAMILIES[name]()
    if name in HEADLESS:
        pipeline.text_encoder = getattr(pipeline.text_encoder, "model", pipeline.text_encoder)
        # Gemma's own tokenizer in these families has a template.
        pipeline.tokenizer.chat_template = chat_tokenizer().chat_template
    pipeline.save_pretrained(folder / "pipeline")
    options = {"painter": str(folder / "pipeline"), "height": call.pop("height")}
    options |= {"width": call.pop("width"), "call": call}
    if name not in (*INSIDE, *HEADLESS):
        options["thinker"] = str(save_thinker(folder / "lm"))
    return options


def save_thinker(folder: Path, **changes: Any) -> Path:
    """Save a small Qwen3 with its tokenizer.

    Args:
        folder: new.
        **changes: of its config.
    """
    thinker = make_thinker()
    if changes:
        fields = {**thinker.config.to_dict(), **changes}
        thinker = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**fields))
    thinker.save_pretrained(folder)
    chat_tokenizer().save_pretrained(folder)
    return folder


def load_parts(options: dict[str, Any], **more: Any) -> ThinkerPainter:
    """The model of what `save_parts` saved."""
    model = load_model("thinker_painter", **options, **more)
    assert isinstance(model, ThinkerPainter)
    return model

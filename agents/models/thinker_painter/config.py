"""Where the parts of a thinker-painter come from."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import Any

from agents.models.thinker_painter.painter import Painter

INSIDE = "inside"
"""Stands for the painter's own text encoder as the thinker."""
SYSTEM_PROMPT = (
    "You help to paint images. Think about what the user asks for, then answer with one full "
    "description of the image: every object with its count, colour and place. Another model "
    "paints the image from your answer."
)
"""What an instruction-tuned thinker reads first; a default, because no model was trained on it."""


@dataclass(frozen=True)
class ThinkerPainterConfig:
    """Where the parts come from, and how they are put together.

    Attributes:
        thinker: folder, hub id or registered name of a causal language model; `inside`: the
            painter's own text encoder; empty: it was made in memory.
        painter: likewise, of a pipeline.
        height: of the images, in pixels; None for the pipeline's own.
        width: likewise.
        tells: what the painter is told, see `Telling`.
        reads_base: whether a thinker that is the text encoder reads without its adapters, where it
            has some, so that what the painter is told does not drift while it learns.
        strict: whether a text that the painter would cut off is an error.
        thinking: the option `enable_thinking` of the chat template; None for its own default.
        system: what the thinker reads before a prompt.
        call: further arguments of the pipeline's call.
        budgets: of scenarios, see `Processor.scenario_defaults`; empty: those of chat models.
        base: folder of a saved model whose whole weights stand in place of those of the parts;
            empty: the weights are the parts' own, or beside this config.
    """

    thinker: str = ""
    painter: str = ""
    height: int | None = None
    width: int | None = None
    tells: str = "prompt_and_answer"
    reads_base: bool = False
    strict: bool = False
    thinking: bool | None = None
    system: str = SYSTEM_PROMPT
    call: dict[str, Any] = field(default_factory=dict)
    budgets: dict[str, int] = field(default_factory=dict)
    base: str = field(default="", compare=False)

    def of_painter(self, painter: Painter) -> ThinkerPainterConfig:
        """The same with what a painter was made with."""
        height, width = painter.image_size
        # As it comes back from a file: a tuple is a list there.
        call = json.loads(json.dumps(painter.given))
        return replace(self, height=height, width=width, strict=painter.strict, call=call)

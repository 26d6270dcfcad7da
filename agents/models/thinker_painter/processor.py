"""How a chat model's words and a pipeline's images are written down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torch import Tensor

from agents.models.thinker_painter.chat import ChatLayout
from agents.models.thinker_painter.config import SYSTEM_PROMPT
from agents.models.thinker_painter.painter import Painter
from unigrpo_env.flow_time import time_grid
from unigrpo_env.processor import Processor

ENDS = ("<|endoftext|>", "<|end_of_text|>")
"""Tokens at the end of a document, of the families of Qwen and Llama."""
SHIFT_STEPS = 10
"""Steps of the grid from which `time_shift` is read."""


class PainterProcessor(Processor):
    """The chat template of the thinker, and grid and auto-encoder of the painter.

    The token that ends an answer in the template opens the image.

    Args:
        tokenizer: of the thinker, with a chat template.
        painter: of the images.
        vocab_size: entries of the thinker's logits; those beyond the tokenizer's are never sampled.
        reads_images: whether thinker or painter reads images.
        chat_options: further arguments of the template, such as `enable_thinking`.
        system: a system text for prompts whose scenario has none of its own.
        budgets: in place of `scenario_defaults`.

    Raises:
        ValueError: the tokenizer has no chat template, or more tokens than the model.
    """

    scenario_defaults: Mapping[str, int] = MappingProxyType(
        {"prompt_budget": 320, "text_budget": 256, "turn_budget": 128, "image_steps": 20}
    )

    def __init__(
        self,
        tokenizer: Any,
        painter: Painter,
        vocab_size: int,
        *,
        reads_images: bool = False,
        chat_options: Mapping[str, Any] | None = None,
        system: str = SYSTEM_PROMPT,
        budgets: Mapping[str, int] | None = None,
    ) -> None:
        if len(tokenizer) > vocab_size:
            raise ValueError(
                f"expected a tokenizer of at most {vocab_size} tokens, as many as the thinker has, "
                f"got {len(tokenizer)}; are tokenizer and weights of one model?"
            )
        self.tokenizer = tokenizer
        self.painter = painter
        self.vocab_size = vocab_size
        self.layout = ChatLayout(tokenizer, chat_options)
        self.system = system
        if budgets is not None:
            # A plain one, because a model is copied with its processor.
            self.scenario_defaults = dict(budgets)
        self._set_marks(reads_images)
        self.latent_shape = painter.latent_shape
        self.image_size = painter.image_size
        self.pixel_size = painter.image_size if reads_images else None
        self.time_shift = _fitted_shift(painter.time_grid(SHIFT_STEPS))

    def _set_marks(self, reads_images: bool) -> None:
        """Give each task of a mark a token of its own."""
        tokenizer = self.tokenizer
        added = tokenizer.added_tokens_decoder.items()
        special = {index for index, token in added if token.special}
        self._special_ids = frozenset(special | set(tokenizer.all_special_ids))
        self.open_image_id = self.layout.end
        end = tokenizer.eos_token_id
        if end == self.open_image_id:
            # Many chat models were trained to close a document with another token.
            vocabulary = tokenizer.get_vocab()
            end = next((vocabulary[name] for name in ENDS if name in vocabulary), None)
        self.end_id = end
        # Tokens that no text holds, the most suitable first.
        unused = [tokenizer.pad_token_id, *range(len(tokenizer), self.vocab_size)]
        unused += sorted(self._special_ids - {tokenizer.bos_token_id, tokenizer.unk_token_id})
        taken = {self.open_image_id, self.end_id, None}
        free = [index for index in dict.fromkeys(unused) if index not in taken]
        needed = 2 if reads_images else 1
        if len(free) < needed:
            raise ValueError(
                f"expected {needed} tokens that no text holds beside those that end an answer and "
                f"a document, got {len(free)}; add special tokens to the tokenizer"
            )
        self.pad_id = free[0]
        self.image_id = free[1] if reads_images else None

    def encode_text(self, text: str) -> list[int]:
        """See `Processor`."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def decode_text(self, ids: Sequence[int]) -> str:
        """See `Processor`."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def encode_prompt(
        self, text: str, *, sources: int = 0, system: str = "", thinks: bool = True
    ) -> list[int]:
        """The template's text; sources stand before the words of the user."""
        first, opening, rest = self.layout.prompt(text, system, thinks)
        # By itself, so that its length is known.
        ids = self.encode_text(first)
        if sources == 0:
            return ids + self.encode_text(opening + rest)
        # A scenario with sources refuses a processor without `image_id`.
        assert self.image_id is not None
        ids += self.encode_text(opening)
        return [*ids, *[self.image_id] * sources, *self.encode_text(rest)]

    def system_length(self, system: str) -> int:
        """The system's message stands first."""
        return len(self.encode_text(self.layout.system(system)))

    def opening_length(self, thinks: bool = True) -> int:
        """What the template writes before an answer."""
        if not thinks:
            return 0
        return len(self.encode_text(self.layout.answering))

    def encode_turn(self, text: str, *, thinks: bool = True) -> list[int]:
        """The end of the answer before it, and the user's message."""
        return self.encode_text(self.layout.turn(text, thinks))

    def continuation_ids(self, thinks: bool = True) -> tuple[int, ...]:
        """The opening of another answer."""
        if not thinks:
            return ()
        return tuple(self.encode_text(self.layout.answering))

    def system_prompt(self, *, thinks: bool, draws: bool) -> str:
        """A text that asks for a description of the image; empty where none is drawn."""
        return self.system if thinks and draws else ""

    def forbidden_ids(self, reads_images: bool = False) -> tuple[int, ...]:
        """Every special token but the one that ends an answer, and entries that no text has."""
        unused = range(len(self.tokenizer), self.vocab_size)
        marks = self.control_ids() | set(unused)
        return tuple(sorted(marks - {self.open_image_id}))

    def control_ids(self) -> frozenset[int]:
        """All special tokens, and those that the env sets."""
        return super().control_ids() | self._special_ids | {self.pad_id}

    def describe_token(self, token: int) -> str:
        """The token in letters."""
        return self.tokenizer.decode([token])

    def decode_latents(self, latents: Tensor) -> Tensor:
        """See `Processor`."""
        return self.painter.decode(latents)

    def encode_images(self, images: Tensor) -> Tensor:
        """See `Processor`."""
        return self.painter.encode_images(images)

    def view_images(self, images: Tensor) -> Tensor:
        """The image's own pixels; a thinker that sees another size resizes them."""
        if self.pixel_size is None:
            return super().view_images(images)
        return (images * 255).round().byte()

    def time_grid(self, steps: int, shift: float | None = None) -> tuple[float, ...]:
        """The pipeline's own schedule, unless a shift is given."""
        if shift is not None:
            return tuple(time_grid(steps, shift).tolist())
        return self.painter.time_grid(steps)


def _fitted_shift(times: Sequence[float]) -> float:
    """The shift of the grid that has the same time in the middle."""
    middle = times[len(times) // 2]
    # With `shift_time(1/2, s) = s / (1 + s)`.
    return middle / (1 - middle)

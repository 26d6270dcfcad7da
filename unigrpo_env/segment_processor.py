"""The layout of BAGEL (arXiv 2505.14683): every text is a segment `<bos> words <eos>`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from unigrpo_env.pixel_latents import PixelLatents
from unigrpo_env.processor import Processor


class SegmentProcessor(Processor):
    """A tokenizer with `<bos>` and `<eos>`; `<eos>` closes a thought and opens the image.

    How images become latents is left to a subclass.

    Args:
        tokenizer: of transformers; its vocabulary may have the two tokens below.
        vocab_size: of the model, at least the tokenizer's; further entries are never sampled.
        image_token: stands in the stream for an image to be read.
        end_token: ends the episode.
    """

    def __init__(
        self,
        tokenizer: Any,
        vocab_size: int,
        *,
        image_token: str = "<image>",
        end_token: str = "<end>",
    ) -> None:
        vocabulary = tokenizer.get_vocab()
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.pad_id = tokenizer.pad_token_id
        self.bos_id = tokenizer.bos_token_id
        self.open_image_id = tokenizer.eos_token_id
        self.image_id = vocabulary.get(image_token)
        self.end_id = vocabulary.get(end_token)

    def encode_text(self, text: str) -> list[int]:
        """See `Processor`."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def decode_text(self, ids: Sequence[int]) -> str:
        """See `Processor`."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def encode_segment(self, text: str) -> list[int]:
        """`<bos> words <eos>`."""
        return [self.bos_id, *self.encode_text(text), self.open_image_id]

    def encode_prompt(
        self, text: str, *, sources: int = 0, system: str = "", thinks: bool = True
    ) -> list[int]:
        """The system's segment, the sources, the prompt's segment, and `<bos>` of the thought."""
        ids: list[int] = []
        if system:
            ids += self.encode_segment(system)
        if sources:
            # A scenario with sources refuses a processor without `image_id`.
            assert self.image_id is not None
            ids += [self.image_id] * sources
        if text:
            ids += self.encode_segment(text)
        # Without any text the model still reads a segment, an empty one.
        if not ids:
            ids = [self.bos_id, self.open_image_id]
        return [*ids, *self.continuation_ids(thinks)]

    def system_length(self, system: str) -> int:
        """The system's segment stands first."""
        if not system:
            return 0
        return len(self.encode_segment(system))

    def opening_length(self, thinks: bool = True) -> int:
        """`<bos>` of the thought."""
        return len(self.continuation_ids(thinks))

    def encode_turn(self, text: str, *, thinks: bool = True) -> list[int]:
        """The user's segment, and `<bos>` of the next thought."""
        return [*self.encode_segment(text), *self.continuation_ids(thinks)]

    def continuation_ids(self, thinks: bool = True) -> tuple[int, ...]:
        """`<bos>` of the next thought, if there is one."""
        if thinks:
            return (self.bos_id,)
        return ()

    def control_ids(self) -> frozenset[int]:
        """See `Processor`; `<bos>` is one of them."""
        return super().control_ids() | {self.bos_id}

    def describe_token(self, token: int) -> str:
        """The token in letters."""
        return self.tokenizer.decode([token])

    def unknown_words(self, text: str) -> list[str]:
        """Words that are not in the vocabulary."""
        unknown = [self.tokenizer.unk_token_id]
        return [word for word in text.split() if self.encode_text(word) == unknown]


class PixelProcessor(SegmentProcessor):
    """The same layout with pixels for latents: base class of the worlds of this package.

    Args:
        tokenizer: see `SegmentProcessor`.
        latents: how images become latents.
        vocab_size: see `SegmentProcessor`.
    """

    def __init__(self, tokenizer: Any, latents: PixelLatents, vocab_size: int) -> None:
        super().__init__(tokenizer, vocab_size)
        self.latents = latents
        self.latent_shape = latents.latent_shape
        self.image_size = (latents.height, latents.width)

    def encode_images(self, images: Tensor) -> Tensor:
        """See `Processor`."""
        return self.latents.encode(images)

    def decode_latents(self, latents: Tensor) -> Tensor:
        """See `Processor`."""
        return self.latents.decode(latents)

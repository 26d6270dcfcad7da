"""How the shapes world is written down: one token a word, pixels for latents."""

from __future__ import annotations

from unigrpo_env.pixel_latents import PixelLatents
from unigrpo_env.segment_processor import PixelProcessor
from unigrpo_env.tasks.shapes.vocabulary import ROUND_WORDS, shapes_tokenizer

MARKERS = ("<pad>", "<bos>", "<unk>", "<image>", "</image>")
"""Entries of the vocabulary that no thought may contain."""


class ShapesProcessor(PixelProcessor):
    """24 x 24 pixels as 36 latent tokens of 4 x 4 RGB values; a vocabulary of 64 entries."""

    def __init__(self) -> None:
        super().__init__(shapes_tokenizer(), PixelLatents(24, 24, patch=4), vocab_size=64)

    def forbidden_ids(self, reads_images: bool = False) -> tuple[int, ...]:
        """Markers, unused entries, and words that only episodes of several images need."""
        vocabulary = self.tokenizer.get_vocab()
        forbidden = [vocabulary[mark] for mark in MARKERS]
        if not reads_images:
            forbidden += [vocabulary[word] for word in ROUND_WORDS]
        return (*forbidden, *range(len(vocabulary), self.vocab_size))

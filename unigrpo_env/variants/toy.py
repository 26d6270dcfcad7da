"""The smallest scenario with both halves, and a best policy that is known."""

from __future__ import annotations

from functools import cache
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from unigrpo_env.pixel_latents import PixelLatents
from unigrpo_env.processor import Processor
from unigrpo_env.segment_processor import PixelProcessor
from unigrpo_env.tasks.task import Task
from unigrpo_env.tasks.toy import TOY_WORDS, ToyTask
from unigrpo_env.variants.variant import RewardSpec, Scenario, Variant


@cache
def toy_tokenizer() -> PreTrainedTokenizerFast:
    """The vocabulary `<pad> <bos> <eos> dark light`."""
    # The order of the words is their ids, which saved models rely on.
    words = ["<pad>", "<bos>", "<eos>", *TOY_WORDS]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )


class ToyProcessor(PixelProcessor):
    """Five tokens, and one latent token of 2 x 2 RGB values."""

    time_shift = 1.0

    def __init__(self) -> None:
        super().__init__(toy_tokenizer(), PixelLatents(2, 2, patch=2), vocab_size=5)

    def forbidden_ids(self, reads_images: bool = False) -> tuple[int, ...]:
        """`<pad>` and `<bos>`."""
        return (self.pad_id, self.bos_id)


def toy(
    processor: Processor | None = None,
    task: Task | None = None,
    reward: RewardSpec | None = None,
    **settings: Any,
) -> Variant:
    """Write the prompt's word, then draw its grey. There are two prompts, and a step is fast."""
    if processor is None:
        processor = ToyProcessor()
    if task is None:
        task = ToyTask()
    if reward is None:
        reward = "toy"
    defaults = {"prompt_budget": 4, "text_budget": 2, "image_steps": 8}
    return Scenario(**(defaults | settings)).variant(processor, task, reward)

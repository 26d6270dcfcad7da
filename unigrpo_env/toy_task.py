"""The smallest task with both halves: answer a prompt with its word, then paint its grey."""

from __future__ import annotations

from functools import cache

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from rewards.toy import LEVELS
from unigrpo_env.tasks import Lesson, Prompt

WORDS = ("dark", "light")


@cache
def toy_tokenizer() -> PreTrainedTokenizerFast:
    """`<pad> <bos> <eos> dark light`."""
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<bos>", "<eos>", *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")


class ToyTask:
    """The prompts `dark` and `light` in turn; see `unigrpo_env.tasks.Task`. Both splits hold both."""

    def prompts(self, split: str, count: int, seed: int) -> list[Prompt]:
        return [Prompt(WORDS[(seed + index) % 2], {"answer": WORDS[(seed + index) % 2]}) for index in range(count)]

    def lessons(self, count: int, seed: int, *, clean: bool = False) -> list[Lesson]:
        """The best answers: the prompt's own word, and a picture `[1, 3, 2, 2]` of its grey."""
        return [
            Lesson(prompt, (prompt.text,), torch.full((1, 3, 2, 2), LEVELS[WORDS.index(prompt.text)]))
            for prompt in self.prompts("train", count, seed)
        ]

"""The smallest task with both halves: answer a prompt with its word, then draw its grey."""

from __future__ import annotations

import torch

from rewards.toy import ANSWERS, LEVELS
from unigrpo_env.tasks.task import Demonstration, Prompt, Split

TOY_WORDS = ANSWERS
"""The words of the task, `dark` and `light`."""


class ToyTask:
    """The prompts `dark` and `light` in turn. Both splits hold both of them."""

    def prompts(self, split: Split, count: int, seed: int) -> list[Prompt]:
        """The two words in turn.

        Args:
            split: makes no difference.
            count: how many.
            seed: an odd one begins with the second word.
        """
        found = []
        for number in range(seed, seed + count):
            word = TOY_WORDS[number % 2]
            found.append(Prompt(word, {"answer": word}))
        return found

    def demonstrations(self, count: int, seed: int, *, clean: bool = False) -> list[Demonstration]:
        """The best answers: the prompt's own word, and an image `[1, 3, 2, 2]` of its grey.

        Args:
            count: how many.
            seed: an odd one begins with the second word.
            clean: makes no difference, all are correct.
        """
        found = []
        for prompt in self.prompts("train", count, seed):
            level = LEVELS[TOY_WORDS.index(prompt.text)]
            # One image of 2 x 2 pixels: [1, 3, 2, 2].
            images = torch.full((1, 3, 2, 2), level)
            found.append(Demonstration(prompt, (prompt.text,), images))
        return found

    def warmup_demonstrations(self, count: int, seed: int) -> list[Demonstration]:
        """The same as `demonstrations`."""
        return self.demonstrations(count, seed)

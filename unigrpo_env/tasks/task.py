"""Prompts, demonstrations, and what a task must have."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from rewards import EpisodeBatch

Split = Literal["train", "test"]
"""The prompts for training, and those that are kept for evaluation."""


@dataclass(frozen=True)
class Prompt:
    """What an episode is asked for.

    Attributes:
        text: what the model reads.
        metadata: what only the reward sees.
        sources: images that the model reads before the text, `[3, height, width]` float32 in
            [0, 1] each.
        turns: what the user says after each image, in variants where the user speaks.
    """

    text: str
    metadata: Mapping[str, Any] = field(default_factory=dict)
    # Tensors have no truth value when they are compared, so equality leaves them out.
    sources: tuple[Tensor, ...] = field(default=(), compare=False)
    turns: tuple[str, ...] = ()


@dataclass(frozen=True)
class Demonstration:
    """An episode to be imitated: how a prompt is answered, correctly or not.

    Attributes:
        prompt: what was asked; None if nothing is read.
        thoughts: the text before each image, and one more entry if a text ends the episode. An
            entry None means that the model does not think there.
        images: `[R, 3, height, width]` float32 in [0, 1], at least one.
    """

    prompt: Prompt | None
    thoughts: tuple[str | None, ...]
    images: Tensor

    def without_text(self) -> Demonstration:
        """The same images, without any thought."""
        # No entry after the last image, even if a text ended the episode.
        return replace(self, thoughts=(None,) * len(self.images))

    def unconditional(self) -> Demonstration:
        """The first image alone, after no prompt and no thought.

        Classifier-free guidance needs it: it extrapolates away from the velocity that a model
        predicts without a condition (Ho and Salimans 2022, arXiv 2207.12598).
        """
        return Demonstration(None, (None,), self.images[:1])


def join_thoughts(thoughts: Iterable[str]) -> str:
    """The text of all rounds as one; rounds without text are left out."""
    return " ".join(filter(None, thoughts))


def make_batch(
    prompts: Sequence[Prompt], thoughts: list[list[str]], all_images: list[Tensor]
) -> EpisodeBatch:
    """Put episodes into the form that a reward takes.

    Args:
        prompts: the prompt of each episode.
        thoughts: the text before each image of an episode, and after the last if there is one.
        all_images: the finished images of each episode, `[drawn, 3, height, width]` float32 in
            [0, 1] each. An episode without an image has an empty tensor of that shape.
    """
    last_images = []
    sources = []
    for prompt, images in zip(prompts, all_images, strict=True):
        last_images.append(_last_image(images))
        # [sources, 3, height, width], with 0 sources if none was given.
        stacked = images[:0]
        if prompt.sources:
            stacked = torch.stack(list(prompt.sources))
        sources.append(stacked)
    return EpisodeBatch(
        prompts=[prompt.text for prompt in prompts],
        texts=[join_thoughts(texts) for texts in thoughts],
        # [N, 3, height, width]
        images=torch.stack(last_images),
        metadata=[prompt.metadata for prompt in prompts],
        all_images=all_images,
        thoughts=thoughts,
        sources=sources,
    )


def _last_image(images: Tensor) -> Tensor:
    """The last of `[drawn, 3, height, width]`; black if none is drawn."""
    if len(images):
        return images[-1]
    return images.new_zeros(images.shape[1:])


def demonstration_batch(demonstrations: Sequence[Demonstration]) -> EpisodeBatch:
    """Demonstrations as an `EpisodeBatch`, so that a reward can score them.

    Raises:
        ValueError: a demonstration without a prompt.
    """
    prompts = []
    thoughts = []
    for demonstration in demonstrations:
        if demonstration.prompt is None:
            raise ValueError(
                "expected demonstrations with a prompt, got one without; "
                "an unconditional demonstration has nothing that a reward could score"
            )
        prompts.append(demonstration.prompt)
        # A reward expects a text for each image.
        thoughts.append([thought or "" for thought in demonstration.thoughts])
    all_images = [demonstration.images for demonstration in demonstrations]
    return make_batch(prompts, thoughts, all_images)


class Task(Protocol):
    """A source of prompts.

    A task that can also show how to answer them is a `DemonstrationTask`. One whose user answers
    what was drawn is a `ReplyingTask`.
    """

    def prompts(self, split: Split, count: int, seed: int) -> list[Prompt]:
        """Sample prompts of a split.

        The same arguments give the same prompts, and the two splits share none.

        Args:
            split: `train` or `test`.
            count: how many.
            seed: of the random choice.
        """
        ...


class DemonstrationTask(Task, Protocol):
    """A task that can also show how its prompts are answered."""

    def demonstrations(self, count: int, seed: int, *, clean: bool = False) -> list[Demonstration]:
        """Show how training prompts are answered.

        Args:
            count: how many.
            seed: of prompts and answers.
            clean: whether all of them are correct. Otherwise the task may mix in errors, such as a
                real data set has.
        """
        ...

    def warmup_demonstrations(self, count: int, seed: int) -> list[Demonstration]:
        """Show what a model should see first in its supervised training.

        Args:
            count: how many.
            seed: of prompts and answers.
        """
        ...


class ReplyingTask(Task, Protocol):
    """A task whose user answers what the model drew and wrote."""

    def reply(self, episodes: EpisodeBatch) -> list[str | None]:
        """What the user answers to the last image.

        It is called once for all episodes that wait for an answer, in place of `Prompt.turns`.

        Args:
            episodes: as far as they have come.

        Returns:
            A text for each; None where the user has no more to say, which ends the episode.
        """
        ...

"""What an episode may do, as numbers."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor


class Phase(IntEnum):
    """What an episode waits for."""

    TEXT = 0
    IMAGE = 1
    DONE = 2


class Role(IntEnum):
    """Who wrote a token. The words that open a thought count as the model's."""

    SYSTEM = 0
    USER = 1
    MODEL = 2


def lay_out_roles(length: int, system: int = 0, opening: int = 0) -> list[int]:
    """The role of each token of a prompt, or of a user's turn.

    Args:
        length: how many tokens there are.
        system: how many of them, from the first, are the system's.
        opening: how many of them, up to the last, open the thought.
    """
    user = length - system - opening
    roles: list[int] = [Role.SYSTEM] * system
    roles += [Role.USER] * user
    return roles + [Role.MODEL] * opening


SMALLEST = {
    "prompt_budget": 1,
    "text_budget": 0,
    "image_budget": 0,
    "source_images": 0,
    "min_source_images": 0,
    "turn_budget": 0,
}
"""The least value of each budget."""


def count_rounds(image_budget: int, text_after_images: bool) -> int:
    """Texts of an episode at most; an episode without images is one text."""
    has_last_text = text_after_images or image_budget == 0
    return image_budget + int(has_last_text)


@dataclass(frozen=True)
class Rules:
    """A scenario's budgets in the tokens and latents of one processor.

    Attributes:
        vocab_size: tokens are 0 ... vocab_size - 1.
        prompt_budget: tokens of the prompt with its marks and sources, at most.
        text_budget: tokens that the model may sample before each image, the opening one included.
            When they are spent the image opens by itself. 0: no thought, the image opens at once.
        times: flow times of the denoising steps, from 1 (noise) down to 0 (image).
        latent_shape: (latent tokens, values a token).
        open_image_id: the token that ends the thought and opens the image. Where no image is left
            it ends the episode, unless there is an `end_id`.
        time_shift: how far the flow times of training points are moved towards noise.
        image_budget: images that an episode may draw; 0 for text alone.
        source_images: images that may come with the prompt, at most.
        min_source_images: and at least.
        image_id: the token that stands in the stream for an image to be read.
        continuation_ids: what the env writes after an image, before the model goes on, where the
            user says nothing.
        turn_budget: tokens of the user's turn after an image, beyond `continuation_ids`; 0: the
            user never speaks. Where they do, the episode ends when they have no more to say.
        text_after_images: whether the model writes once more after its last image.
        end_id: a token that ends the episode, if the scenario lets the model end it.
        end_before_image: whether `end_id` is legal before the first image.
        forbidden_ids: tokens that may never be sampled.
        pad_id: fills the unused end of the token buffer, and is the one legal token outside the
            text phase.
        opening_length: tokens at the end of a prompt or of a user's turn that open the thought.
        pixel_size: (height, width) at which a vision encoder sees the images that are read; (0, 0)
            for a model without one.

    Raises:
        ValueError: a budget below its least value, or rules that contradict each other.
    """

    vocab_size: int
    prompt_budget: int
    text_budget: int
    times: tuple[float, ...]
    latent_shape: tuple[int, int]
    open_image_id: int
    time_shift: float = 1.0
    image_budget: int = 1
    source_images: int = 0
    min_source_images: int = 0
    image_id: int | None = None
    continuation_ids: tuple[int, ...] = ()
    turn_budget: int = 0
    text_after_images: bool = False
    end_id: int | None = None
    end_before_image: bool = True
    forbidden_ids: tuple[int, ...] = ()
    pad_id: int = 0
    opening_length: int = 0
    pixel_size: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        """Refuse rules under which no episode could be played."""
        for name, least in SMALLEST.items():
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"expected {name} >= {least}, got {value}")
        if self.min_source_images > self.source_images:
            raise ValueError(
                f"expected min_source_images <= source_images, got {self.min_source_images} and "
                f"{self.source_images}"
            )
        self._check_times()
        self._check_tokens()
        if self.text_budget == 0 and self.rounds > self.image_budget:
            raise ValueError(
                "expected text_budget >= 1 where text stands after the last image, or alone; got 0"
            )

    def _check_times(self) -> None:
        steps = zip(self.times[:-1], self.times[1:], strict=True)
        # NaN falls nowhere, so it is refused as well.
        falls = all(before > after for before, after in steps)
        if len(self.times) < 2 or (self.times[0], self.times[-1]) != (1, 0) or not falls:
            raise ValueError(
                "expected at least two flow times (image_steps >= 1) that fall from 1 to 0, "
                f"got {self.times}"
            )

    def _check_tokens(self) -> None:
        if self.stored_images and self.image_id not in self.forbidden_ids:
            raise ValueError(
                f"expected an image_id among forbidden_ids where images are read, got "
                f"{self.image_id}: a model that could sample it would claim an image"
            )
        goes_on = self.rounds > 1 and self.text_budget > 0
        if goes_on and not self.turn_slots:
            raise ValueError(
                "expected continuation_ids where the model goes on writing after an image, "
                "got none: its next token must follow one"
            )
        if self.open_image_id in self.forbidden_ids:
            raise ValueError(
                f"open_image_id {self.open_image_id} is among forbidden_ids; "
                "a thought could never end"
            )
        if self.end_id is not None:
            self._check_end()

    def _check_end(self) -> None:
        if self.end_id in self.forbidden_ids:
            raise ValueError(
                f"end_id {self.end_id} is among forbidden_ids; the model could never end an episode"
            )
        if self.end_id == self.open_image_id and self.image_budget > 0:
            raise ValueError(
                f"expected an end_id other than open_image_id {self.open_image_id} where images "
                "are drawn; no token could open one"
            )

    @property
    def image_steps(self) -> int:
        """Denoising steps (transitions) of an image."""
        return len(self.times) - 1

    @property
    def rounds(self) -> int:
        """Texts of an episode at most: one before each image, and perhaps one after the last."""
        return count_rounds(self.image_budget, self.text_after_images)

    @property
    def stored_images(self) -> int:
        """Images that may have to be read: the sources, and every drawn one that text follows."""
        return self.source_images + self.rounds - 1

    @property
    def has_pixels(self) -> bool:
        """Whether a vision encoder sees the images that are read."""
        return self.stored_images > 0 and self.pixel_size != (0, 0)

    @property
    def stored_shape(self) -> tuple[int, int]:
        """Latent tokens and values of an image that is read.

        There are no tokens where the episode draws nothing and a vision encoder sees the image: it
        is to be understood, not to be changed.
        """
        tokens, values = self.latent_shape
        if self.has_pixels and self.image_budget == 0:
            tokens = 0
        return tokens, values

    @property
    def turn_slots(self) -> int:
        """Tokens that the env may write after an image."""
        return self.turn_budget + len(self.continuation_ids)

    @property
    def max_tokens(self) -> int:
        """Length of the token buffer."""
        # After each text one more token may be forced, the opening one.
        texts = self.rounds * (self.text_budget + 1)
        # Between two rounds stand the image's own token and what the env writes.
        between = (self.rounds - 1) * (1 + self.turn_slots)
        return self.prompt_budget + texts + between

    @property
    def max_steps(self) -> int:
        """Steps after which every episode has ended, if it acts in each of them."""
        return self.rounds * self.text_budget + self.image_budget * self.image_steps

    def legal_tokens(self, images_drawn: int = 0) -> Tensor:
        """What may be sampled in the text phase, `[vocab_size]` bool.

        Args:
            images_drawn: images that the episode has drawn so far.
        """
        legal = torch.ones(self.vocab_size, dtype=torch.bool)
        legal[list(self.forbidden_ids)] = False
        drawn = torch.tensor(images_drawn)
        if self.end_id is not None:
            legal[self.end_id] = self.may_end(drawn)
        # Last, because one token may do both.
        legal[self.open_image_id] = self.may_close(drawn)
        return legal

    def may_close(self, images_drawn: Tensor) -> Tensor:
        """Whether `open_image_id` may be sampled, `[...]` bool, after so many images `[...]`.

        Without an `end_id` of its own it closes every text, the last one too. With one, and no
        image left to open, only that closes the text.
        """
        if self.end_id is None or self.end_id == self.open_image_id:
            return torch.ones_like(images_drawn, dtype=torch.bool)
        return images_drawn < self.image_budget

    def may_end(self, images_drawn: Tensor) -> Tensor:
        """Whether `end_id` may be sampled, `[...]` bool, after so many images `[...]`."""
        if self.image_budget == 0 or self.end_before_image:
            return torch.ones_like(images_drawn, dtype=torch.bool)
        return images_drawn > 0

    def legal_by_round(self) -> Tensor:
        """`legal_tokens` of each round's text, `[rounds, vocab_size]` bool."""
        return torch.stack([self.legal_tokens(number) for number in range(self.rounds)])

    def idle_tokens(self) -> Tensor:
        """The mask outside the text phase, `[vocab_size]` bool: padding alone.

        It is never all False, so that a masked distribution can always be formed.
        """
        idle = torch.zeros(self.vocab_size, dtype=torch.bool)
        idle[self.pad_id] = True
        return idle

    def time_tensor(self) -> Tensor:
        """`times` as `[image_steps + 1]` float32."""
        return torch.tensor(self.times, dtype=torch.float32)

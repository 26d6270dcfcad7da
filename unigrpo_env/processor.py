"""What a backbone brings to the environment: tokens, their layout, and latents as images.

A scenario says what an episode may do. A `Processor` says how a given model writes it down. So
every scenario can be played by every model that brings one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TypeVar

from torch import Tensor

from rewards.registry import Registry
from unigrpo_env.flow_time import time_grid


class Processor(ABC):
    """Text to tokens, images to latents, and back.

    Attributes:
        vocab_size: tokens are 0 ... vocab_size - 1.
        pad_id: fills the unused end of the token buffer; never sampled in the text phase.
        open_image_id: the token that ends a thought and opens the image. Where no image is left to
            be drawn it ends the episode instead.
        image_id: the token that stands in the stream for an image to be read; None if the model
            reads no images.
        end_id: the token by which the model ends the episode, in scenarios that let it; or None.
        latent_shape: (latent tokens, values a token).
        image_size: (height, width) of a decoded image, in pixels.
        time_shift: shift of the grid of flow times towards noise, see `time_grid`.
        pixel_size: (height, width) at which the model's vision encoder sees an image; None if it
            has none.
        scenario_defaults: budgets of a scenario that suit this backbone, used where the user gives
            none: any of `prompt_budget`, `text_budget`, `turn_budget`, `image_steps`.
    """

    vocab_size: int
    pad_id: int
    open_image_id: int
    image_id: int | None = None
    end_id: int | None = None
    latent_shape: tuple[int, int]
    image_size: tuple[int, int]
    time_shift: float = 3.0
    pixel_size: tuple[int, int] | None = None
    scenario_defaults: Mapping[str, int] = MappingProxyType({})

    @abstractmethod
    def encode_text(self, text: str) -> list[int]:
        """The tokens of plain words, without any mark around them."""

    @abstractmethod
    def decode_text(self, ids: Sequence[int]) -> str:
        """The words of sampled tokens; marks are left out."""

    @abstractmethod
    def encode_prompt(
        self, text: str, *, sources: int = 0, system: str = "", thinks: bool = True
    ) -> list[int]:
        """Lay out everything that stands before the first token which the model samples.

        Args:
            text: the prompt's words.
            sources: source images that come with it; `image_id` stands once for each.
            system: a system text, before the sources; empty for none.
            thinks: whether a thought follows. Otherwise the image opens at once.
        """

    @abstractmethod
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Latents `[N, L, C]` float32 to images `[N, 3, height, width]` float32 in [0, 1].

        The result is on the device of `latents`. Only the objective refl needs its gradient.
        """

    def encode_images(self, images: Tensor) -> Tensor:
        """Images `[N, 3, height, width]` float32 in [0, 1] to clean latents `[N, L, C]` float32.

        Raises:
            NotImplementedError: this backbone cannot encode images.
        """
        raise NotImplementedError(
            f"{type(self).__name__} does not define encode_images, so its model reads no images"
        )

    def fit_source(self, image: Tensor) -> Tensor:
        """A source image in the size that this processor takes.

        Args:
            image: `[3, height, width]` float32 in [0, 1].

        Returns:
            `[3, *image_size]` float32 in [0, 1].

        Raises:
            ValueError: it has another size, and this backbone does not resize images.
        """
        expected = [3, *self.image_size]
        if list(image.shape) != expected:
            raise ValueError(
                f"expected source images as float tensors of shape {expected} (RGB), got "
                f"{list(image.shape)} of {image.dtype}; resize or convert them first"
            )
        return image

    def view_images(self, images: Tensor) -> Tensor:
        """What the model's vision encoder sees of images.

        Args:
            images: `[N, 3, *image_size]` float32 in [0, 1].

        Returns:
            `[N, 3, *pixel_size]` uint8, on the same device.

        Raises:
            NotImplementedError: the model has no vision encoder.
        """
        raise NotImplementedError(
            f"{type(self).__name__} does not define view_images, so its model sees no pixels"
        )

    def system_prompt(self, *, thinks: bool, draws: bool) -> str:
        """The system text that this backbone was trained with; empty for none.

        Args:
            thinks: whether a thought comes before each image.
            draws: whether the episode may draw at all.
        """
        return ""

    def system_length(self, system: str) -> int:
        """How many tokens at the beginning of a prompt are the system's."""
        return 0

    def opening_length(self, thinks: bool = True) -> int:
        """How many tokens at the end of a prompt, or of a user's turn, open the thought."""
        return 0

    def encode_turn(self, text: str, *, thinks: bool = True) -> list[int]:
        """Lay out what follows a drawn image when the user speaks, up to the next thought.

        Args:
            text: the user's words.
            thinks: as for `encode_prompt`.

        Raises:
            NotImplementedError: this backbone has no layout for a user's turn.
        """
        raise NotImplementedError(
            f"{type(self).__name__} does not define encode_turn, so no user can speak to its model"
        )

    def continuation_ids(self, thinks: bool = True) -> tuple[int, ...]:
        """What follows a drawn image when nobody speaks, up to the next thought.

        Where a thought follows it must not be empty: an image gives no distribution of tokens, so
        the first token of the thought must follow another one.
        """
        return ()

    def forbidden_ids(self, reads_images: bool = False) -> tuple[int, ...]:
        """Tokens that are never sampled: padding, markers, unused entries.

        Args:
            reads_images: whether the scenario reads images, sources or the model's own.
        """
        marks = {self.pad_id}
        if self.image_id is not None:
            marks.add(self.image_id)
        # A backbone may close a thought with its padding token, which must be legal then.
        return tuple(sorted(marks - {self.open_image_id}))

    def control_ids(self) -> frozenset[int]:
        """Tokens that a user may not type, because the env sets them itself."""
        marks = {self.open_image_id, self.image_id, self.end_id}
        return frozenset(mark for mark in marks if mark is not None)

    def describe_token(self, token: int) -> str:
        """A token for an error message."""
        return f"id {token}"

    def time_grid(self, steps: int, shift: float | None = None) -> tuple[float, ...]:
        """`steps + 1` flow times from 1 (noise) down to 0 (image).

        A backbone with a schedule of its own overrides this.

        Args:
            steps: the number of denoising steps.
            shift: in place of the processor's own `time_shift`.

        Raises:
            ValueError: no step, or a shift that is not positive.
        """
        chosen = self.time_shift if shift is None else shift
        return tuple(time_grid(steps, chosen).tolist())


ProcessorFactory = Callable[[], Processor]
FactoryT = TypeVar("FactoryT", bound=ProcessorFactory)

PROCESSORS: Registry[ProcessorFactory] = Registry(
    "processor", entry_point_group="unigrpo.processors"
)
"""Functions that make a processor, by the name that a saved model's config gives."""
PROCESSORS.add("shapes", "unigrpo_env.tasks.shapes.processor:ShapesProcessor")
PROCESSORS.add("toy", "unigrpo_env.variants.toy:ToyProcessor")


def register_processor(name: str) -> Callable[[FactoryT], FactoryT]:
    """Make a processor class, or a function that returns a processor, known as `name`.

    Used as a decorator. A model whose config has this name as its `processor` finds it when it is
    loaded.

    Args:
        name: its name in configs, settings and on the command line.

    Raises:
        ValueError: the name is taken.
    """

    def _register(factory: FactoryT) -> FactoryT:
        PROCESSORS.add(name, factory)
        return factory

    return _register

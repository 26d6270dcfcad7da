"""The methods that every model has, on one linear context.

Sampling and training call the same methods. A backbone that implements them can be stepped, trained
and evaluated by everything in `agents`. `agents.testing.ModelContract` tests an implementation.

These conventions hold everywhere: flow time t = 1 is noise and t = 0 is the image; a velocity is
v = dx/dt = noise - image; latents are tokens `[N, L, C]` in float32.
"""

from __future__ import annotations

import copy
import dataclasses
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn

from agents.storage import (
    CONFIG,
    WEIGHTS,
    load_weights,
    read_config,
    read_tensors,
    write_json,
    write_tensors,
)

if TYPE_CHECKING:
    from unigrpo_env.processor import Processor


class Context(Protocol):
    """Everything that a model has read, one row an episode. Callers see nothing else of it."""

    @property
    def batch_size(self) -> int:
        """The number of rows."""

    def select(self, rows: Tensor) -> Self:
        """Take rows by index, in a new context.

        Args:
            rows: `[M]` int64. Repeats are allowed: so the members of a group share one prompt.
        """

    def repeat_interleave(self, times: int) -> Self:
        """Repeat each row `times` times: row 0, row 0, ..., row 1, row 1, ..."""

    def detach(self) -> Self:
        """Give the same context, cut from the autograd graph."""


ContextT = TypeVar("ContextT", bound=Context)


class UnifiedModel(nn.Module, ABC, Generic[ContextT]):
    """A model that writes text and draws images.

    Attributes:
        config_class: the frozen dataclass of the sizes.
        config: the sizes of this model. Its field `processor`, if there is one, names an entry of
            `unigrpo_env.processor.PROCESSORS`.
        compute_dtype: the dtype of the methods' computations; weights keep their own.
    """

    config_class: ClassVar[type]
    config: Any
    compute_dtype: torch.dtype = torch.float32

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """The number of tokens V; logits have one entry for each."""

    @property
    @abstractmethod
    def latent_shape(self) -> tuple[int, int]:
        """Latent tokens L of an image, and values C of each."""

    @property
    def processor(self) -> Processor:
        """The model's processor: the one that was set, or else the one that its config names.

        It is no part of the model: it is not trained, moved, saved or copied with it.

        Raises:
            ValueError: none was set and the config names none.
        """
        processor = self._find_processor()
        # Not an AttributeError: nn.Module would replace its message by one of its own.
        if processor is None:
            raise ValueError(
                f"this {type(self).__name__} brings no processor, because its config names none; "
                "set one with `model.processor = ...`"
            )
        return processor

    @processor.setter
    def processor(self, processor: Processor) -> None:
        """Set the processor, outside the parts that nn.Module registers."""
        self.__dict__["_processor"] = processor

    def _find_processor(self) -> Processor | None:
        if "_processor" not in self.__dict__:
            # A model's config may have no such field, and a model of the user no config.
            config = getattr(self, "config", None)
            name = getattr(config, "processor", "")
            if not name:
                return None
            # Imported here, because a model can be used without the environment.
            from unigrpo_env.processor import PROCESSORS

            self.__dict__["_processor"] = PROCESSORS[name]()
        return self.__dict__["_processor"]

    def __setattr__(self, name: str, value: Any) -> None:
        # nn.Module registers a value that is a module before it looks for a property setter.
        if name == "processor":
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def autocast(self) -> AbstractContextManager[Any]:
        """Compute in `compute_dtype` inside this context manager.

        Each method enters it by itself, so that no cast weight outlives an update.
        """
        # Autocast has no mode for float32; without it the dtype of the weights holds.
        if self.compute_dtype == torch.float32:
            return nullcontext()
        return torch.autocast(next(self.parameters()).device.type, self.compute_dtype)

    @abstractmethod
    def empty_context(self, batch_size: int) -> ContextT:
        """Make a context of `batch_size` rows in which nothing was read yet."""

    @abstractmethod
    def append_text(
        self, context: ContextT, ids: Tensor, mask: Tensor | None = None, *, last_only: bool = False
    ) -> tuple[Tensor, ContextT]:
        """Read text after `context`.

        Args:
            context: what came before.
            ids: `[N, T]` int64.
            mask: `[N, T]` bool, False where a position is padding; padding leaves no trace in the
                context.
            last_only: compute the logits of each row's last unmasked position alone (of position 0
                in a row without one).

        Returns:
            Logits of the next token, `[N, T, V]` (`[N, 1, V]` with `last_only`), and the grown
            context. Without gradient a model may grow the given context in place: use the returned
            one.
        """

    def append_image(
        self,
        context: ContextT,
        latent: Tensor | None = None,
        pixels: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        with_grad: bool = True,
    ) -> ContextT:
        """Read finished images after `context`: sources, or what the model drew itself.

        A model that reads no images does not define this method. A model with a vision encoder
        that is given no pixels decodes the latent with `self.processor.decode_latents`.

        Args:
            context: what came before.
            latent: `[N, L, C]` float32, clean (t = 0).
            pixels: `[N, 3, height, width]` float32 in [-1, 1], for a model with a vision encoder.
            mask: `[N]` bool, the rows that read; all if left out.
            with_grad: False computes the image's part of the context without gradient. What was in
                the context before keeps its own.

        Returns:
            The grown context. As in `append_text`, the given one may have grown in place.

        Raises:
            NotImplementedError: the model reads no images.
            ValueError: neither latent nor pixels were given; `pixels` were given to a model without
                a vision encoder; or the model has one, and neither `pixels` nor a processor that
                decodes the latent was given.
        """
        raise NotImplementedError(
            f"{type(self).__name__} reads no images; use a model whose class defines append_image"
        )

    @abstractmethod
    def predict_velocity(self, context: ContextT, x: Tensor, t: Tensor) -> Tensor:
        """Predict v(x_t, t) of the image that is drawn after `context`.

        The context stays as it is, because a noisy latent is never part of it.

        Args:
            context: what was read so far. Its last token opened the image; without a thought that
                token is the last of the prompt.
            x: `[N, L, C]` float32, the noisy latent.
            t: `[N]` float32 in [0, 1]; 1 is noise.

        Returns:
            `[N, L, C]` float32.
        """

    @abstractmethod
    def parameters_by_expert(self) -> dict[str, list[nn.Parameter]]:
        """List every trainable parameter once: `{"text": [...], "image": [...]}`.

        A learning rate or a freeze applies to one of the two lists.
        """

    def frozen_copy(self) -> Self:
        """Make a deep copy that needs no gradient and shares the processor."""
        # `deepcopy` does not copy what its memo has already; the keys are ids of objects.
        memo: dict[int, Any] = {}
        # A model may wrap another, which has a processor of its own.
        for module in self.modules():
            if not isinstance(module, UnifiedModel):
                continue
            processor = module._find_processor()
            if processor is not None:
                memo[id(processor)] = processor
        return copy.deepcopy(self, memo).requires_grad_(False)

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write config and weights to `folder`, which is made if it is missing; returns it."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(self.state_dict(), folder / WEIGHTS)
        # The name of the class comes first: `load_model` finds the class by it.
        fields = {"model": type(self).__name__, **dataclasses.asdict(self.config)}
        write_json(fields, folder / CONFIG)
        return folder

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Load what `save_pretrained` wrote.

        Raises:
            ValueError: a file is missing or damaged, the config is another model's or has missing
                or unknown keys, or the weights do not fit it.
        """
        folder = Path(folder)
        fields = read_config(folder)
        name = fields.pop("model", cls.__name__)
        known = {field.name for field in dataclasses.fields(cls.config_class)}
        unknown = sorted(fields.keys() - known)
        # A missing key is refused too: a default that changes later would change the model.
        missing = sorted(known - fields.keys())
        if name != cls.__name__ or unknown or missing:
            raise ValueError(
                f"{folder / CONFIG} describes {name!r} with unknown keys {unknown}, missing keys "
                f"{missing}; expected the whole config of a {cls.__name__}"
            )
        model = cls(cls.config_class(**fields))
        load_weights(model, read_tensors(folder / WEIGHTS), str(folder / WEIGHTS))
        return model

"""The methods that every model has, on one linear context.

Sampling and training call the same methods. A backbone that implements them can be stepped, trained
and evaluated by everything in `agents`. `agents.testing.ModelContract` tests an implementation.

These conventions hold everywhere: flow time t = 1 is noise and t = 0 is the image; a velocity is
v = dx/dt = noise - image; latents are tokens `[N, L, C]` in float32.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Self, TypeVar

import torch
from torch import Tensor, nn

from agents.models.config_files import read_model_config, write_model_config
from agents.models.context import Context
from agents.storage import (
    WEIGHTS,
    load_weights,
    read_tensors,
    write_tensors,
)

if TYPE_CHECKING:
    from unigrpo_env.processor import Processor


ContextT = TypeVar("ContextT", bound=Context)


class UnifiedModel(nn.Module, ABC, Generic[ContextT]):
    """A model that writes text and draws images.

    Attributes:
        config_class: the frozen dataclass of the sizes.
        config: the sizes of this model. Its field `processor`, if there is one, names an entry of
            `unigrpo_env.processor.PROCESSORS`.
        lora_targets: regular expressions; adapters go by default into those linear layers whose
            name matches one of them.
        adapted_layers: names of the layers with adapters, by expert; None without adapters.
        source: the name or folder that `load_model` took the model from; "" for another model.
        checkpointing: keep no activations inside a layer for the backward pass, but compute them
            again there. A model of one layer may ignore it.
        max_rows: rows of one velocity forward, see `agents.policy.chunks`; None: as many as fit.
    """

    config_class: ClassVar[type]
    lora_targets: ClassVar[tuple[str, ...]] = ("",)
    config: Any
    adapted_layers: dict[str, list[str]] | None = None
    source: str = ""
    checkpointing: bool = False
    max_rows: int | None = None

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """The number of tokens V; logits have one entry for each."""

    @property
    @abstractmethod
    def latent_shape(self) -> tuple[int, int]:
        """Latent tokens L of an image, and values C of each."""

    @property
    def reads_images(self) -> bool:
        """Whether the model reads images, so that `append_image` can be called."""
        return type(self).append_image is not UnifiedModel.append_image

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

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def cast_weights(self, dtype: torch.dtype) -> Self:
        """Convert all floating weights, in place; computations run in their dtype.

        Buffers keep theirs: rotary frequencies in bfloat16 would move every position. Adapters stay
        in float32.

        Args:
            dtype: float32 or bfloat16.

        Returns:
            The model itself.
        """
        kept: set[int] = set()
        if self.adapted_layers is not None:
            for weights in self.trainable_by_expert().values():
                kept.update(id(weight) for weight in weights)
        for parameter in self.parameters():
            if parameter.is_floating_point() and id(parameter) not in kept:
                # In place of `self.to(dtype)`, which converts buffers too.
                parameter.data = parameter.data.to(dtype)
        return self

    @abstractmethod
    def empty_context(self, batch_size: int) -> ContextT:
        """Make a context of `batch_size` rows in which nothing was read yet."""

    @abstractmethod
    def append_text(
        self, context: ContextT, ids: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, ContextT]:
        """Read text after `context`.

        Args:
            context: what came before.
            ids: `[N, T]` int64.
            mask: `[N, T]` bool, False where a position is padding; padding leaves no trace in the
                context.

        Returns:
            Logits of the next token, `[N, T, V]`, and the grown context. Without gradient a model
            may grow the given context in place: use the returned one.
        """

    def append_hidden(
        self,
        context: ContextT,
        ids: Tensor,
        mask: Tensor | None = None,
        *,
        roles: Tensor | None = None,
    ) -> tuple[Tensor, ContextT]:
        """Read text as `append_text` does, but leave the head of the model out.

        A model with a large vocabulary defines this and `compute_logits`: logits of a long text are
        then computed in parts. By default the states are the logits themselves.

        Args:
            context: what came before.
            ids: `[N, T]` int64.
            mask: `[N, T]` bool, as for `append_text`.
            roles: `[N, T]` int64, a `Role` each. Only guidance tells them apart.

        Returns:
            States `[N, T, ...]`, of which `compute_logits` makes logits, and the grown context.
        """
        return self.append_text(context, ids, mask)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """Logits `[..., V]` of states `[..., H]` that `append_hidden` gave, of any shape."""
        return hidden

    def reserve(self, context: ContextT, tokens: int, images: int) -> None:
        """Make room in a context for what is still to be read; a hint that a model may ignore.

        Args:
            context: changed in place; it holds the same as before.
            tokens: so many more of text, at most.
            images: so many more, at most.
        """

    def velocity_bytes(self, context: ContextT) -> int:
        """Memory that `predict_velocity` takes for one row beyond its context; 0 if unknown.

        Args:
            context: what was read.
        """
        return 0

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
        that is given no pixels takes them from its processor, which decodes the latent.

        Args:
            context: what came before.
            latent: `[N, L, C]` float32, clean (t = 0); None for a model with a vision encoder that
                is to read the pixels alone.
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

    def prepare_velocity(self, context: ContextT) -> None:
        """Do what all velocities after a context share, before its rows are drawn in parts.

        A hint that a model may ignore.
        """

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

        A learning rate or a freeze applies to one of the two lists. A model need not know of
        adapters, see `trainable_by_expert`.
        """

    def trainable_by_expert(self) -> dict[str, list[nn.Parameter]]:
        """List what training changes: the adapters alone where there are some, else all weights."""
        if self.adapted_layers is None:
            return self.parameters_by_expert()
        # Imported here, because `lora` needs this module.
        from agents.models.lora import adapters_by_expert

        return adapters_by_expert(self)

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

    def reference(self) -> UnifiedModel[ContextT]:
        """The model as it is without its adapters, to be compared with while they are trained.

        Returns:
            With adapters a view of this model, which takes no memory; else a frozen copy.
        """
        if self.adapted_layers is None:
            return self.frozen_copy()
        from agents.models.reference import AdaptersOff

        return AdaptersOff(self)

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the adapters alone, or else config and weights, as `load_model` reads them.

        Args:
            folder: made if it is missing.

        Returns:
            The folder.
        """
        from agents.models.adapter_files import save_adapters

        folder = Path(folder)
        if self.adapted_layers is None:
            self.write_weights(folder, self.state_dict())
        else:
            save_adapters(self, folder)
        return folder

    @classmethod
    def holds_adapters(cls, folder: Path) -> bool:
        """Whether a model of this class wrote adapters alone to a folder.

        Args:
            folder: of the model.
        """
        from agents.models.adapter_files import ADAPTER_CONFIG

        return (folder / ADAPTER_CONFIG).is_file()

    def load_saved(self, folder: str | Path) -> None:
        """Fill this model in place with what its `save_pretrained` wrote.

        Raises:
            ValueError: a file is missing or damaged, or does not fit; nothing has changed then.
        """
        from agents.models.adapter_files import load_adapters

        folder = Path(folder)
        has_adapters = self.adapted_layers is not None
        if self.holds_adapters(folder) != has_adapters:
            raise ValueError(
                f"expected {'adapters' if has_adapters else 'whole weights'} in {folder}, as this "
                f"{type(self).__name__} has them, got none; were the settings of the adapters "
                "others when it was saved?"
            )
        if has_adapters:
            load_adapters(self, folder)
        else:
            load_weights(self, self.read_weights(folder), str(folder))

    def write_weights(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        """Write config and whole weights; a model with a layout of its own overrides this.

        Args:
            folder: made if it is missing.
            tensors: by their names without adapters.
        """
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(tensors, folder / WEIGHTS)
        write_model_config(self, folder)

    def read_weights(self, folder: Path) -> dict[str, Tensor]:
        """Read what `write_weights` wrote, under the same names.

        Args:
            folder: holds a file of weights.

        Raises:
            ValueError: the file is missing or damaged.
        """
        return read_tensors(folder / WEIGHTS)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Load what `save_pretrained` wrote.

        Raises:
            ValueError: a file is missing or damaged, the config is another model's or has missing
                or unknown keys, or the weights do not fit it.
        """
        folder = Path(folder)
        model = cls(read_model_config(cls, folder))
        load_weights(model, read_tensors(folder / WEIGHTS), str(folder / WEIGHTS))
        return model

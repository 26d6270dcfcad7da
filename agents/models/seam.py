"""The seam between the library and a model: verbs on one linear context.

Sampling and training call the same verbs, so a backbone that implements them can be stepped, trained and evaluated by everything in
`agents`. `Bagel` is the real one; `ToyModel` is the smallest.

Conventions said here once: flow time t = 1 is noise and t = 0 is the image; a velocity is v = dx/dt = noise - image; latents are tokens
`[rows, latent_tokens, latent_dim]` in float32.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn

from agents.models.files import CONFIG, WEIGHTS, load_weights, read_config, read_tensors, write_json, write_tensors
from unigrpo_env.episodes import Decoder


class Context(Protocol):
    """Everything a model has read, one row per episode; opaque to callers but for these."""

    @property
    def batch_size(self) -> int: ...

    def select(self, rows: Tensor) -> Self:
        """Rows by index `[M]` int64, repeats allowed: how the members of a group share a prompt that was read once."""

    def repeat(self, times: int) -> Self:
        """Each row `times` times in a row (row 0, row 0, ..., row 1, ...)."""

    def detach(self) -> Self:
        """The same context, cut from the autograd graph."""


ContextT = TypeVar("ContextT", bound=Context)


class UnifiedModel(nn.Module, ABC, Generic[ContextT]):
    """A model that writes and draws.

    Attributes:
        config_class: the frozen dataclass that a model is built from.
        config: the one it was built from.
        compute_dtype: what the verbs compute in, by autocast; weights keep their own dtype.
    """

    config_class: ClassVar[type]
    config: Any
    compute_dtype: torch.dtype = torch.float32

    def computing(self) -> AbstractContextManager[Any]:
        """Inside, the model computes in `compute_dtype`. Entered by each verb, so that nothing else is touched and no cast outlives an update."""
        if self.compute_dtype == torch.float32:
            return nullcontext()
        return torch.autocast(next(self.parameters()).device.type, self.compute_dtype)

    @abstractmethod
    def start(self, batch_size: int) -> ContextT:
        """An empty context of `batch_size` rows."""

    @abstractmethod
    def read_text(self, context: ContextT, ids: Tensor, mask: Tensor | None = None, *, last_only: bool = False) -> tuple[Tensor, ContextT]:
        """Read text after `context`.

        Args:
            context: what came before.
            ids: `[N, T]` int64.
            mask: `[N, T]` bool, False where a position is padding; padding leaves no trace in the context.
            last_only: give the logits of each row's last unmasked position alone (a row without one: of position 0).

        Returns:
            Logits of the next token, `[N, T, V]` (`[N, 1, V]` with `last_only`), and the grown context. Without gradient a model may
            grow the given context in place; use the returned one.
        """

    def read_image(
        self,
        context: ContextT,
        latent: Tensor | None = None,
        pixels: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        learn: bool = True,
    ) -> ContextT:
        """Read finished pictures after `context`: sources, or what the model drew itself. A model that only draws leaves this out.

        Args:
            context: what came before.
            latent: `[N, L, C]` float32, clean (t = 0).
            pixels: `[N, 3, height, width]` float32 in [-1, 1], for a model that looks at pixels too.
            mask: `[N]` bool, the rows that read; all if left out.
            learn: False keeps gradients out of the reading; what stood in the context before keeps its own.

        Returns:
            The grown context; as for `read_text` the given one may have grown in place.

        Raises:
            NotImplementedError: the model reads no pictures.
            ValueError: neither latent nor pixels, pixels for a model that has no eyes, or none for one that has and was never told how to `look_with`.
        """
        raise NotImplementedError(f"{type(self).__name__} reads no pictures; use a model whose class defines read_image")

    def look_with(self, decode: Decoder | None) -> None:
        """Take the env's `decode`, latents to pictures in [0, 1], for a model that looks at pixels where `read_image` is given latents alone.

        `play`, `Trainer` and `train_supervised` call it; a loop of one's own does, and for the reference too. None: read latents alone. A model without eyes
        for pixels has no use for it.
        """

    @abstractmethod
    def velocity(self, context: ContextT, x: Tensor, t: Tensor) -> Tensor:
        """v(x_t, t) of the image being drawn after `context`, which stays as it is: noise is never remembered.

        Args:
            context: what was read so far, its last token having opened the image (without a thought: the prompt's own).
            x: `[N, L, C]` float32, the noisy latent.
            t: `[N]` float32 in [0, 1], 1 is noise.

        Returns:
            `[N, L, C]` float32.
        """

    @abstractmethod
    def parameter_lists(self) -> dict[str, list[nn.Parameter]]:
        """The trainable parameters by expert, `{"text": [...], "image": [...]}`: what a learning rate or a freeze applies to."""

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write config and weights to `folder` (made if need be); returns it."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(self.state_dict(), folder / WEIGHTS)
        write_json({"model": type(self).__name__} | dataclasses.asdict(self.config), folder / CONFIG)
        return folder

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Load what `save_pretrained` wrote.

        Raises:
            ValueError: a file is missing or damaged, the config is another model's, or the weights do not fit it.
        """
        folder = Path(folder)
        fields = read_config(folder)
        name = fields.pop("model", cls.__name__)
        known = {field.name for field in dataclasses.fields(cls.config_class)}
        if name != cls.__name__ or fields.keys() != known:
            wrong = f"unknown keys {sorted(fields.keys() - known)}, missing keys {sorted(known - fields.keys())}"
            raise ValueError(f"{folder / CONFIG} describes {name!r} with {wrong}; expected the whole config of a {cls.__name__}")
        model = cls(cls.config_class(**fields))
        load_weights(model, read_tensors(folder / WEIGHTS), str(folder / WEIGHTS))
        return model

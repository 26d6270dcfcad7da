"""A model with its adapters switched off: the reference of the penalties, without a copy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from agents.models.base import UnifiedModel
from agents.models.lora import base_tensors, lora_layers, switched_off
from agents.models.wrapping import WrappedModel, of_the_model


class AdaptersOff(WrappedModel[Any]):
    """A view of a model: it computes what the model does without its adapters, and no gradient.

    It has no weights of its own, so nothing in it is trained, moved or saved with it. A copy is a
    view of the same model, or of the model's copy where that is copied too.

    Args:
        model: with adapters. Changes of it show here, those of its adapters apart.
    """

    config = of_the_model("config")
    source = of_the_model("source")

    def __init__(self, model: UnifiedModel[Any]) -> None:
        super().__init__()
        # Outside the parts that nn.Module registers.
        self.__dict__["model"] = model
        self._layers = list(lora_layers(model).values())

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return type(self)(memo.get(id(self.model), self.model))

    @contextmanager
    def _model_alone(self) -> Iterator[UnifiedModel[Any]]:
        with torch.no_grad(), switched_off(self._layers):
            yield self.model

    def empty_context(self, batch_size: int) -> Any:
        """See `UnifiedModel`."""
        with self._model_alone() as model:
            return model.empty_context(batch_size)

    def append_text(
        self, context: Any, ids: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        """See `UnifiedModel`."""
        with self._model_alone() as model:
            return model.append_text(context, ids, mask)

    def append_hidden(
        self,
        context: Any,
        ids: Tensor,
        mask: Tensor | None = None,
        *,
        roles: Tensor | None = None,
    ) -> tuple[Tensor, Any]:
        """See `UnifiedModel`."""
        with self._model_alone() as model:
            return model.append_hidden(context, ids, mask, roles=roles)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """See `UnifiedModel`."""
        with self._model_alone() as model:
            return model.compute_logits(hidden)

    def reserve(self, context: Any, tokens: int, images: int) -> None:
        """See `UnifiedModel`."""
        with self._model_alone() as model:
            model.reserve(context, tokens, images)

    def velocity_bytes(self, context: Any) -> int:
        """See `UnifiedModel`."""
        return self.model.velocity_bytes(context)

    def append_image(
        self,
        context: Any,
        latent: Tensor | None = None,
        pixels: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        with_grad: bool = True,
    ) -> Any:
        """See `UnifiedModel`."""
        with self._model_alone() as model:
            return model.append_image(context, latent, pixels, mask, with_grad=with_grad)

    def prepare_velocity(self, context: Any) -> None:
        """See `UnifiedModel`."""
        with self._model_alone() as model:
            model.prepare_velocity(context)

    def predict_velocity(self, context: Any, x: Tensor, t: Tensor) -> Tensor:
        """See `UnifiedModel`."""
        with self._model_alone() as model:
            return model.predict_velocity(context, x, t)

    def parameters_by_expert(self) -> dict[str, list[nn.Parameter]]:
        """Two empty lists: a view has no parameters."""
        return {expert: [] for expert in self.model.parameters_by_expert()}

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the model without its adapters; returns the folder."""
        folder = Path(folder)
        self.model.write_weights(folder, base_tensors(self.model))
        return folder

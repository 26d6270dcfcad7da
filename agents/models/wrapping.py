"""Models that stand for another model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from agents.models.base import ContextT, UnifiedModel

if TYPE_CHECKING:
    from unigrpo_env.processor import Processor


def of_the_model(name: str) -> Any:
    """An attribute that is always that of `self.model`, also after it changed there.

    Args:
        name: of the attribute.
    """

    def _get(wrapper: Any) -> Any:
        return getattr(wrapper.model, name)

    return property(_get)


class WrappedModel(UnifiedModel[ContextT]):
    """A model that is another one, but for what its class changes.

    Attributes:
        model: the other.
    """

    model: UnifiedModel[Any]
    device = of_the_model("device")
    vocab_size = of_the_model("vocab_size")
    latent_shape = of_the_model("latent_shape")
    reads_images = of_the_model("reads_images")
    checkpointing = of_the_model("checkpointing")
    max_rows = of_the_model("max_rows")

    def _find_processor(self) -> Processor | None:
        return self.model._find_processor()

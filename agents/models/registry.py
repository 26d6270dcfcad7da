"""Models by name. A model's module is imported only when its name is looked up.

>>> "tiny" in MODELS
True
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from agents.models.base import UnifiedModel
from agents.storage import read_config
from rewards.registry import Registry, did_you_mean

TINY = Path(__file__).parent / "tiny"
"""The folder of the shipped weights: a BAGEL of under a million parameters for the shapes world."""

ModelFactory = Callable[[], UnifiedModel[Any]]

MODELS: Registry[ModelFactory] = Registry("model", entry_point_group="unigrpo.models")
"""Functions that make a model, by the name that the setting `model.name` may give."""
# A text is imported when its name is looked up: BAGEL needs transformers and diffusers, which take
# seconds to import.
MODELS.add("tiny", "agents.models.bagel.tiny_config:load_tiny")
MODELS.add("toy", "agents.models.toy:ToyModel")

MODEL_CLASSES: Registry[type[UnifiedModel[Any]]] = Registry(
    "model class", entry_point_group="unigrpo.model_classes"
)
"""Classes by the name that `save_pretrained` wrote; a class of your own must be added here."""
MODEL_CLASSES.add("Bagel", "agents.models.bagel.model:Bagel")
MODEL_CLASSES.add("ToyModel", "agents.models.toy:ToyModel")

FactoryT = TypeVar("FactoryT", bound=ModelFactory)
ClassT = TypeVar("ClassT", bound=type[UnifiedModel[Any]])


def register_model(name: str) -> Callable[[FactoryT], FactoryT]:
    """Make a function that returns a model known as `name`, as a decorator.

    Raises:
        ValueError: the name is taken.
    """

    def _register(factory: FactoryT) -> FactoryT:
        MODELS.add(name, factory)
        return factory

    return _register


def register_model_class(cls: ClassT) -> ClassT:
    """Let `load_model` load what models of this class saved; usable as a decorator.

    Raises:
        ValueError: a class of the same name is known already.
    """
    MODEL_CLASSES.add(cls.__name__, cls)
    return cls


def load_model(name: str) -> UnifiedModel[Any]:
    """Load a registered model, or a folder that `save_pretrained` wrote.

    Args:
        name: `tiny`, `toy`, another registered name, or a path.

    Raises:
        ValueError: it is neither a name nor a folder, or a folder that is damaged or holds the
            model of another program.
    """
    if name in MODELS:
        return MODELS[name]()
    # A registered name comes before a folder of the same name.
    folder = Path(name)
    if not folder.is_dir():
        raise ValueError(
            f"{name!r} is neither a known model nor a folder; {did_you_mean(name, list(MODELS))}, "
            "or the path of a saved model"
        )
    # The registry refuses an unknown name, and proposes names that are spelled alike.
    class_name = str(read_config(folder).get("model"))
    return MODEL_CLASSES[class_name].from_pretrained(folder)

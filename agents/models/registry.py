"""Models by name. A model's module is imported only when its name is looked up.

>>> "tiny" in MODELS
True
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from agents.models.adapter_files import ADAPTER_CONFIG, load_adapters
from agents.models.base import UnifiedModel
from agents.storage import CONFIG, read_config, read_json_object
from rewards.registry import Registry, did_you_mean

TINY = Path(__file__).parent / "tiny"
"""The folder of the shipped weights: a BAGEL of under a million parameters for the shapes world."""

ModelFactory = Callable[..., UnifiedModel[Any]]

MODELS: Registry[ModelFactory] = Registry("model", entry_point_group="unigrpo.models")
"""Functions that make a model, by the name that the setting `model.name` may give."""
# A text is imported when its name is looked up: BAGEL needs transformers and diffusers, which take
# seconds to import.
MODELS.add("tiny", "agents.models.bagel.tiny_config:load_tiny")
MODELS.add("toy", "agents.models.toy:ToyModel")
MODELS.add("tiny_painter", "agents.models.thinker_painter.tiny_shapes:make_tiny_painter")
MODELS.add("thinker_painter", "agents.models.thinker_painter.loading:load_thinker_painter")

MODEL_CLASSES: Registry[type[UnifiedModel[Any]]] = Registry(
    "model class", entry_point_group="unigrpo.model_classes"
)
"""Classes by the name that `save_pretrained` wrote; a class of your own must be added here."""
MODEL_CLASSES.add("Bagel", "agents.models.bagel.model:Bagel")
MODEL_CLASSES.add("ThinkerPainter", "agents.models.thinker_painter.model:ThinkerPainter")
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


def load_model(name: str, **options: Any) -> UnifiedModel[Any]:
    """Load a registered model, a released folder, or a folder that `save_pretrained` wrote.

    Args:
        name: `tiny`, `toy`, another registered name, or a path. A folder of adapters names the
            model that they belong to.
        **options: `dtype` and `device` of any model, and what the function of a registered model
            or the released one (see `load_release`) takes. An option that is None counts as left
            out.

    Returns:
        The model; its `source` is the name or the absolute path, see `source_of`, with adapters
        that of the model they belong to.

    Raises:
        ValueError: it is neither a name nor a folder, or a folder that is damaged or holds the
            model of another program; or the model does not take an option.
    """
    given = {key: value for key, value in options.items() if value is not None}
    folder = Path(name)
    # A registered name comes before a folder of the same name.
    if name in MODELS:
        return _make(MODELS[name], name, given)
    if not folder.is_dir():
        raise ValueError(
            f"{name!r} is neither a known model nor a folder; {did_you_mean(name, list(MODELS))}, "
            "or the path of a saved model"
        )
    if (folder / ADAPTER_CONFIG).is_file():
        return _load_with_adapters(folder, given)
    # Imported here, for the same reason as above.
    from agents.models.bagel.release_files import has_release_files

    # Before `config.json` is read: that of a release may be no JSON.
    if has_release_files(folder):
        from agents.models.bagel.release import load_release

        return _make(functools.partial(load_release, folder), name, given)
    # The registry refuses an unknown name, and proposes names that are spelled alike.
    class_name = str(read_config(folder).get("model"))
    factory = functools.partial(MODEL_CLASSES[class_name].from_pretrained, folder)
    return _make(factory, name, given)


def holds_adapters(folder: Path) -> bool:
    """Whether a model wrote adapters alone to a folder, as training with them does.

    Args:
        folder: of the model, if there is one.
    """
    # Adapters of most classes come without a config: they name the model that they belong to.
    if UnifiedModel.holds_adapters(folder):
        return True
    if not (folder / CONFIG).is_file():
        return False
    name = str(read_json_object(folder / CONFIG).get("model"))
    return name in MODEL_CLASSES and MODEL_CLASSES[name].holds_adapters(folder)


def source_of(name: str) -> str:
    """What is written down of a model's name: a path is made absolute, to be found from anywhere.

    Args:
        name: as `load_model` takes it.
    """
    return name if name in MODELS else str(Path(name).absolute())


def _make(factory: ModelFactory, name: str, options: dict[str, Any]) -> UnifiedModel[Any]:
    """Call a function that makes a model, with those options that it takes."""
    taken = inspect.signature(factory).parameters
    unknown = sorted(options.keys() - taken.keys() - {"dtype", "device"})
    if unknown:
        raise ValueError(
            f"expected no option that the model {name!r} does not take, got {', '.join(unknown)}; "
            "leave them out, or choose a model that has them"
        )
    model = factory(**{key: value for key, value in options.items() if key in taken})
    # A model that does not take these two itself is changed after it was made.
    if "dtype" in options and "dtype" not in taken:
        model.cast_weights(options["dtype"])
    if "device" in options and "device" not in taken:
        model.to(options["device"])
    model.source = source_of(name)
    return model


def _load_with_adapters(folder: Path, options: dict[str, Any]) -> UnifiedModel[Any]:
    """Load the model that adapters belong to, and then them."""
    base = read_json_object(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not base or (Path(base) / ADAPTER_CONFIG).is_file():
        raise ValueError(
            f"expected a model as 'base_model_name_or_path' in {folder / ADAPTER_CONFIG}, got "
            f"{base!r}; write the name or the folder of a whole model there"
        )
    try:
        model = load_model(base, **options)
    except ValueError as error:
        raise ValueError(f"{folder} holds adapters of the model {base!r}: {error}") from error
    load_adapters(model, folder)
    return model

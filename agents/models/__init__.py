"""Models behind the verbs of `agents.models.seam`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from agents.models.bagel import Bagel, BagelConfig
from agents.models.files import read_config
from agents.models.seam import UnifiedModel
from agents.models.toy import ToyConfig, ToyModel
from rewards.registry import Registry, closest

TINY = Path(__file__).parent / "tiny"
"""The shipped weights: a BAGEL of under a million parameters for the shapes world."""

CLASSES: Registry[type[UnifiedModel[Any]]] = Registry("kind of model", entry_point_group="unigrpo.model_classes")
"""Classes by the name that `save_pretrained` wrote; add your own to load what it saved."""
CLASSES.add("Bagel", Bagel)
CLASSES.add("ToyModel", ToyModel)
MODELS: Registry[Callable[[], UnifiedModel[Any]]] = Registry("model", entry_point_group="unigrpo.models")
MODELS.add("tiny", lambda: Bagel.from_pretrained(TINY))
MODELS.add("toy", lambda: ToyModel())


def load_model(name: str) -> UnifiedModel[Any]:
    """A registered model, or a folder written by `save_pretrained`.

    Args:
        name: `tiny`, `toy`, another registered name, or a path.

    Raises:
        ValueError: neither a name nor a folder, or a folder that is damaged or another program's.
    """
    if name in MODELS:
        return MODELS[name]()
    if not Path(name).is_dir():
        raise ValueError(f"{name!r} is neither a known model nor a folder; {closest(name, list(MODELS))}, or the path of a saved model")
    return CLASSES[str(read_config(Path(name)).get("model"))].from_pretrained(name)


__all__ = ["CLASSES", "MODELS", "TINY", "Bagel", "BagelConfig", "ToyConfig", "ToyModel", "UnifiedModel", "load_model"]

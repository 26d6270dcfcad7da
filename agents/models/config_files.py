"""The sizes of a model in a file, with the class that they belong to."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from agents.storage import CONFIG, read_config, write_json


def write_model_config(model: Any, folder: Path, config: Any = None) -> None:
    """Write the config of a model; the name of the class comes first, for `load_model`.

    Args:
        model: its class is named.
        folder: of the model.
        config: in place of the model's own.
    """
    fields = {"model": type(model).__name__, **dataclasses.asdict(config or model.config)}
    write_json(fields, folder / CONFIG)


def read_model_config(model_class: Any, folder: Path) -> Any:
    """Read what `write_model_config` wrote, as a `model_class.config_class`.

    Args:
        model_class: the class of the model.
        folder: of the model.

    Raises:
        ValueError: the file is missing or damaged, or is the config of another model, or has
            missing or unknown keys.
    """
    fields = read_config(folder)
    name = fields.pop("model", model_class.__name__)
    known = {field.name for field in dataclasses.fields(model_class.config_class)}
    unknown = sorted(fields.keys() - known)
    # A missing key is refused too: a default that changes later would change the model.
    missing = sorted(known - fields.keys())
    if name != model_class.__name__ or unknown or missing:
        raise ValueError(
            f"{folder / CONFIG} describes {name!r} with unknown keys {unknown}, missing keys "
            f"{missing}; expected the whole config of a {model_class.__name__}"
        )
    return model_class.config_class(**fields)

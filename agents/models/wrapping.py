"""Models that stand for another model."""

from __future__ import annotations

from typing import Any


def of_the_model(name: str) -> Any:
    """An attribute that is always that of `self.model`, also after it changed there.

    Args:
        name: of the attribute.
    """

    def _get(wrapper: Any) -> Any:
        return getattr(wrapper.model, name)

    return property(_get)

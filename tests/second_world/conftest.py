"""Makes `chat_world` importable by the tests of this folder, and by name for the command line."""

import sys
from pathlib import Path

import pytest

# It registers names, so doctest must not import it a second time.
collect_ignore = ["chat_world.py"]

FOLDER = str(Path(__file__).parent)
if FOLDER not in sys.path:
    sys.path.append(FOLDER)

from chat_world import ChatProcessor, chat_model


@pytest.fixture
def processor():
    """A processor that has nothing in common with that of the shapes world."""
    return ChatProcessor()


@pytest.fixture
def model():
    """A random model that brings this processor."""
    return chat_model()

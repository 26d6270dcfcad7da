"""Makes `tiny` importable by the tests of this folder."""

import sys
from pathlib import Path

import diffusers
import pytest

# The tests import it by its own name, so doctest must not import it a second time.
collect_ignore = ["folders.py", "templates.py", "tiny.py", "tiny_parts.py"]

FOLDER = str(Path(__file__).parent)
if FOLDER not in sys.path:
    sys.path.append(FOLDER)

# Pipelines warn of parts that random ones lack.
diffusers.logging.set_verbosity_error()


@pytest.fixture
def make_model():
    """`tiny.make_model`: a model of a family with random weights."""
    from tiny import make_model

    return make_model


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Arguments of `load_model` for the parts of a family in a folder: `parts(name)`."""
    from folders import save_parts

    saved = {}

    def find(name):
        if name not in saved:
            saved[name] = save_parts(tmp_path_factory.mktemp(name), name)
        return dict(saved[name])

    return find

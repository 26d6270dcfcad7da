"""Models by name."""

import json
import subprocess
import sys

import pytest
import torch

from agents.models.bagel.model import Bagel
from agents.models.registry import (
    MODEL_CLASSES,
    MODELS,
    TINY,
    load_model,
    register_model,
    register_model_class,
)
from agents.models.toy import ToyModel


@pytest.fixture
def restored(monkeypatch):
    """Undo what a test registers."""
    monkeypatch.setattr(MODELS, "_entries", dict(MODELS._entries))
    monkeypatch.setattr(MODEL_CLASSES, "_entries", dict(MODEL_CLASSES._entries))


def test_known_names():
    assert isinstance(load_model("tiny"), Bagel)
    assert isinstance(load_model("toy"), ToyModel)
    assert isinstance(load_model(str(TINY)), Bagel)


@pytest.mark.parametrize("name", ["Bagel", "ToyModel"])
def test_known_classes(name):
    assert MODEL_CLASSES[name].__name__ == name


@pytest.mark.parametrize("kind", ["bagel", "toy"])
def test_saved_folder_is_loaded(small_bagel, tmp_path, kind):
    model = small_bagel if kind == "bagel" else ToyModel()
    loaded = load_model(str(model.save_pretrained(tmp_path / "model")))
    assert type(loaded) is type(model)
    assert loaded.config == model.config
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name])


def test_unknown_name():
    with pytest.raises(ValueError, match="did you mean 'tiny'"):
        load_model("tine")


def test_unknown_class(tmp_path):
    folder = ToyModel().save_pretrained(tmp_path / "toy")
    fields = json.loads((folder / "config.json").read_text()) | {"model": "ToyModle"}
    (folder / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="did you mean 'ToyModel'"):
        load_model(str(folder))


def test_register_model(restored):
    @register_model("small_toy")
    def small_toy():
        """A toy."""
        return ToyModel()

    assert isinstance(load_model("small_toy"), ToyModel)
    assert small_toy.__doc__ == "A toy."
    with pytest.raises(ValueError, match="already registered"):
        register_model("small_toy")(small_toy)


def test_register_model_class(restored, tmp_path):
    @register_model_class
    class MyToy(ToyModel):
        """A toy under another name."""

    folder = MyToy().save_pretrained(tmp_path / "mine")
    assert type(load_model(str(folder))) is MyToy


@pytest.mark.slow
def test_import_is_light():
    """Neither the models nor their libraries are imported before they are asked for."""
    code = (
        "import sys, agents.models.registry as registry; assert 'tiny' in registry.MODELS; "
        "print([m for m in ('transformers', 'diffusers', 'agents.models.bagel') "
        "if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"

"""The model of `examples/own_model.py` keeps the contract of every model."""

import sys
from pathlib import Path

import torch

from agents.models.registry import load_model
from agents.testing import ModelContract
from agents.training.build import import_modules

EXAMPLE = str((Path(__file__).parents[2] / "examples" / "own_model.py").resolve())


def own_model():
    """The example as a module, imported as `--import` does it."""
    import_modules([EXAMPLE])
    return sys.modules[EXAMPLE]


class TestGruModel(ModelContract):
    def make_model(self):
        own_model()
        return load_model("gru")


def test_other_sizes_can_be_saved(tmp_path):
    """The config holds all sizes, so a model of other ones comes back too."""
    module = own_model()
    model = module.GruModel(module.GruConfig(hidden_size=8, processor=""))
    loaded = load_model(str(model.save_pretrained(tmp_path)))
    assert loaded.config == model.config
    assert torch.equal(loaded.head.weight, model.head.weight)

"""Models by name."""

import json
import subprocess
import sys

import pytest
import torch

from agents.models.bagel.model import Bagel
from agents.models.lora import add_adapters, has_adapters
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


@pytest.mark.parametrize("name", ["tiny", "toy", str(TINY)])
def test_source_is_the_name(name):
    assert load_model(name).source == name


def test_source_of_a_folder_is_absolute(small_bagel, tmp_path, monkeypatch):
    small_bagel.save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    assert load_model("model").source == str(tmp_path / "model")


def test_every_model_takes_dtype_and_device():
    model = load_model("toy", dtype=torch.bfloat16, device="meta", height=None)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert {weight.device.type for weight in model.parameters()} == {"meta"}


def test_saved_folder_takes_a_dtype(small_bagel, tmp_path):
    folder = small_bagel.save_pretrained(tmp_path / "model")
    model = load_model(str(folder), dtype=torch.bfloat16)
    assert model.vae2llm.weight.dtype == torch.bfloat16
    # Only weights are converted.
    assert model.rotary.inv_freq.dtype == torch.float32


@pytest.mark.parametrize("name", ["tiny", str(TINY)])
@pytest.mark.parametrize(("option", "value"), [("height", 64), ("vision", False)])
def test_option_that_a_model_does_not_take(name, option, value):
    with pytest.raises(ValueError, match=f"no option that the model .*, got {option};"):
        load_model(name, dtype=torch.float32, **{option: value})


def test_registered_function_takes_options(restored):
    @register_model("sized_toy")
    def sized_toy(height=1, dtype=torch.float32):
        """A toy that knows its dtype before it is made."""
        model = ToyModel()
        model.asked = (height, dtype)
        return model

    model = load_model("sized_toy", height=2, dtype=torch.bfloat16)
    assert model.asked == (2, torch.bfloat16)
    # The function was given the dtype, so it is not set again.
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    with pytest.raises(ValueError, match="got width"):
        load_model("sized_toy", width=2)


def test_release_is_known_by_its_files(release_copy):
    model = load_model(str(release_copy.path), height=32, width=64, vision=False)
    assert isinstance(model, Bagel)
    assert model.source == str(release_copy.path)
    assert model.processor.image_size == (32, 64)


@pytest.fixture
def adapters(small_bagel, tmp_path):
    """A folder of adapters, and the model that they were made for."""
    small_bagel.save_pretrained(tmp_path / "base")
    model = load_model(str(tmp_path / "base"))
    add_adapters(model, {"image": 2}, {"image": 4.0}, None)
    with torch.no_grad():
        for weight in model.trainable_by_expert()["image"]:
            weight.normal_(generator=torch.Generator().manual_seed(1))
    return model.save_pretrained(tmp_path / "adapters"), model


def test_adapters_are_loaded_with_their_model(adapters):
    folder, model = adapters
    loaded = load_model(str(folder))
    assert has_adapters(loaded)
    # That of the model itself, so that saving the adapters again names it.
    assert loaded.source == model.source
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name])


def test_options_reach_the_model_of_adapters(adapters):
    folder, _ = adapters
    loaded = load_model(str(folder), dtype=torch.bfloat16)
    assert loaded.llm2vae.bias.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="got height"):
        load_model(str(folder), height=64)


def test_adapters_of_a_release(release_copy, tmp_path):
    model = load_model(str(release_copy.path), height=32, width=32)
    add_adapters(model, {"image": 2}, {"image": 4.0}, None)
    folder = model.save_pretrained(tmp_path / "adapters")
    loaded = load_model(str(folder), height=32, width=48, dtype=torch.bfloat16)
    assert has_adapters(loaded)
    assert loaded.processor.image_size == (32, 48)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (None, "expected a model as 'base_model_name_or_path' .*, got None"),
        ("self", "write the name or the folder of a whole model there"),
        ("elsewhere", "holds adapters of the model 'elsewhere': 'elsewhere' is neither"),
    ],
)
def test_adapters_without_their_model(adapters, base, message):
    folder, _ = adapters
    path = folder / "adapter_config.json"
    base = str(folder) if base == "self" else base
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": base}))
    with pytest.raises(ValueError, match=message):
        load_model(str(folder))


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

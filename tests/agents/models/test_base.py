"""What every model inherits: processor, frozen copy, saving and loading."""

import json

import pytest
import torch
from torch import nn

from agents.models.bagel.model import Bagel
from agents.models.toy import ToyConfig, ToyModel
from rewards.registry import Registry
from unigrpo_env import processor as processor_module


class StubProcessor:
    """Stands for a processor that the registry makes."""


class ModuleProcessor(nn.Module):
    """A processor that is a module with weights."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))


@pytest.fixture
def stub_registry(monkeypatch):
    """The name `stub` makes a new `StubProcessor` each time it is called."""
    registry = Registry("processor")
    registry.add("stub", StubProcessor)
    monkeypatch.setattr(processor_module, "PROCESSORS", registry)


def test_processor_comes_from_the_config(stub_registry):
    model = ToyModel(ToyConfig(processor="stub"))
    assert isinstance(model.processor, StubProcessor)
    assert model.processor is model.processor


def test_processor_that_was_set_comes_first(stub_registry):
    model = ToyModel(ToyConfig(processor="stub"))
    own = StubProcessor()
    model.processor = own
    assert model.processor is own


def test_model_without_a_processor():
    model = ToyModel(ToyConfig(processor=""))
    with pytest.raises(ValueError, match=r"brings no processor.*`model.processor = ...`"):
        _ = model.processor


def test_unknown_processor(stub_registry):
    with pytest.raises(ValueError, match="unknown processor 'stab'; did you mean 'stub'"):
        _ = ToyModel(ToyConfig(processor="stab")).processor


def test_processor_is_no_part_of_the_model():
    model = ToyModel()
    before = list(model.state_dict())
    model.processor = ModuleProcessor()
    assert isinstance(model.processor, ModuleProcessor)
    assert list(model.state_dict()) == before
    assert [name for name, _ in model.named_modules()] == [""]
    assert len(list(model.parameters())) == 2


def test_frozen_copy_shares_the_processor(stub_registry):
    model = ToyModel(ToyConfig(processor="stub"))
    copied = model.frozen_copy()
    assert copied.processor is model.processor
    own = ModuleProcessor()
    model.processor = own
    copied = model.frozen_copy()
    assert copied.processor is own
    assert own.weight.requires_grad, "the processor is not frozen"


def test_frozen_copy_needs_no_processor():
    copied = ToyModel(ToyConfig(processor="")).frozen_copy()
    assert not any(weight.requires_grad for weight in copied.parameters())


def test_frozen_copy_keeps_the_model_trainable():
    model = ToyModel(ToyConfig(processor=""))
    copied = model.frozen_copy()
    assert all(weight.requires_grad for weight in model.parameters())
    with torch.no_grad():
        model.words.fill_(1)
    assert not copied.words.any()


def test_toy_reads_no_images():
    model = ToyModel()
    with pytest.raises(NotImplementedError, match="ToyModel reads no images"):
        model.append_image(model.empty_context(1), torch.zeros(1, 1, 12))


def test_cast_weights_leaves_buffers(small_bagel):
    weights = list(small_bagel.parameters())
    buffers = {name: buffer.clone() for name, buffer in small_bagel.named_buffers()}
    assert buffers["rotary.inv_freq"].dtype == torch.float32
    assert small_bagel.cast_weights(torch.bfloat16) is small_bagel
    for weight, before in zip(small_bagel.parameters(), weights, strict=True):
        assert weight is before, "an optimizer keeps its parameters"
        assert weight.dtype == torch.bfloat16
    for name, buffer in small_bagel.named_buffers():
        assert torch.equal(buffer, buffers[name])
        assert buffer.dtype == buffers[name].dtype


def test_damaged_weights(small_bagel, tmp_path):
    folder = small_bagel.save_pretrained(tmp_path / "model")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        Bagel.from_pretrained(folder)


def test_weights_of_another_model(small_bagel, tmp_path):
    folder = small_bagel.save_pretrained(tmp_path / "model")
    toy = ToyModel().save_pretrained(tmp_path / "toy")
    (folder / "model.safetensors").write_bytes((toy / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="does not fit this Bagel: missing"):
        Bagel.from_pretrained(folder)
    with pytest.raises(ValueError, match="'ToyModel'"):
        Bagel.from_pretrained(toy)


def test_missing_and_unknown_keys(small_bagel, tmp_path):
    folder = small_bagel.save_pretrained(tmp_path)
    fields = json.loads((folder / "config.json").read_text())
    del fields["processor"]
    (folder / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"missing keys \['processor'\]"):
        Bagel.from_pretrained(folder)
    fields["wings"] = 2
    (folder / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"unknown keys \['wings'\]"):
        Bagel.from_pretrained(folder)

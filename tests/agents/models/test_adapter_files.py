"""Adapters in files: PEFT reads them, and they fit one model alone."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from agents.models.adapter_files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    load_adapters,
    save_adapters,
)
from agents.models.lora import adapters_by_expert, add_adapters, has_adapters
from agents.models.registry import load_model
from agents.testing.inputs import outputs_of

RELEASE = Path(__file__).parents[2] / "data" / "bagel_release"
ALPHA = {"text": 4.0, "image": 5.0}


def outputs(model):
    """Logits of a text and a velocity after it."""
    with torch.no_grad():
        return outputs_of(model)


def assert_same(found, expected):
    """To the last bit."""
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def adapted(model, rank=(2, 3), targets=None, alpha=ALPHA):
    """The model, with adapters whose weights are not zero."""
    add_adapters(model, dict(zip(("text", "image"), rank, strict=True)), alpha, targets)
    generator = torch.Generator().manual_seed(1)
    for weights in adapters_by_expert(model).values():
        for weight in weights:
            weight.data.normal_(0, 0.1, generator=generator)
    return model


@pytest.fixture
def saved(small_bagel, tmp_path):
    """A folder of adapters, the model with them, and a copy of it without."""
    before = small_bagel.frozen_copy()
    model = adapted(small_bagel)
    model.source = "base"
    save_adapters(model, tmp_path / "adapters")
    return tmp_path / "adapters", model, before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loaded_adapters_compute_the_same(small_bagel, tmp_path, dtype):
    before = small_bagel.cast_weights(dtype).frozen_copy()
    model = adapted(small_bagel)
    save_adapters(model, tmp_path)
    load_adapters(before, tmp_path)
    assert_same(outputs(before), outputs(model))
    assert before.adapted_layers == model.adapted_layers
    for expert, weights in before.trainable_by_expert().items():
        assert_same(weights, model.trainable_by_expert()[expert])
        assert all(weight.requires_grad and weight.dtype == torch.float32 for weight in weights)


def test_existing_adapters_are_filled(saved):
    folder, model, other = saved
    add_adapters(other, {"text": 2, "image": 3}, ALPHA, seed=7)
    trainable = other.trainable_by_expert()["text"]
    load_adapters(other, folder)
    assert_same(outputs(other), outputs(model))
    # The very same parameters: an optimiser holds them.
    assert all(a is b for a, b in zip(trainable, other.trainable_by_expert()["text"], strict=True))


@pytest.mark.parametrize("targets", [None, ["q_proj", "llm2vae"]])
@pytest.mark.parametrize("rank", [(2, 3), (4, 4), (0, 2)])
def test_peft_reads_the_folder(small_bagel, tmp_path, rank, targets):
    before = small_bagel.frozen_copy()
    model = adapted(small_bagel, rank, targets)
    save_adapters(model.requires_grad_(False), tmp_path)
    theirs = PeftModel.from_pretrained(before, tmp_path)
    assert_same(outputs(theirs.base_model.model), outputs(model))


def test_folder_of_peft_is_read(small_bagel, tmp_path):
    other = small_bagel.frozen_copy()
    config = LoraConfig(
        r=3,
        lora_alpha=7,
        target_modules=["q_proj", "down_proj_moe_gen", "q_proj_moe_gen", "llm2vae"],
        alpha_pattern={r"layers.1.self_attn.q_proj_moe_gen": 11},
        init_lora_weights=False,
        use_rslora=True,
    )
    theirs = get_peft_model(small_bagel, config)
    theirs.save_pretrained(tmp_path)
    load_adapters(other, tmp_path)
    torch.testing.assert_close(outputs(other), outputs(theirs.base_model.model))
    layer = "language_model.model.layers.0.self_attn.q_proj"
    assert layer in other.adapted_layers["text"]
    assert f"{layer}_moe_gen" in other.adapted_layers["image"]


def test_settings_name_the_model(saved):
    folder, model, _ = saved
    fields = json.loads((folder / ADAPTER_CONFIG).read_text())
    assert fields["base_model_name_or_path"] == "base"
    assert fields["task_type"] is None
    assert fields["peft_type"] == "LORA"
    model.source = ""
    save_adapters(model, folder)
    fields = json.loads((folder / ADAPTER_CONFIG).read_text())
    assert fields["base_model_name_or_path"] is None


def test_files_are_small(saved):
    folder, model, _ = saved
    assert {path.name for path in folder.iterdir()} == {ADAPTER_CONFIG, ADAPTER_WEIGHTS}
    tensors = load_file(folder / ADAPTER_WEIGHTS)
    trainable = model.trainable_by_expert()
    assert len(tensors) == len(trainable["text"]) + len(trainable["image"])
    layer = "base_model.model.language_model.model.layers.0.self_attn.q_proj"
    assert tensors[f"{layer}.lora_A.weight"].shape == (2, 32)
    assert tensors[f"{layer}_moe_gen.lora_B.weight"].shape == (32, 3)


def test_adapters_of_a_larger_model(saved):
    folder, *_ = saved
    other = load_model("tiny")
    expected = outputs(other)
    message = r"adapters of 'base', does not fit this Bagel: .*lora_A.weight: expected \(2, 96\)"
    with pytest.raises(ValueError, match=message + r", got \(2, 32\); .*; and \d+ more"):
        load_adapters(other, folder)
    assert not has_adapters(other)
    assert_same(outputs(other), expected)
    assert all(weight.requires_grad for weight in other.trainable_by_expert()["text"])


def test_adapters_of_layers_that_are_not_there(saved):
    folder, _, other = saved
    tensors = load_file(folder / ADAPTER_WEIGHTS)
    for odd in ("base_model.model.head.lora_A.weight", "base_model.model.llm2vae.lora_C.weight"):
        save_file({**tensors, odd: torch.ones(2, 32)}, folder / ADAPTER_WEIGHTS)
        with pytest.raises(ValueError, match=f"not fit this Bagel: unexpected {odd}. Was"):
            load_adapters(other, folder)
    assert not has_adapters(other)


def test_existing_adapters_of_another_rank(saved):
    folder, _, other = saved
    adapted(other, (2, 8))
    expected = outputs(other)
    message = r"q_proj_moe_gen.lora_A.weight: expected \(8, 32\), got \(3, 32\)"
    with pytest.raises(ValueError, match=message):
        load_adapters(other, folder)
    assert_same(outputs(other), expected)


def test_existing_adapters_of_other_layers(saved):
    folder, _, other = saved
    adapted(other, targets=["q_proj"])
    with pytest.raises(ValueError, match=r"unexpected .*\.mlp\.down_proj\.lora_A\.weight"):
        load_adapters(other, folder)


def test_existing_adapters_of_another_alpha(saved):
    folder, _, other = saved
    adapted(other, alpha={"text": 4, "image": 6})
    expected = outputs(other)
    with pytest.raises(ValueError, match=r"_moe_gen: expected alpha 6, got 5; give"):
        load_adapters(other, folder)
    assert_same(outputs(other), expected)


def test_adapters_of_another_kind(saved):
    folder, _, other = saved
    path = folder / ADAPTER_CONFIG
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({**fields, "peft_type": "LOHA"}))
    with pytest.raises(ValueError, match=r"expected LoRA adapters .*, got 'LOHA' with 56 tensors"):
        load_adapters(other, folder)
    path.write_text(json.dumps(fields))
    save_file({"weight": torch.zeros(2)}, folder / ADAPTER_WEIGHTS)
    with pytest.raises(ValueError, match="got 'LORA' with 1 tensors"):
        load_adapters(other, folder)


def test_damaged_files(saved):
    folder, _, other = saved
    path = folder / ADAPTER_WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_adapters(other, folder)
    path.unlink()
    with pytest.raises(ValueError, match="expected a safetensors file"):
        load_adapters(other, folder)
    (folder / ADAPTER_CONFIG).write_text("[")
    with pytest.raises(ValueError, match="is not JSON"):
        load_adapters(other, folder)
    assert not has_adapters(other)


def test_model_without_adapters_has_none_to_save(small_bagel, tmp_path):
    with pytest.raises(ValueError, match="expected a Bagel with adapters, got one without"):
        save_adapters(small_bagel, tmp_path / "adapters")
    assert not (tmp_path / "adapters").exists()


def test_model_with_adapters_saves_them_alone(small_bagel, tmp_path):
    model = adapted(small_bagel)
    folder = model.save_pretrained(tmp_path / "model")
    assert {path.name for path in folder.iterdir()} == {ADAPTER_CONFIG, ADAPTER_WEIGHTS}


@pytest.mark.parametrize("with_adapters", [False, True])
def test_model_is_filled_with_what_it_saved(small_bagel, tmp_path, with_adapters):
    model = adapted(small_bagel) if with_adapters else small_bagel
    expected = outputs(model)
    model.save_pretrained(tmp_path)
    weights = [weight for expert in model.trainable_by_expert().values() for weight in expert]
    for weight in weights:
        weight.data.add_(0.1)
    assert not torch.equal(outputs(model)[0], expected[0])
    model.load_saved(tmp_path)
    assert_same(outputs(model), expected)


def test_model_is_not_filled_with_the_other_kind(small_bagel, tmp_path):
    whole = small_bagel.save_pretrained(tmp_path / "whole")
    other = small_bagel.frozen_copy()
    model = adapted(small_bagel)
    alone = model.save_pretrained(tmp_path / "alone")
    expected = outputs(model)
    with pytest.raises(ValueError, match=r"expected adapters in .*whole, .* got none"):
        model.load_saved(whole)
    assert_same(outputs(model), expected)
    with pytest.raises(ValueError, match=r"expected whole weights in .*alone, .* got none"):
        other.load_saved(alone)


@pytest.mark.parametrize("with_adapters", [False, True])
def test_released_model_is_filled_with_what_it_saved(tmp_path, with_adapters):
    model = load_model(str(RELEASE))
    if with_adapters:
        adapted(model)
    folder = model.save_pretrained(tmp_path / "saved")
    assert (folder / "llm_config.json").is_file() != with_adapters
    loaded = load_model(str(folder))
    assert has_adapters(loaded) == with_adapters
    assert_same(outputs(loaded), outputs(model))
    expected = outputs(model)
    for weights in model.trainable_by_expert().values():
        for weight in weights:
            weight.data.add_(0.1)
    assert not torch.equal(outputs(model)[0], expected[0])
    model.load_saved(folder)
    assert_same(outputs(model), expected)

"""What is saved is what diffusers, transformers and PEFT read, and comes back bit for bit."""

import inspect
import json
from pathlib import Path

import diffusers
import peft
import pytest
import torch
import transformers
from folders import load_parts, save_thinker
from safetensors.torch import load_file, save_file

from agents.models.lora import (
    adapter_weights,
    add_adapters,
    base_tensors,
    inject,
    linear_layers,
    lora_layers,
    merge_adapters,
)
from agents.models.registry import holds_adapters, load_model
from agents.models.thinker_painter.latent_layout import to_tokens

ADAPTED = ["sd3", "zimage", "klein", "qwen"]
TEXTS = ["two red circles", "a blue square left of a green cross"]
IDS = torch.tensor([[30, 41, 52, 63, 74], [35, 46, 57, 68, 79]])
CLOSE = {"atol": 1e-5, "rtol": 0}
LANGUAGE_MODELS = {
    False: transformers.AutoModelForCausalLM,
    True: transformers.AutoModelForImageTextToText,
}
"""The class, by whether the model sees."""
LORA = "pytorch_lora_weights.safetensors"


def adapted(model, seed=0):
    """The model, with adapters of two ranks whose weights are not zero; alpha is not the rank."""
    add_adapters(model, {"text": 2, "image": 3}, {"text": 5, "image": 7})
    generator = torch.Generator().manual_seed(seed)
    for weight in adapter_weights(model).values():
        weight.data.normal_(0, 0.3, generator=generator)
    return model


def changed(model):
    """The model, with other weights."""
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        weight.data.add_(torch.randn(weight.shape, generator=generator), alpha=0.02)
    return model


@torch.no_grad()
def outputs(model):
    """Logits and velocities."""
    x = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    logits, context = model.append_text(model.empty_context(2), IDS)
    return logits, model.predict_velocity(context, x, torch.tensor([0.3, 0.9]))


def assert_same(model, other):
    for found, expected in zip(outputs(model), outputs(other), strict=True):
        assert torch.equal(found, expected)


def vanilla(options, folder):
    """The pipeline and its language model with the adapters of a folder, without this library."""
    pipeline = diffusers.DiffusionPipeline.from_pretrained(options["painter"])
    pipeline.load_lora_weights(folder / "painter")
    pipeline.set_progress_bar_config(disable=True)
    inside = "thinker" not in options
    place = options["painter"] if inside else options["thinker"]
    sees = inside and "VL" in type(pipeline.text_encoder).__name__
    thinker = LANGUAGE_MODELS[sees].from_pretrained(
        place, subfolder="text_encoder" if inside else ""
    )
    if inside:
        is_headless = type(pipeline.text_encoder) is not type(thinker)
        pipeline.text_encoder = thinker.model if is_headless else thinker
    peft.PeftModel.from_pretrained(thinker, folder / "thinker")
    return pipeline, thinker.eval()


def drawn(pipeline, call, steps=4):
    """Latents, times and velocities of each step of a pipeline's own call, and its last latents."""
    seen = []
    step = pipeline.scheduler.step

    def watch(velocity, t, sample, *args, **kwargs):
        seen.append((sample.clone(), float(t) / 1000, velocity.clone()))
        return step(velocity, t, sample, *args, **kwargs)

    watch.__signature__ = inspect.signature(step)
    pipeline.scheduler.step = watch
    generator = torch.Generator().manual_seed(3)
    found = pipeline(
        prompt=list(TEXTS),
        num_inference_steps=steps,
        output_type="latent",
        generator=generator,
        **call,
    )
    sigmas = pipeline.scheduler.sigmas.tolist()
    sample, _, velocity = seen[-1]
    last = sample + (sigmas[-1] - sigmas[-2]) * velocity
    return seen, sigmas, last, found


@pytest.mark.parametrize("name", ADAPTED)
def test_adapters_are_read_by_others(parts, tmp_path, name):
    options = parts(name)
    model = adapted(load_parts(options))
    model.save_pretrained(tmp_path)
    pipeline, thinker = vanilla(options, tmp_path)
    seen, sigmas, last, _ = drawn(pipeline, model.painter.call)
    with torch.no_grad():
        conditions = model.painter.encode(TEXTS)
        x = to_tokens(seen[0][0])
        for step, (sample, t, expected) in enumerate(seen):
            times = torch.full((2,), t)
            velocity = model.painter.predict_velocity(conditions, to_tokens(sample), times)
            torch.testing.assert_close(velocity, to_tokens(expected), **CLOSE)
            velocity = model.painter.predict_velocity(conditions, x, times)
            x = x + (sigmas[step + 1] - sigmas[step]) * velocity
        torch.testing.assert_close(x, to_tokens(last), **CLOSE)
        expected = thinker(IDS).logits
    torch.testing.assert_close(outputs(model)[0], expected, **CLOSE)
    # The adapters are not without effect.
    before = outputs(load_parts(options))
    for found, other in zip(outputs(model), before, strict=True):
        assert (found - other).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["sd3", "zimage", "qwen"])
def test_adapters_come_back(parts, tmp_path, name):
    model = adapted(load_parts(parts(name)))
    model.save_pretrained(tmp_path)
    assert holds_adapters(tmp_path)
    loaded = load_model(str(tmp_path))
    assert_same(loaded, model)
    expected = adapter_weights(model)
    for key, weight in adapter_weights(loaded).items():
        assert torch.equal(weight, expected[key]), key
    assert loaded.config == model.config
    assert loaded.adapted_layers == model.adapted_layers
    # Into a model that has some already, as training does when it goes on.
    other = adapted(load_parts(parts(name)), seed=1)
    other.load_saved(tmp_path)
    assert_same(other, model)


@pytest.mark.parametrize("expert", ["text", "image"])
def test_adapters_of_one_part(parts, tmp_path, expert):
    model = load_parts(parts("sd3"))
    add_adapters(model, {expert: 2}, {expert: 5})
    for weight in adapter_weights(model).values():
        weight.data.normal_(0, 0.3)
    model.save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"config.json", "thinker" if expert == "text" else "painter"}
    assert_same(load_model(str(tmp_path)), model)


def test_factor_of_each_layer_comes_back(parts, tmp_path):
    """Adapters of other programs may differ from layer to layer."""
    model = load_parts(parts("sd3"))
    layers = [name for name in linear_layers(model) if name.endswith(("q_proj", "to_q"))]
    ranks = {name: 2 + number for number, name in enumerate(layers)}
    inject(model, ranks, {name: 3.0 * rank + 1 for name, rank in ranks.items()}, seed=0)
    for weight in adapter_weights(model).values():
        weight.data.normal_(0, 0.3)
    model.save_pretrained(tmp_path)
    assert_same(load_model(str(tmp_path)), model)
    pipeline, thinker = vanilla(parts("sd3"), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(outputs(model)[0], thinker(IDS).logits, **CLOSE)
        (sample, t, expected), *_ = drawn(pipeline, model.painter.call)[0]
        conditions = model.painter.encode(TEXTS)
        found = model.painter.predict_velocity(conditions, to_tokens(sample), torch.full((2,), t))
    torch.testing.assert_close(found, to_tokens(expected), **CLOSE)


def test_file_without_alpha_counts_with_a_factor_of_one(parts, tmp_path):
    options = parts("sd3")
    adapted(load_parts(options)).save_pretrained(tmp_path)
    path = tmp_path / "painter" / LORA
    save_file(load_file(path), path, {"format": "pt"})
    model = load_model(str(tmp_path))
    assert {layer.scaling["default"] for layer in layers_of(model, "transformer")} == {1.0}
    assert {layer.scaling["default"] for layer in layers_of(model, "thinker")} == {2.5}
    pipeline, _ = vanilla(options, tmp_path)
    (sample, t, expected), *_ = drawn(pipeline, model.painter.call)[0]
    with torch.no_grad():
        conditions = model.painter.encode(TEXTS)
        found = model.painter.predict_velocity(conditions, to_tokens(sample), torch.full((2,), t))
    torch.testing.assert_close(found, to_tokens(expected), **CLOSE)


def layers_of(model, part):
    return [layer for name, layer in lora_layers(model).items() if name.startswith(part)]


def test_adapters_of_another_base(parts, tmp_path):
    options = parts("sd3")
    adapted(load_parts(options)).save_pretrained(tmp_path / "adapters")
    thinker = save_thinker(tmp_path / "lm", num_hidden_layers=1, layer_types=None)
    other = adapted(load_parts({**options, "thinker": str(thinker)}), seed=1)
    before = {key: weight.clone() for key, weight in adapter_weights(other).items()}
    message = r"adapters, does not fit this ThinkerPainter: unexpected .*thinker\.model\.layers\.1"
    with pytest.raises(ValueError, match=message):
        other.load_saved(tmp_path / "adapters")
    assert all(torch.equal(weight, before[key]) for key, weight in adapter_weights(other).items())
    path = tmp_path / "adapters" / "config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({**fields, "thinker": str(thinker)}))
    with pytest.raises(ValueError, match=message):
        load_model(str(tmp_path / "adapters"))


def test_adapters_with_another_factor(parts, tmp_path):
    adapted(load_parts(parts("sd3"))).save_pretrained(tmp_path)
    other = load_parts(parts("sd3"))
    add_adapters(other, {"text": 2, "image": 3}, {"text": 5, "image": 8})
    with pytest.raises(ValueError, match=r"transformer\..*: expected alpha 8, got 7"):
        other.load_saved(tmp_path)
    with pytest.raises(ValueError, match="to hold adapters just as this model has them"):
        load_parts(parts("sd3")).load_saved(tmp_path)


def test_damaged_adapters(parts, tmp_path):
    adapted(load_parts(parts("sd3"))).save_pretrained(tmp_path)
    path = tmp_path / "painter" / LORA
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("name", ["sd3", "zimage", "qwen"])
def test_whole_weights_are_read_by_others(parts, tmp_path, name):
    options = parts(name)
    model = changed(load_parts(options))
    model.save_pretrained(tmp_path)
    assert not holds_adapters(tmp_path)
    sees = model.vision is not None
    thinker = LANGUAGE_MODELS[sees].from_pretrained(tmp_path / "thinker")
    kind = type(model.transformer)
    transformer = kind.from_pretrained(tmp_path / "painter", subfolder="transformer")
    for part, saved in ((model.thinker, thinker), (model.transformer, transformer)):
        expected = part.state_dict()
        assert all(torch.equal(value, expected[key]) for key, value in saved.state_dict().items())
    loaded = load_model(str(tmp_path))
    assert_same(loaded, model)
    assert loaded.shares_encoder == model.shares_encoder
    if loaded.shares_encoder:
        weight = loaded.painter.pipeline.text_encoder.get_input_embeddings().weight
        assert weight is loaded.thinker.get_input_embeddings().weight


@pytest.mark.parametrize("name", ["sd3", "zimage"])
def test_adapters_of_whole_weights(parts, tmp_path, name):
    """They belong to the folder of these, and no more to the parts that these were made of."""
    changed(load_parts(parts(name))).save_pretrained(tmp_path / "whole")
    model = adapted(load_model(str(tmp_path / "whole")))
    model.save_pretrained(tmp_path / "adapters")
    loaded = load_model(str(tmp_path / "adapters"))
    assert_same(loaded, model)
    # Whole weights again depend on neither.
    merge_adapters(loaded)
    loaded.write_weights(tmp_path / "merged", base_tensors(loaded))
    (tmp_path / "whole").rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"to which the adapters in .* belong, found none; if it"):
        load_model(str(tmp_path / "adapters"))
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["base"] == ""
    merged = load_model(str(tmp_path / "merged"))
    for found, expected in zip(outputs(merged), outputs(model), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["sd3", "klein"])
def test_model_that_was_made_in_memory(make_model, tmp_path, name):
    model = changed(make_model(name))
    model.save_pretrained(tmp_path / "whole")
    loaded = load_model(str(tmp_path / "whole"))
    assert_same(loaded, model)
    adapted(loaded).save_pretrained(tmp_path / "adapters")
    again = load_model(str(tmp_path / "adapters"))
    assert_same(again, loaded)
    # The pipeline is written without the adapters, in a form that diffusers reads.
    merge_adapters(again)
    again.write_weights(tmp_path / "merged", base_tensors(again))
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "merged" / "painter")
    merged = load_model(str(tmp_path / "merged"))
    for part in ("transformer", "text_encoder"):
        expected = getattr(merged.painter.pipeline, part).state_dict()
        found = getattr(pipeline, part).state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(value, expected[key]) for key, value in found.items())
    for found, expected in zip(outputs(merged), outputs(loaded), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_adapters_of_a_model_that_was_made_in_memory(make_model, tmp_path):
    model = adapted(make_model("sd3"))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a part that was made in memory; save the model whole"):
        load_model(str(tmp_path))
    other = adapted(make_model("sd3"), seed=1)
    other.load_saved(tmp_path)
    assert_same(other, model)


def test_parts_that_were_moved(parts, tmp_path):
    options = parts("sd3")
    moved = {**options, "thinker": str(save_thinker(tmp_path / "before"))}
    model = adapted(load_parts(moved))
    model.save_pretrained(tmp_path / "adapters")
    other = save_thinker(tmp_path / "other")
    with pytest.raises(ValueError, match=r"expected the thinker .*before.*, got .*other.*leave it"):
        load_model(str(tmp_path / "adapters"), thinker=str(other))
    Path(moved["thinker"]).rename(tmp_path / "after")
    with pytest.raises(ValueError, match=r"the thinker .*before.* cannot be loaded"):
        load_model(str(tmp_path / "adapters"))
    loaded = load_model(str(tmp_path / "adapters"), thinker=str(tmp_path / "after"))
    assert_same(loaded, model)
    assert loaded.config.thinker == str(tmp_path / "after")


def test_settings_in_place_of_those_of_the_config(parts, tmp_path):
    adapted(load_parts(parts("sd3"), strict=True)).save_pretrained(tmp_path)
    assert load_model(str(tmp_path)).config.strict
    loaded = load_model(str(tmp_path), tells="answer", strict=False, height=24, thinking=True)
    assert (loaded.config.tells, loaded.config.strict) == ("answer", False)
    assert not loaded.painter.strict
    assert loaded.painter.image_size == (24, parts("sd3")["width"])
    assert loaded.config.thinking is True


def test_pipeline_without_a_loader_of_adapters(parts, tmp_path):
    options = {**parts("ovis"), "thinker": parts("sd3")["thinker"]}
    model = adapted(load_parts(options))
    assert not hasattr(model.painter.pipeline, "load_lora_weights")
    model.save_pretrained(tmp_path)
    assert_same(load_model(str(tmp_path)), model)

"""From folders to a model: parts of their own and a thinker inside, and what is refused."""

import json
import shutil
import time
from pathlib import Path

import diffusers
import pytest
import torch
from folders import HEADLESS, load_parts, save_thinker
from tiny import FAMILIES, INSIDE

from agents.models.registry import load_model
from agents.models.thinker_painter.loading import PAINTERS, THINKERS
from agents.models.thinker_painter.painter import Painter

TEXTS = ["two red circles", "a blue square left of a green cross"]
SHARED = tuple(dict.fromkeys((*INSIDE, *HEADLESS)))

SIZES = {
    "sd3": r"asked for a velocity with .*divisible by 4 but are 17 and 24",
    "klein": r"height and width that Flux2KleinPipeline draws, got 17 x .*, of which it makes 16 x",
}
"""What is said of a height of 17 by a pipeline that refuses it, and of one that rounds it."""


def velocities(painter):
    """Of two texts at two times."""
    x = torch.randn(2, *painter.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return painter.predict_velocity(painter.encode(TEXTS), x, torch.tensor([0.3, 0.9]))


@pytest.mark.parametrize("name", SHARED)
def test_encoder_of_a_pipeline_is_the_thinker(parts, name):
    options = parts(name)
    model = load_parts(options)
    assert model.config.thinker == "inside"
    assert model.shares_encoder
    encoder = model.painter.pipeline.text_encoder
    saved = json.loads(Path(options["painter"], "model_index.json").read_text())
    assert type(encoder).__name__ == saved["text_encoder"][1]
    places = {weight.data_ptr() for weight in model.thinker.parameters()}
    assert all(weight.data_ptr() in places for weight in encoder.parameters())
    # The head writes, and it is not made up.
    assert model.thinker.get_output_embeddings().weight.data_ptr() in places
    pipeline = diffusers.DiffusionPipeline.from_pretrained(options["painter"])
    size = (options["height"], options["width"])
    expected = velocities(Painter(pipeline, *size, **options["call"]))
    assert torch.equal(velocities(model.painter), expected)


def test_thinker_of_its_own(parts):
    options = parts("sd3")
    model = load_parts(options)
    assert not model.shares_encoder
    assert model.config.thinker == options["thinker"]
    assert model.config.painter == options["painter"]
    assert model.source == "thinker_painter"
    assert model.painter.image_size == (16, 24)


def test_relative_folders_are_found_from_anywhere(parts, monkeypatch, tmp_path):
    options = parts("sd3")
    monkeypatch.chdir(f"{options['painter']}/..")
    model = load_parts({**options, "painter": "pipeline", "thinker": "lm"})
    assert model.config.painter == options["painter"]
    assert model.config.thinker == options["thinker"]


def test_registered_parts(parts):
    options = parts("zimage")
    kept = dict(PAINTERS._entries), dict(THINKERS._entries)
    try:
        PAINTERS.add("small_zimage", lambda: FAMILIES["zimage"]()[0])
        model = load_parts({**options, "painter": "small_zimage"})
        assert model.config.painter == "small_zimage"
        assert model.thinker is model.painter.pipeline.text_encoder
    finally:
        PAINTERS._entries, THINKERS._entries = kept


def test_bfloat16_keeps_what_a_class_keeps_in_float32(parts):
    options = parts("krea2")
    options["thinker"] = parts("sd3")["thinker"]
    for model in (load_parts(options, dtype=torch.bfloat16), load_parts(options)):
        model.cast_weights(torch.bfloat16)
        dtypes = {name: weight.dtype for name, weight in model.transformer.named_parameters()}
        assert dtypes["transformer_blocks.0.attn.norm_q.weight"] == torch.float32
        assert dtypes["transformer_blocks.0.attn.to_q.weight"] == torch.bfloat16
        for part in (model.thinker, *model.painter.frozen):
            assert {weight.dtype for weight in part.parameters()} == {torch.bfloat16}
        assert velocities(model.painter).isfinite().all()


def test_bfloat16_casts_a_shared_encoder_once(parts):
    model = load_parts(parts("zimage"), dtype=torch.bfloat16)
    encoder = model.painter.pipeline.text_encoder
    assert {weight.dtype for weight in encoder.parameters()} == {torch.bfloat16}
    assert encoder.embed_tokens.weight is model.thinker.get_input_embeddings().weight


@pytest.mark.parametrize("part", ["thinker", "painter"])
def test_hub_id_while_offline(parts, part, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    options = {**parts("sd3"), part: "nobody/nothing"}
    began = time.perf_counter()
    with pytest.raises(ValueError, match=f"the {part} 'nobody/nothing' cannot be loaded .*; give"):
        load_parts(options)
    assert time.perf_counter() - began < 2


def test_thinker_inside_of_a_hub_id_while_offline(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="the painter 'nobody/nothing' cannot be loaded"):
        load_model("thinker_painter", painter="nobody/nothing")


def test_no_painter_is_given():
    with pytest.raises(ValueError, match=r"expected a painter, got none; .* as model\.painter"):
        load_model("thinker_painter")


@pytest.mark.parametrize("thinker", ["inside", "folder"])
def test_folder_that_is_no_pipeline(parts, thinker, tmp_path):
    options = parts("sd3")
    chosen = options["thinker"] if thinker == "folder" else "inside"
    with pytest.raises(ValueError, match=r"the painter .* cannot be loaded .*model_index\.json"):
        load_parts({**options, "thinker": chosen, "painter": str(tmp_path)})


def test_pipeline_without_its_weights(parts, tmp_path):
    options = parts("sd3")
    shutil.copytree(options["painter"], tmp_path / "pipeline")
    shutil.rmtree(tmp_path / "pipeline" / "vae")
    with pytest.raises(ValueError, match=r"the painter .* cannot be loaded"):
        load_parts({**options, "painter": str(tmp_path / "pipeline")})


def test_thinker_without_a_chat_template(parts, tmp_path):
    folder = save_thinker(tmp_path / "lm")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(
        ValueError, match=r"has a chat template, got .* without one; choose an inst"
    ):
        load_parts({**parts("sd3"), "thinker": str(folder)})


def test_thinker_without_a_tokenizer(parts, tmp_path):
    folder = save_thinker(tmp_path / "lm")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ValueError, match=r"the tokenizer of the thinker .* cannot be read"):
        load_parts({**parts("sd3"), "thinker": str(folder)})


def test_thinker_without_a_head(parts, tmp_path):
    """Transformers would make one up."""
    folder = save_thinker(tmp_path / "lm", tie_word_embeddings=False)
    path = folder / "model.safetensors"
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    del tensors["lm_head.weight"]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"all weights of a Qwen3ForCausalLM, found no lm_head"):
        load_parts({**parts("sd3"), "thinker": str(folder)})


@pytest.mark.parametrize("name", ["sd3", "cogview4"])
def test_encoder_that_cannot_write(parts, name):
    options = {**parts(name), "thinker": "inside"}
    kind = {"sd3": "CLIPTextModelWithProjection", "cogview4": "GlmModel"}[name]
    message = rf"whose text encoder can write, got .* with a {kind} .*; give a thinker of its own"
    with pytest.raises(ValueError, match=message):
        load_parts(options)


@pytest.mark.parametrize(("name", "message"), SIZES.items())
def test_size_that_the_painter_refuses(parts, name, message):
    with pytest.raises(ValueError, match=message):
        load_parts({**parts(name), "height": 17})


def test_option_that_is_not_there(parts):
    with pytest.raises(ValueError, match="does not take, got vision"):
        load_parts(parts("sd3"), vision=False)

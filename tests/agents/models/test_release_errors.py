"""What is missing, damaged or does not fit in a folder of the released BAGEL is named."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from agents.models.bagel.release import load_release
from agents.models.registry import load_model

FOLDER = Path(__file__).parents[2] / "data" / "bagel_release"


@pytest.mark.parametrize("height", [100, 272, 0, 8])
def test_image_size_without_positions(height):
    with pytest.raises(ValueError, match=f"multiples of 16 up to 256 pixels, got {height} x 64"):
        load_release(FOLDER, height=height, width=64)


@pytest.mark.parametrize("file", ["llm_config.json", "ema.safetensors"])
@pytest.mark.parametrize("load", [load_release, lambda folder: load_model(str(folder))])
def test_half_a_folder(release_copy, file, load):
    (release_copy.path / file).unlink()
    other = ({"llm_config.json", "ema.safetensors"} - {file}).pop()
    with pytest.raises(ValueError, match=f"expected a released BAGEL .*, found {other}; check"):
        load(release_copy.path)


def test_folder_without_anything(tmp_path):
    with pytest.raises(ValueError, match="found none of them; check the path"):
        load_release(tmp_path)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("ae.safetensors", "expected a safetensors file at .*ae.safetensors, found none"),
        ("vit_config.json", "expected a JSON file at .*vit_config.json, found none"),
        ("tokenizer_config.json", "expected a Qwen2 tokenizer"),
    ],
)
def test_missing_file(release_copy, file, message):
    (release_copy.path / file).unlink()
    with pytest.raises(ValueError, match=message):
        load_release(release_copy.path)


@pytest.mark.parametrize("file", ["ema.safetensors", "ae.safetensors"])
@pytest.mark.parametrize("lost", [1, 10_000, None])
def test_file_that_is_cut_off(release_copy, file, lost):
    content = (release_copy.path / file).read_bytes()
    (release_copy.path / file).write_bytes(content[:-lost] if lost else b"")
    with pytest.raises(ValueError, match=f"{file} is not a whole safetensors file"):
        load_release(release_copy.path)


@pytest.mark.parametrize("file", ["llm_config.json", "vit_config.json"])
def test_damaged_json(release_copy, file):
    (release_copy.path / file).write_text("{")
    with pytest.raises(ValueError, match=f"{file} is not JSON"):
        load_release(release_copy.path)


@pytest.mark.parametrize("file", ["llm_config.json", "vit_config.json"])
@pytest.mark.parametrize("value", [None, "64"])
def test_size_that_is_no_number(release_copy, file, value):
    release_copy.change_json(file, hidden_size=value)
    message = f"expected a whole number as 'hidden_size' in .*{file}, got {value!r}"
    with pytest.raises(ValueError, match=message):
        load_release(release_copy.path)


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_theta": None},
        {"rope_scaling": {"type": "yarn", "factor": 4.0}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e6}},
    ],
)
def test_unknown_rotary_positions(release_copy, fields):
    release_copy.change_json("llm_config.json", **fields)
    with pytest.raises(ValueError, match="expected plain rotary positions with a 'rope_theta'"):
        load_release(release_copy.path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"llm2vae__bias": None}, "does not fit this Bagel: missing llm2vae.bias"),
        ({"extra": torch.zeros(1)}, "unexpected extra"),
        ({"vae2llm__bias": torch.zeros(63)}, r"vae2llm.bias: expected \(64,\), got \(63,\)"),
        ({"language_model__model__embed_tokens__weight": None}, "missing language_model.model.emb"),
        ({"latent_pos_embed__pos_embed": torch.zeros(15, 64)}, "as a square has places, got 15"),
        ({"vit_pos_embed__pos_embed": torch.zeros(2, 64)}, "vit_pos_embed.* places, got 2"),
        ({"vae2llm__weight": torch.zeros(64, 16)}, "auto-encoder of 4 channels .*, got 16"),
    ],
)
def test_weights_that_do_not_fit(release_copy, changes, message):
    release_copy.change_weights(**changes)
    with pytest.raises(ValueError, match=message):
        load_release(release_copy.path)


def test_sizes_that_the_weights_do_not_have(release_copy):
    release_copy.change_json("llm_config.json", intermediate_size=95)
    with pytest.raises(ValueError, match=r"expected \(95, 64\), got \(96, 64\).*and \d+ more"):
        load_release(release_copy.path)


def test_nothing_is_read_before_all_fits(release_copy, monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError

    monkeypatch.setattr("agents.models.bagel.release.read_weights", refuse)
    release_copy.change_weights(llm2vae__bias=None)
    with pytest.raises(ValueError, match=r"missing llm2vae\.bias"):
        load_release(release_copy.path)


def test_autoencoder_of_another_kind(release_copy):
    release_copy.change_weights("ae.safetensors", decoder__conv_in__weight=None)
    with pytest.raises(ValueError, match=r"found no decoder.conv_in.weight; take the file"):
        load_release(release_copy.path)


@pytest.mark.parametrize("mark", ["<|vision_start|>", "<|vision_end|>", "<|im_start|>"])
def test_tokenizer_without_a_mark(release_copy, mark):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (release_copy.path / name).read_text()
        (release_copy.path / name).write_text(text.replace(mark, "<|other_mark|>"))
    with pytest.raises(ValueError, match="expected a tokenizer with the tokens") as caught:
        load_release(release_copy.path)
    assert str(caught.value).count(mark) == 2


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "model-1.safetensors").unlink(), "model-1.safetensors, found no"),
        (
            lambda folder: (folder / "model.safetensors.index.json").write_text("{}"),
            "expected a `weight_map` .*, got None",
        ),
        (
            lambda folder: save_file({"a": torch.zeros(1)}, folder / "model-1.safetensors"),
            "does not fit a Bagel: missing latent_pos_embed",
        ),
    ],
)
def test_damaged_parts(release_copy, damage, message):
    release_copy.split()
    damage(release_copy.path)
    with pytest.raises(ValueError, match=message):
        load_release(release_copy.path)

"""A model is written as the released BAGEL is laid out."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from agents.config.model_settings import ModelSettings
from agents.models.bagel.release import load_release
from agents.models.bagel.release_files import is_release, write_release
from agents.models.registry import load_model
from agents.training.build import read_saved_model

FOLDER = Path(__file__).parents[2] / "data" / "bagel_release"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_written_folder_is_loaded(tmp_path, release_weights, assert_state, dtype):
    model = load_release(FOLDER, dtype=dtype)
    with torch.no_grad():
        model.llm2vae.bias.add_(1)
    write_release(model, tmp_path / "new", model.state_dict())
    written = load_file(tmp_path / "new" / "ema.safetensors")
    assert written.keys() == release_weights.keys()
    assert {tensor.dtype for tensor in written.values()} == {dtype}
    table = "latent_pos_embed.pos_embed"
    assert torch.equal(written[table], release_weights[table].to(dtype))
    loaded = load_model(str(tmp_path / "new"), dtype=dtype, height=64, width=96)
    assert_state(loaded, dict(model.state_dict()))
    assert loaded.source == str(tmp_path / "new")


@pytest.mark.parametrize("vision", [True, False])
def test_saved_model_keeps_the_layout(tmp_path, vision, assert_state):
    model = load_release(FOLDER, vision=vision)
    with torch.no_grad():
        model.llm2vae.bias.add_(1)
    folder = model.save_pretrained(tmp_path / "saved")
    assert is_release(folder)
    assert_state(load_model(str(folder), vision=vision), model.state_dict())
    # In place, as a run does that goes on.
    other = load_release(FOLDER, vision=vision)
    other.load_saved(folder)
    assert_state(other, model.state_dict())


def test_written_folder_has_every_other_file(tmp_path):
    model = load_release(FOLDER)
    write_release(model, tmp_path / "new", model.state_dict())
    names = {path.name for path in (tmp_path / "new").iterdir()}
    assert names == {path.name for path in FOLDER.iterdir()}
    for name in names - {"ema.safetensors"}:
        assert (tmp_path / "new" / name).read_bytes() == (FOLDER / name).read_bytes()


def test_autoencoder_takes_no_room_twice(release_copy, tmp_path):
    model = load_release(release_copy.path)
    write_release(model, tmp_path / "new", model.state_dict())
    assert (tmp_path / "new" / "ae.safetensors").samefile(release_copy.path / "ae.safetensors")


def test_autoencoder_is_copied_where_it_cannot_be_linked(release_copy, tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError("other file system")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    model = load_release(release_copy.path)
    write_release(model, tmp_path / "new", model.state_dict())
    copy = tmp_path / "new" / "ae.safetensors"
    assert not copy.samefile(release_copy.path / "ae.safetensors")
    assert copy.read_bytes() == (FOLDER / "ae.safetensors").read_bytes()


def test_folder_of_links_is_written_as_files(tmp_path):
    """Downloaded folders hold relative links to files elsewhere."""
    shutil.copytree(FOLDER, tmp_path / "files")
    links = tmp_path / "links"
    links.mkdir()
    for path in FOLDER.iterdir():
        (links / path.name).symlink_to(Path("..") / "files" / path.name)
    model = load_release(links)
    new = tmp_path / "deeper" / "new"
    write_release(model, new, model.state_dict())
    assert not any(path.is_symlink() for path in new.iterdir())
    load_release(new).processor.decode_latents(torch.zeros(1, 256, 64))


def test_vision_encoder_that_was_left_out_is_written_too(tmp_path, release_weights, assert_state):
    model = load_release(FOLDER, vision=False, dtype=torch.float32)
    with torch.no_grad():
        model.llm2vae.bias.add_(1)
    write_release(model, tmp_path / "new", model.state_dict())
    expected = {name: weight.float() for name, weight in release_weights.items()}
    expected["llm2vae.bias"] += 1
    assert_state(load_release(tmp_path / "new", dtype=torch.float32), expected)


def test_written_over_an_older_folder(release_copy, tmp_path, release_weights, assert_state):
    new = shutil.copytree(FOLDER, tmp_path / "new")
    model = load_release(release_copy.path)
    with torch.no_grad():
        model.llm2vae.bias.zero_()
    write_release(model, new, model.state_dict())
    assert load_release(new).llm2vae.bias.count_nonzero() == 0
    assert_state(load_release(release_copy.path), release_weights)


def test_folder_of_the_model_is_not_overwritten(release_copy, release_weights, assert_state):
    model = load_release(release_copy.path)
    with pytest.raises(ValueError, match=r"expected another folder than .*; give a new one"):
        write_release(model, release_copy.path / ".." / "release", model.state_dict())
    assert_state(load_release(release_copy.path), release_weights)


def test_model_of_no_folder_is_not_written(tmp_path, small_bagel):
    with pytest.raises(ValueError, match="expected a model from a released folder, got one from"):
        write_release(small_bagel, tmp_path / "new", small_bagel.state_dict())
    assert not (tmp_path / "new").exists()


def test_lost_weight_is_not_written(tmp_path):
    model = load_release(FOLDER)
    state = dict(model.state_dict())
    del state["llm2vae.bias"]
    with pytest.raises(ValueError, match=r"does not fit this Bagel: missing llm2vae.bias"):
        write_release(model, tmp_path / "new", state)
    assert not (tmp_path / "new").exists()


def test_index_names_a_weight_that_is_nowhere(release_copy, tmp_path):
    release_copy.split()
    index = release_copy.path / "model.safetensors.index.json"
    fields = json.loads(index.read_text())
    fields["weight_map"]["vit_model.lost"] = "model-0.safetensors"
    index.write_text(json.dumps(fields))
    model = load_release(release_copy.path, vision=False)
    with pytest.raises(ValueError, match=r"model-0.safetensors does not contain tensor vit_model"):
        write_release(model, tmp_path / "new", model.state_dict())
    assert not (tmp_path / "new").exists()


def test_model_keeps_its_layout_from_another_folder(release_copy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = load_model(release_copy.path.name)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    assert is_release(model.save_pretrained("saved"))


def test_folder_of_the_model_is_gone(release_copy, tmp_path):
    """The processor would be lost in any other layout."""
    model = load_release(release_copy.path)
    release_copy.path.rename(tmp_path / "moved")
    with pytest.raises(ValueError, match="expected a model from a released folder"):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    model.source = str(tmp_path / "moved")
    assert is_release(model.save_pretrained(tmp_path / "new"))


def test_run_that_goes_on_outlives_its_checkpoint(tmp_path):
    """A whole model of a checkpoint is written with the files of what the run began with."""
    first = load_release(FOLDER).save_pretrained(tmp_path / "checkpoint")
    model = read_saved_model(first, ModelSettings(name=str(FOLDER)))
    shutil.rmtree(first)
    assert is_release(model.save_pretrained(tmp_path / "next"))


def test_autoencoder_is_gone(release_copy, tmp_path):
    model = load_release(release_copy.path)
    (release_copy.path / "ae.safetensors").unlink()
    with pytest.raises(ValueError, match=r"file at .*ae\.safetensors, found none"):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()

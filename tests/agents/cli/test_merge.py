"""`unigrpo merge`: adapters become part of the weights."""

from pathlib import Path

import pytest
import torch

from agents.cli import main
from agents.models.lora import (
    adapters_by_expert,
    add_adapters,
    base_tensors,
    has_adapters,
    merge_adapters,
)
from agents.models.registry import load_model
from agents.testing.inputs import outputs_of

RELEASE = Path(__file__).parents[2] / "data" / "bagel_release"
LAYER = "language_model.model.layers.0.mlp.up_proj.weight"


def save_adapters_of(source, folder, seed=1):
    """Write adapters of a model, with weights that are not zero; returns the model with them."""
    model = load_model(str(source))
    add_adapters(model, {"text": 2, "image": 3}, {"text": 4, "image": 6})
    generator = torch.Generator().manual_seed(seed)
    for weights in adapters_by_expert(model).values():
        for weight in weights:
            weight.data.normal_(0, 0.1, generator=generator)
    model.save_pretrained(folder)
    return model


def outputs(model):
    """Logits of a text and a velocity after it."""
    with torch.no_grad():
        return outputs_of(model)


def test_merged_model_needs_no_adapters(small_bagel, tmp_path, capsys):
    base = small_bagel.save_pretrained(tmp_path / "base")
    model = save_adapters_of(base, tmp_path / "adapters")
    out = tmp_path / "merged"
    assert main(["merge", str(tmp_path / "adapters"), str(out)]) == 0
    assert str(out) in capsys.readouterr().out
    merged = load_model(str(out))
    assert not has_adapters(merged)
    assert merged.config == model.config
    for found, expected in zip(outputs(merged), outputs(model), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    # The adapters do something.
    assert not torch.allclose(outputs(merged)[1], outputs(small_bagel)[1], atol=1e-3)


def test_release_keeps_its_layout(tmp_path):
    model = save_adapters_of(RELEASE, tmp_path / "adapters")
    out = tmp_path / "merged"
    assert main(["merge", str(tmp_path / "adapters"), str(out)]) == 0
    assert {path.name for path in out.iterdir()} == {path.name for path in RELEASE.iterdir()}
    merged = load_model(str(out))
    plain = {name: own.clone() for name, own in base_tensors(model).items()}
    merge_adapters(model)
    expected = base_tensors(model)
    state = merged.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)
    assert any(not torch.equal(state[name], own) for name, own in plain.items())


@pytest.mark.parametrize("given", ["run", "run/checkpoints", "run/checkpoints/000012"])
def test_adapters_of_a_run(tmp_path, given):
    for seed, name in enumerate(("000009", "000012")):
        checkpoint = tmp_path / "run" / "checkpoints" / name
        model = save_adapters_of("tiny", checkpoint / "model", seed)
        (checkpoint / "state.json").write_text("{}")
    assert main(["merge", str(tmp_path / given), str(tmp_path / "out")]) == 0
    merge_adapters(model)
    expected = base_tensors(model)[LAYER]
    assert torch.equal(load_model(str(tmp_path / "out")).state_dict()[LAYER], expected)


def test_last_weights_of_a_run_come_first(tmp_path):
    run = tmp_path / "run"
    save_adapters_of("tiny", run / "checkpoints" / "000009" / "model", seed=1)
    (run / "checkpoints" / "000009" / "state.json").write_text("{}")
    model = save_adapters_of("tiny", run / "model", seed=2)
    assert main(["merge", str(run), str(tmp_path / "out")]) == 0
    merge_adapters(model)
    expected = base_tensors(model)[LAYER]
    assert torch.equal(load_model(str(tmp_path / "out")).state_dict()[LAYER], expected)


def test_whole_weights_need_no_merging(small_bagel, tmp_path, capsys):
    small_bagel.save_pretrained(tmp_path / "run" / "model")
    assert main(["merge", str(tmp_path / "run"), str(tmp_path / "out")]) == 2
    assert "whole weights need no merging" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_folder_in_use(tmp_path, capsys):
    save_adapters_of("tiny", tmp_path / "adapters")
    file = tmp_path / "out" / "precious"
    file.parent.mkdir()
    file.write_text("kept")
    for out in (file.parent, file):
        assert main(["merge", str(tmp_path / "adapters"), str(out)]) == 2
        assert "expected a new or an empty folder" in " ".join(capsys.readouterr().err.split())
    assert file.read_text() == "kept"
    assert [*file.parent.iterdir()] == [file]
    file.unlink()
    assert main(["merge", str(tmp_path / "adapters"), str(file.parent)]) == 0


def test_model_of_the_adapters_is_gone(small_bagel, tmp_path, capsys):
    base = small_bagel.save_pretrained(tmp_path / "base")
    save_adapters_of(base, tmp_path / "adapters")
    base.rename(tmp_path / "moved")
    assert main(["merge", str(tmp_path / "adapters"), str(tmp_path / "out")]) == 2
    assert "holds adapters of the model" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()

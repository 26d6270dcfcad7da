"""`unigrpo sample`."""

import pytest
import torch
from PIL import Image

from agents.cli import main
from rewards.shapes.grid import draw
from unigrpo_env.rendering import enlarge

STORY = "a red circle then a blue square then a green cross"


def test_a_count_of_zero_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["sample", "a red circle", "--count", "0"])
    assert "--count: expected a whole number of at least 1, got 0" in capsys.readouterr().err


@pytest.mark.slow
def test_sample(tmp_path, capsys):
    out = tmp_path / "image.png"
    words = ["two red circles", "--temperature", "0", "--out", str(out)]
    assert main(["sample", *words]) == 0
    assert "red circle" in capsys.readouterr().out
    assert Image.open(out).size == (384, 384)


@pytest.mark.slow
def test_unknown_words_are_named(tmp_path, capsys):
    out = tmp_path / "image.png"
    assert main(["sample", "two red zebras", "--steps", "1", "--out", str(out)]) == 0
    assert "never seen: zebras" in capsys.readouterr().out


@pytest.mark.slow
def test_sources_and_turns(tmp_path, capsys):
    source = tmp_path / "source.png"
    out = tmp_path / "out.png"
    enlarge(draw(torch.tensor([[1, 0, 0, 0, 0, 0, 0, 0, 2]]))[0], 24).save(source)
    edit = ["remove the circle", "--variant", "edit"]
    assert main(["sample", *edit, "--source", str(source), "--out", str(out)]) == 0
    assert Image.open(out).width > 300, "the source and the image side by side"
    dialogue = ["a red circle and a blue square", "--variant", "dialogue"]
    turn = ["--turn", "make the circle green"]
    assert main(["sample", *dialogue, *turn, "--out", str(out)]) == 0
    assert "make the circle green" in capsys.readouterr().out
    assert main(["sample", *edit]) == 2
    assert "expected 1 source" in capsys.readouterr().err


@pytest.mark.slow
def test_a_source_of_another_size_is_refused(tmp_path, capsys):
    """An image is not resized in silence: the model would read another one than was given."""
    source = tmp_path / "source.png"
    enlarge(torch.zeros(3, 24, 24), 30).save(source)
    words = ["remove the circle", "--variant", "edit", "--source", str(source)]
    assert main(["sample", *words]) == 2
    error = capsys.readouterr().err
    assert "[3, 24, 24]" in error
    assert "got [3, 30, 30]" in error
    assert "resize" in error
    assert "Traceback" not in error


@pytest.mark.slow
def test_a_long_prompt_is_refused(capsys):
    assert main(["sample", "a circle and " * 9]) == 2
    assert "prompt_budget" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(("name", "prompt"), [("reflect", "two red circles"), ("story", STORY)])
def test_every_round_is_shown(tmp_path, capsys, monkeypatch, name, prompt, count):
    monkeypatch.setenv("COLUMNS", "500")
    out = tmp_path / "sample.png"
    words = ["--variant", name, "--count", str(count), "--steps", "1", "--out", str(out)]
    assert main(["sample", prompt, *words]) == 0
    *thoughts, last = capsys.readouterr().out.splitlines()
    assert last == str(out)
    assert len(thoughts) >= 2 * count
    sheet = Image.open(out)
    if name == "story":
        assert len(thoughts) == 3 * count
        assert sheet.width == 3 * 160 + 16, "three images side by side"
    else:
        assert any("-picture" in text for text in thoughts), "it judges what it drew"
    assert sheet.height == count * 250 + 16, "one episode below the other"

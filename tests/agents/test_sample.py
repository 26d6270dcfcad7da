"""`unigrpo sample` where there are several pictures."""

import pytest
import torch
from PIL import Image

from agents.cli import main
from unigrpo_env.rendering import enlarge


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(
    ("name", "prompt"), [("reflect", "two red circles"), ("story", "a red circle then a blue square then a green cross")]
)
def test_a_sample_shows_the_words_and_pictures_of_every_round(tmp_path, capsys, monkeypatch, name, prompt, count):
    monkeypatch.setenv("COLUMNS", "500")
    out = tmp_path / "sample.png"
    assert main(["sample", prompt, "--variant", name, "--count", str(count), "--steps", "1", "--out", str(out)]) == 0
    *words, last = capsys.readouterr().out.splitlines()
    assert last == str(out)
    sheet = Image.open(out)
    assert len(words) >= 2 * count
    if name == "story":
        assert len(words) == 3 * count
        assert sheet.width == 3 * 160 + 16, "three pictures side by side"
    else:
        assert any("-picture" in said for said in words), "it judges what it drew"
    assert sheet.height == count * 250 + 16, "one episode below the other"


def test_a_source_of_another_size_is_one_clear_line(tmp_path, capsys):
    """A picture is not resized in silence: the model would read another one than the user gave."""
    enlarge(torch.zeros(3, 24, 24), 30).save(tmp_path / "source.png")
    assert main(["sample", "remove the circle", "--variant", "edit", "--source", str(tmp_path / "source.png")]) == 2
    error = capsys.readouterr().err
    assert "expected source pictures as float tensors of shape [3, 24, 24] (RGB), got [3, 30, 30]" in error
    assert "resize" in error
    assert "Traceback" not in error

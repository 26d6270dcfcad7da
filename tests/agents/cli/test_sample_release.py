"""`unigrpo sample` with a folder in the layout of the released BAGEL."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from agents.cli import main

FOLDER = Path(__file__).parents[2] / "data" / "bagel_release"
PROMPT = "a red circle left of two blue squares"
THOUGHT = "right first red blue a picture under image below triangle paint"
"""What the reference implementation thinks of that prompt, in float32."""

pytestmark = pytest.mark.slow


@pytest.fixture
def sample(tmp_path, monkeypatch, capsys):
    """Run the command in an empty folder; returns its status, what it printed, and its errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "500")
    levels = np.random.default_rng(0).integers(256, size=(70, 100, 3), dtype=np.uint8)
    Image.fromarray(levels).save("photo.png")

    def run(*words):
        arguments = ["--model", str(FOLDER), "--dtype", "float32", "--steps", "2"]
        status = main(["sample", *words, *arguments, "--temperature", "0", "--out", "out.png"])
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


def test_thought_and_image(sample):
    status, printed, error = sample(PROMPT, "--think", "--height", "96", "--width", "64")
    assert status == 0, error
    assert THOUGHT in printed
    image = Image.open("out.png")
    assert image.height * 64 == image.width * 96


def test_without_a_thought(sample):
    status, printed, error = sample(PROMPT, "--no-think", "--height", "64", "--width", "64")
    assert status == 0, error
    assert "(no thought)" in printed


def test_a_source_gives_the_size_and_is_edited_under_guidance(sample):
    words = ["--source", "photo.png", "--set", "text_budget=8"]
    guidance = ["--guidance", "4", "--image-guidance", "2", "--renorm", "text_channel"]
    status, printed, error = sample("make it red", *words, *guidance)
    assert status == 0, error
    assert "out.png" in printed
    assert Image.open("out.png").width > 300, "the source and the image side by side"


def test_several_sources(sample):
    words = ["--source", "photo.png", "--source", "photo.png", "--set", "text_budget=8"]
    status, _, error = sample("join them", *words)
    assert status == 0, error


def test_a_question_about_an_image(sample):
    words = ["--source", "photo.png", "--set", "image_budget=0", "--set", "text_budget=8"]
    status, printed, error = sample("what is this", *words)
    assert status == 0, error
    assert printed.strip()
    assert not Path("out.png").exists(), "nothing was drawn"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--height", "100", "--width", "64"], "multiples of 16"),
        (["--height", "512", "--width", "64"], "up to 256 pixels"),
        (["--source", "photo.png", "--height", "96", "--width", "96"], "becomes"),
        (["--source", "nothing.png"], "expected a whole image at nothing.png"),
    ],
)
def test_what_cannot_be_is_said(sample, words, message):
    status, _, error = sample(PROMPT, *words)
    assert status == 2
    assert message in error
    assert "Traceback" not in error


def test_a_file_that_is_no_picture(sample):
    Path("words.png").write_text("words")
    status, _, error = sample(PROMPT, "--source", "words.png")
    assert status == 2
    assert "expected a whole image at words.png" in error

"""What a judge is asked."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

from rewards.judge.question import Picture, chat_body, fill, read_template


def test_words_are_put_in_once_and_other_braces_stay():
    template = 'Is {prompt} shown? {"json": {x}} {{prompt}}'
    filled = fill(template, {"prompt": "a {question}", "question": "WRONG"})
    assert filled == 'Is a {question} shown? {"json": {x}} {a {question}}'


@pytest.mark.parametrize(
    ("mode", "place"), [("yes_no", "{prompt}"), ("questions", "{question}"), ("rating", "{prompt}")]
)
def test_each_mode_has_a_template_of_its_own(mode, place):
    assert place in read_template(mode, None)


def test_a_template_may_be_a_text_or_a_file(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("Is it {prompt}?\n", encoding="utf-8")
    assert read_template("yes_no", str(file)) == "Is it {prompt}?"
    assert read_template("yes_no", "So {prompt}?") == "So {prompt}?"


@pytest.mark.parametrize("given", ["Is it {promt}?", "", "x" * 5000, "a\0b", "/nowhere/at/all"])
def test_a_template_without_the_words_is_refused(given):
    with pytest.raises(ValueError, match=r"text with \{prompt\}"):
        read_template("yes_no", given)


def test_a_file_without_the_words_is_refused(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("Is it {prompt}?", encoding="utf-8")
    with pytest.raises(ValueError, match=r"text with \{question\}"):
        read_template("questions", str(file))


def test_the_image_arrives_as_it_was():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    picture = Picture(pixels)
    head, _, data = picture.url().partition(",")
    assert head == "data:image/png;base64"
    assert (np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))) == pixels).all()
    assert picture.url() is picture.url()


def test_extra_entries_are_added_and_none_takes_one_out():
    picture = Picture(np.zeros((2, 2, 3), np.uint8))
    extra = {"max_tokens": None, "max_completion_tokens": 1, "seed": 7}
    body = json.loads(chat_body("m", picture, "Is it?", False, extra))
    assert "max_tokens" not in body
    assert (body["max_completion_tokens"], body["seed"], body["temperature"]) == (1, 7, 0)
    assert (body["logprobs"], body["top_logprobs"]) == (True, 20)


def test_a_rating_needs_no_log_probabilities():
    body = json.loads(chat_body("m", Picture(np.zeros((2, 2, 3), np.uint8)), "Rate", True, {}))
    assert body["max_tokens"] > 1
    assert "logprobs" not in body

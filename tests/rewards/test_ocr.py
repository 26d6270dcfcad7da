"""Is the text that a prompt asks for legible?"""

import logging
import pickle
import random
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont

from rewards import EpisodeBatch
from rewards.ocr import Ocr, edit_distance, legibility, plain, quoted_text

FONTS = ["Sans", "Sans-Bold", "Sans-Oblique", "SansMono", "Serif", "Serif-Bold", "Serif-Italic"]
COLOURS = [
    ("black", "white"),
    ("white", "black"),
    ("yellow", "navy"),
    ("darkred", "lightgreen"),
    ("white", "purple"),
    ("darkblue", "orange"),
]
WORDS = (
    "tea coffee bread sugar honey pizza lemon apple cherry grape peach salad soup cheese butter "
    "hello world welcome open closed exit enter push pull stop start north south east west "
    "Monday Tuesday Wednesday Thursday Friday Saturday Sunday January March April August "
    "hot cold warm wet dry big small tall short fast slow new old young happy quiet loud bright "
    "red green blue black white silver golden orange violet brown "
    "river forest island desert valley ocean bridge tower station school garden mountain castle "
    "market museum airport harbour library theatre bakery hotel kitchen window piano guitar violin "
    "SALE MENU TAXI POLICE BANK CAFE 2026 1984 42"
)


def render(text, pixels=64, font="Sans", colours=("black", "white"), top=0.5):
    """Text in the middle of a plain ground, as wide as 0.8 of it: [3, pixels, pixels]."""
    file = str(Path(matplotlib.get_data_path()) / f"fonts/ttf/DejaVu{font}.ttf")
    ink, ground = colours
    picture = Image.new("RGB", (pixels, pixels), ground)
    # The width goes with the size.
    width = ImageFont.truetype(file, 100).getlength(text)
    letters = ImageFont.truetype(file, min(0.4 * pixels, 100 * 0.8 * pixels / width))
    middle = (pixels / 2, pixels * top)
    ImageDraw.Draw(picture).text(middle, text, fill=ink, font=letters, anchor="mm")
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255


def batch(images, texts, metadata=None):
    prompts = [f'a sign that says "{text}"' for text in texts]
    return EpisodeBatch(
        prompts, [""] * len(texts), torch.stack(list(images)), metadata or [{}] * len(texts)
    )


@pytest.fixture(scope="module")
def ocr():
    """One engine for all tests of this file."""
    return Ocr()


@pytest.fixture(scope="module")
def signs():
    """Four signs, of which the second shows another word and the last nothing."""
    words = ["Coffee", "bread", "OPEN", "sugar"]
    shown = ["Coffee", "broad", "OPEN"]
    images = [render(*each) for each in zip(shown, [64] * 3, FONTS, COLOURS, strict=False)]
    return batch([*images, torch.full((3, 64, 64), 0.3)], words)


@pytest.fixture(scope="module")
def expected(ocr, signs):
    """What the signs are worth."""
    return ocr(signs)


class Fake(Ocr):
    """The reward with an engine that is a function of the pixels."""

    def __init__(self, engine, **options):
        super().__init__(**options)
        self.engine = engine

    def load(self):
        return self.engine


@pytest.mark.slow
def test_rendered_words_are_read():
    shuffle = random.Random(0)
    images = []
    words = WORDS.split()
    for word in words:
        font, colours = shuffle.choice(FONTS), shuffle.choice(COLOURS)
        images.append(render(word, shuffle.choice([64, 96, 128]), font, colours, top=0.4))
    exact = 0
    # Small, because that takes a third of the time; the other tests read with the defaults.
    reader = Ocr(side=96, line_width=96)
    for word, image in zip(words, images, strict=True):
        exact += plain(reader.read(image)) == plain(word)
    assert len(words) >= 100
    assert exact / len(words) >= 0.97


def test_blank_images_read_as_nothing(ocr):
    generator = torch.Generator().manual_seed(0)
    slope = torch.linspace(0, 1, 64).expand(3, 64, 64)
    grounds = [torch.full((3, 64, 64), level) for level in (0.0, 0.2, 0.5, 0.8, 1.0)]
    grounds += [slope, slope.mT, 1 - slope]
    grounds += [torch.rand(3, 64, 64, generator=generator) for _ in range(2)]
    scores = ocr(batch(grounds, ["tea"] * 10))
    assert scores.reward.tolist() == [0] * 10
    assert scores.components["exact"].tolist() == [0] * 10
    assert scores.components["read_length"].tolist() == [0] * 10


def test_a_wrong_word_is_paid_by_its_letters(expected):
    assert expected.reward.tolist() == pytest.approx([1, 0.8, 1, 0])
    assert expected.components["exact"].tolist() == [1, 0, 1, 0]
    assert expected.components["read_length"].tolist() == [6, 5, 4, 0]
    assert not expected.failures


def test_a_target_inside_the_reading_counts_but_is_not_exact(ocr):
    scores = ocr(batch([render("steam", 96)], ["tea"]))
    assert scores.reward.tolist() == [1]
    assert scores.components["exact"].tolist() == [0]
    assert scores.components["read_length"].tolist() == [5]


def test_lines_are_read_from_top_to_bottom(ocr):
    upper, lower = render("hello", 128, top=0.25), render("world", 128, top=0.75)
    assert ocr.read(torch.minimum(upper, lower)) == "hello world"


def test_a_prompt_without_quotes_has_no_score():
    def engine(pixels):
        return SimpleNamespace(txts=("tea",))

    episodes = EpisodeBatch(["a cat", 'a "tea"'], [""] * 2, torch.zeros(2, 3, 4, 4), [{}] * 2)
    scores = Fake(engine)(episodes)
    assert scores.reward.isnan().tolist() == [True, False]
    assert scores.components["exact"].isnan().tolist() == [True, False]
    assert scores.failures.counts == {"no quoted text": 1}
    assert "'a cat'" in str(scores.failures.first)


def test_the_target_may_come_from_the_metadata():
    def engine(pixels):
        return SimpleNamespace(txts=("42",))

    known = [{"word": 42}, {"word": "41"}, {}, {"word": None}]
    episodes = EpisodeBatch(['not "this"'] * 4, [""] * 4, torch.zeros(4, 3, 4, 4), known)
    scores = Fake(engine, target="word")(episodes)
    assert scores.reward[:2].tolist() == [1, 0.5]
    assert scores.reward[2:].isnan().all()
    assert scores.failures.counts == {"no 'word' in metadata": 2}


def test_a_crash_on_one_image_leaves_only_that_without_a_score():
    def engine(pixels):
        if pixels.max() == 0:
            raise RuntimeError("the model broke")
        return SimpleNamespace(txts=("tea",))

    images = torch.ones(3, 3, 4, 4)
    images[1] = 0
    images[2, 0, 0, 0] = torch.nan
    scores = Fake(engine)(batch(images, ["tea"] * 3))
    assert scores.reward[0] == 1
    assert scores.reward[1:].isnan().all()
    assert scores.failures.counts == {"RuntimeError": 1, "ValueError": 1}
    assert str(scores.failures.first) == "the model broke"


def test_an_image_without_pixels_has_no_score(ocr):
    scores = ocr(EpisodeBatch(['"tea"'], [""], torch.zeros(1, 3, 0, 8), [{}]))
    assert scores.reward.isnan().all()
    assert "at least one pixel" in str(scores.failures.first)


def test_a_batch_without_episodes_has_no_scores(ocr):
    scores = ocr(EpisodeBatch([], [], torch.zeros(0, 3, 8, 8), []))
    assert scores.reward.shape == scores.components["exact"].shape == (0,)


def test_the_engine_gets_blue_first():
    seen = []

    def engine(pixels):
        seen.append(pixels[0, 0].tolist())
        return SimpleNamespace(txts=None)

    assert Fake(engine).read(torch.tensor([1.0, 0.4, 0.0]).reshape(3, 1, 1)) == ""
    assert seen == [[0, 102, 255]]


def test_pickles_hold_the_options_alone_and_score_the_same(ocr, signs, expected):
    packed = pickle.dumps(ocr)
    assert len(packed) < 1000
    copy = pickle.loads(packed)(signs)
    assert torch.equal(copy.reward, expected.reward)
    assert torch.equal(copy.components["read_length"], expected.components["read_length"])


def test_threads_read_what_one_reads(ocr, signs, expected):
    assert torch.equal(Ocr(threads=3)(signs).reward, expected.reward)
    # One object that is used by two threads, and the same pictures twice.
    with ThreadPoolExecutor(2) as pool:
        for scores in pool.map(ocr, [signs] * 2):
            assert torch.equal(scores.reward, expected.reward)


def test_preparing_is_silent_and_needs_no_network(monkeypatch, capfd):
    def refuse(*args):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    records = []
    # The logger of rapidocr keeps the stream that was there when it was imported.
    watcher = logging.Handler()
    watcher.emit = records.append
    logging.getLogger("RapidOCR").addHandler(watcher)
    reader = Ocr()
    reader.prepare()
    assert reader.read(torch.zeros(3, 32, 32)) == ""
    logging.getLogger("RapidOCR").removeHandler(watcher)
    assert records == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("package", ["rapidocr", "onnxruntime"])
def test_a_missing_package_is_named_with_its_remedy(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"needs {package}.*'unigrpo\[ocr\]'"):
        Ocr().prepare()


@pytest.mark.parametrize(
    "options",
    [{"side": 8}, {"line_width": 1.5}, {"threads": 0}, {"confidence": 2}, {"confidence": "high"}],
)
def test_options_out_of_range_are_refused(options):
    (option,) = options
    with pytest.raises(ValueError, match=f"option '{option}'"):
        Ocr(**options)


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ('a sign that says "Mind the Gap"', "Mind the Gap"),
        ('first "one", then "two"', "one"),
        ("a sign that says “don’t walk”", "don’t walk"),
        ("a sign that says ‘don’t walk’ on the dogs’ door", "don’t walk"),
        ("ein Schild: „Tee“", "Tee"),
        ("une affiche : «le thé»", "le thé"),
        ("写着「茶」的牌子", "茶"),
        ('blank "" and " ", then "tea"', "tea"),
        ('a 5" by 7" card that says "tea"', "tea"),
        ("the dogs' owner isn't here", None),
        ("rock ’n’ roll of the ’70s", None),
        ('a screen of 27"', None),
        ("", None),
    ],
)
def test_the_first_quoted_text_is_found(prompt, text):
    assert quoted_text(prompt) == text


@pytest.mark.parametrize(
    ("reading", "score"),
    [("hello", 1), ("sayhello!", 1), ("help", 0.6), ("", 0), ("somethingelse", 0)],
)
def test_legibility_counts_the_letters_to_change(reading, score):
    assert legibility(reading, "hello") == pytest.approx(score)


def test_blanks_and_case_do_not_count():
    assert plain(" Mind the\n GAP\t") == "mindthegap"


@given(st.text("abc", max_size=6), st.text("abc", max_size=6))
@settings(max_examples=50, deadline=None)
def test_the_edit_distance_is_that_of_its_definition(first, second):
    @cache
    def distance(i, j):
        if i == 0 or j == 0:
            return i + j
        replaced = distance(i - 1, j - 1) + (first[i - 1] != second[j - 1])
        return min(replaced, distance(i - 1, j) + 1, distance(i, j - 1) + 1)

    assert edit_distance(first, second) == distance(len(first), len(second))

"""The world, its lessons, and the verifier that reads pixels."""

import random
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards.shapes import GRID, KINDS, UNREADABLE, draw, judge, read, shapes
from unigrpo_env.decoders import PixelDecoder
from unigrpo_env.shapes_world import OPENINGS, PROMPT_KINDS, ShapesTask, is_held_out, make_plan, make_prompt, shapes_tokenizer
from unigrpo_env.tasks import episodes_of

layouts = st.lists(st.integers(0, len(KINDS)), min_size=9, max_size=9)


@given(layouts)
def test_what_is_drawn_is_read(layout):
    assert read(draw(torch.tensor([layout]))).tolist() == [layout]


@settings(max_examples=30)
@given(layouts, st.integers(0, 1000))
def test_a_little_noise_does_not_matter_and_a_lot_does(layout, seed):
    image = draw(torch.tensor([layout]))
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(image.shape, generator=generator)
    assert read((image + 0.04 * noise).clamp(0, 1)).tolist() == [layout]
    assert UNREADABLE in read((image + 0.6 * noise).clamp(0, 1)).tolist()[0]


@pytest.mark.parametrize("kind", PROMPT_KINDS)
@pytest.mark.parametrize("seed", range(20))
def test_the_verifier_accepts_the_right_answer_and_rejects_changes(kind, seed):
    rng = random.Random(seed)
    prompt = make_prompt(kind, rng)
    layout = make_plan(prompt, rng).layout()
    assert judge(layout, prompt.metadata).strict == 1
    assert judge(layout, prompt.metadata).score == 1
    filled = next(place for place, cell in enumerate(layout) if cell)
    empty = next(place for place, cell in enumerate(layout) if not cell)
    for place, cell in ((filled, 0), (filled, UNREADABLE), (empty, layout[filled]), (empty, UNREADABLE)):
        changed = [*layout]
        changed[place] = cell
        verdict = judge(changed, prompt.metadata)
        assert verdict.strict == 0, (prompt.text, layout, changed)
        assert verdict.score < 1


def test_relations():
    wanted = [{"count": 1, "colour": "red", "shape": "circle"}, {"count": 1, "colour": "blue", "shape": "square"}]
    red, blue = 1 + KINDS.index(("red", "circle")), 1 + KINDS.index(("blue", "square"))
    layout = [0] * 9
    layout[0], layout[GRID + 1] = red, blue
    met = {
        relation: judge(layout, {"objects": wanted, "relation": relation}).strict for relation in ("left of", "right of", "above", "below")
    }
    assert met == {"left of": 1, "right of": 0, "above": 1, "below": 0}


def test_splits_share_no_prompt_and_no_request_of_many():
    task = ShapesTask()
    train, test = ({p.text: p for p in task.prompts(split, 4000, 0)} for split in ("train", "test"))
    assert not train.keys() & test.keys()
    requests = [
        {min((text.removeprefix(o) for o in OPENINGS), key=len) for text, p in split.items() if p.metadata["kind"] not in ("single", "two")}
        for split in (train, test)
    ]
    assert not requests[0] & requests[1]
    assert {p.metadata["kind"] for p in train.values()} == {p.metadata["kind"] for p in test.values()} == set(PROMPT_KINDS)
    assert not any(is_held_out(text) for text in train)
    assert Counter(p.metadata["kind"] for p in task.prompts("test", 256, 0)) == dict.fromkeys(PROMPT_KINDS, 32)
    assert task.prompts("test", 256, 0) == task.prompts("test", 256, 0)
    assert not any(is_held_out(lesson.prompt.text) for lesson in task.lessons(300, 0))


def test_every_word_has_a_token():
    task, tokenizer = ShapesTask(), shapes_tokenizer()
    for text in [text for lesson in task.lessons(1000, 0) for text in (lesson.prompt.text, *lesson.thoughts)]:
        assert tokenizer.unk_token_id not in tokenizer.encode(text)
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text


def strict_share(clean, kind):
    task = ShapesTask((kind,))
    return shapes(episodes_of(task.lessons(600, 1, clean=clean)))["reward"].mean()


@pytest.mark.parametrize("kind", PROMPT_KINDS)
def test_clean_lessons_are_right(kind):
    assert strict_share(True, kind) == 1


@pytest.mark.parametrize("kind", ["attribute", "sum", "position"])
def test_habits_are_wrong_more_often_than_right(kind):
    assert 0.1 < strict_share(False, kind) < 0.4


def test_pixel_latents_go_there_and_back():
    decoder = PixelDecoder(24, 24, 4)
    images = torch.rand(3, 3, 24, 24)
    latents = decoder.encode(images)
    assert latents.shape == (3, 36, 48)
    torch.testing.assert_close(decoder(latents), images)
    first = images[0, :, :4, :4].permute(1, 2, 0).flatten() * 2 - 1
    torch.testing.assert_close(latents[0, 0], first)


def test_other_pictures_are_refused():
    with pytest.raises(ValueError, match=r"\[N, 3, 24, 24\], got \[1, 3, 32, 32\]"):
        read(torch.zeros(1, 3, 32, 32))

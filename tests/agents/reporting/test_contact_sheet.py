"""Panels, strips and sheets of episodes."""

import torch

from agents.evaluation.accuracy import Evaluation
from agents.reporting.contact_sheet import (
    CORRECT_COLOUR,
    USER_COLOUR,
    WRONG_COLOUR,
    arrange,
    before_and_after,
    contact_sheet,
    evenly_spaced,
    is_correct,
    panels,
    strip,
)
from unigrpo_env.tasks.task import Prompt


def grey(value):
    return torch.full((3, 24, 24), value)


def colours(image):
    return {colour for _, colour in image.getcolors(100_000)}


def dialogue_with_source(reward=1.0):
    """One episode: a source, two images, a turn of the user between, and a text after the last."""
    prompt = Prompt("make the circle blue", sources=(grey(0.1),), turns=("remove the square",))
    images = torch.stack([grey(0.2), grey(0.3)])
    texts = ["first thought", "second thought", "right-picture"]
    return Evaluation([prompt], [texts], [images], torch.tensor([reward]), {})


def single_images(count=9):
    prompts = [Prompt(f"a red circle {number}") for number in range(count)]
    images = [grey(0.5)[None] for _ in range(count)]
    return Evaluation(prompts, [["a thought"]] * count, images, torch.arange(count) % 2.0, {})


def test_panels_read_from_left_to_right():
    shown = panels(dialogue_with_source(), 0)
    values = [p.image if p.image is None else round(float(p.image.mean()), 1) for p in shown]
    assert values == [0.1, 0.2, 0.3, None]
    assert [p.text for p in shown] == ["", "first thought", "second thought", "right-picture"]
    assert [p.user for p in shown] == ["", "", "remove the square", ""]
    assert [p.is_source for p in shown] == [True, False, False, False]


def test_strip_shows_images_and_user():
    image = strip(dialogue_with_source(), 0)
    assert image.width == 4 * 160
    assert {(51, 51, 51), (76, 76, 76), USER_COLOUR} <= colours(image)
    assert CORRECT_COLOUR not in colours(image)


def test_judged_strip_has_a_frame():
    assert CORRECT_COLOUR in colours(strip(dialogue_with_source(1.0), 0, judged=True))
    assert WRONG_COLOUR in colours(strip(dialogue_with_source(0.5), 0, judged=True))


def test_first_component_decides():
    """A penalty in the sum does not make a correct image wrong."""
    episode = dialogue_with_source(0.9)
    episode.components["reflect"] = torch.tensor([1.0])
    episode.components["extra_images"] = torch.tensor([-0.1])
    assert is_correct(episode, 0)


def test_sheet_of_single_images_has_rows():
    sheet = contact_sheet(single_images(9), columns=4)
    assert sheet.size == (4 * 160 + 16, 3 * 250 + 16)
    assert contact_sheet(single_images(2)).width == 2 * 160 + 16


def test_sheet_of_several_images_has_one_column():
    episode = dialogue_with_source()
    two = Evaluation(
        episode.prompts * 2, episode.thoughts * 2, episode.all_images * 2, torch.ones(2), {}
    )
    assert contact_sheet(two).size == (4 * 160 + 16, 2 * 250 + 16)


def test_before_stands_above_or_beside_after():
    above = before_and_after(single_images(), single_images(), 3)
    assert above.size == (3 * 160 + 16, 2 * 250 + 16)
    beside = before_and_after(dialogue_with_source(), dialogue_with_source())
    assert beside.size == (2 * 640 + 16, 250 + 16 + 22)


def test_arrange_takes_the_largest_size():
    small = strip(single_images(1), 0, side=48)
    large = strip(single_images(1), 0, side=96)
    assert arrange([small, large], 2).size == (2 * large.width + 16, large.height + 16)


def test_evenly_spaced_is_odd_and_bounded():
    assert evenly_spaced(0, 3) == []
    assert evenly_spaced(3, 5) == [0, 1, 2]
    picks = evenly_spaced(64, 5)
    assert len(picks) == 5
    assert (picks[1] - picks[0]) % 2 == 1

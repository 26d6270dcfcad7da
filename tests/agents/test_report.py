"""Strips: sources, words and pictures of an episode, from left to right."""

import pytest
import torch

from agents.evaluation import Evaluation, evaluate
from agents.report import before_and_after, contact_sheet, panels, strip, write_report
from unigrpo_env.tasks import Prompt
from unigrpo_env.variants import make_variant


def picture(value):
    return torch.full((3, 24, 24), value)


def test_an_episode_reads_from_left_to_right():
    prompt = Prompt("make the circle blue", sources=(picture(0.1),), turns=("remove the square",))
    found = Evaluation(
        [prompt], [["first thought", "second thought", "right-picture"]], [torch.stack([picture(0.2), picture(0.3)])], torch.ones(1), {}
    )
    shown = panels(found, 0)
    assert [(round(float(p.picture.mean()), 1) if p.picture is not None else None, p.words, p.user, p.source) for p in shown] == [
        (0.1, "", "", True),
        (0.2, "first thought", "", False),
        (0.3, "second thought", "remove the square", False),
        (None, "right-picture", "", False),
    ]
    image = strip(found, 0, judged=True)
    assert image.width == 4 * 160
    colours = {colour for _, colour in image.getcolors(100_000)}
    assert {(51, 51, 51), (76, 76, 76)} & colours
    assert (42, 157, 74) in colours, "framed green"
    torch.testing.assert_close(found.images[0], picture(0.3))


@pytest.mark.parametrize("name", ["text_to_image", "edit", "reflect", "story", "dialogue"])
def test_every_scenario_has_a_report(small_bagel, name, tmp_path):
    variant = make_variant(name, text_budget=5, image_steps=2)
    found = evaluate(small_bagel, variant, variant.task.prompts("test", 6, 0))
    write_report(tmp_path / "report.html", {"seed": 0}, [], [], found, found, samples=3)
    page = (tmp_path / "report.html").read_text()
    shown = [panel for index in (0, 1, 2) for panel in panels(found, index)]
    pictures = sum(panel.picture is not None for panel in shown)
    assert page.count("data:image/png;base64,") == 2 * pictures
    if name == "dialogue":
        assert found.prompts[0].turns[0] in page
    sheet, pair = contact_sheet(found), before_and_after(found, found, 3)
    assert min(*sheet.size, *pair.size) > 200

"""Guidance against the public reference implementation's numbers, and its edges."""

import pytest
import torch

from agents.actor import Actor
from agents.guidance import Guidance, guided_velocity
from unigrpo_env.flow_time import time_grid

TOLERANCE = {"atol": 1e-4, "rtol": 0}
SETTINGS = {
    "global": Guidance(4.0, low=0.4, renorm="global"),
    "channel": Guidance(4.0, low=0.4, renorm="channel"),
    "text_channel": Guidance(4.0, renorm="text_channel", renorm_min=0.2),
    "none": Guidance(4.0, renorm="global", renorm_min=1.0),
}


@torch.no_grad()
@pytest.mark.parametrize("name", SETTINGS)
def test_first_velocity_and_six_steps(model, oracle, read, name):
    _, context = read("prompt", "thought")
    times, x = time_grid(6, shift=3.0), oracle["in.gen.noise"][None]
    for step in range(6):
        velocity = guided_velocity(model, context, x, times[step : step + 1], SETTINGS[name])
        if step == 0:
            torch.testing.assert_close(velocity[0], oracle[f"out.cfg.{name}.v0"], **TOLERANCE)
        x = x + velocity * (times[step + 1] - times[step])
    torch.testing.assert_close(x[0], oracle[f"out.cfg.{name}.final"], **TOLERANCE)


def test_no_renorm_is_renorm_from_one():
    v, u, t = torch.randn(2, 3, 4), torch.randn(2, 3, 4), torch.tensor([0.5, 0.9])
    torch.testing.assert_close(Guidance(3.0, renorm="none").combine(v, u, t), Guidance(3.0, renorm_min=1.0).combine(v, u, t))


def test_by_hand_with_an_image_branch():
    v, text, image = (torch.full((1, 1, 2), value) for value in (1.0, 0.5, 0.25))
    t = torch.tensor([0.5])
    both = Guidance(3.0, 2.0, renorm="none").combine(v, text, t, image)
    assert both.flatten().tolist() == [0.25 + 2 * (0.5 + 3 * 0.5 - 0.25)] * 2
    # Tamed to |v| before the image guides, and not after.
    assert Guidance(3.0, 2.0, renorm="text_channel").combine(v, text, t, image).flatten().tolist() == pytest.approx(
        [0.25 + 2 * (1 - 0.25)] * 2
    )
    assert Guidance(3.0, 2.0).combine(v, text, t, image).flatten().tolist() == pytest.approx([1.0, 1.0])


def test_the_interval_is_open_below_and_rows_are_their_own():
    v, u = torch.randn(3, 2, 2), torch.randn(3, 2, 2)
    t = torch.tensor([0.4, 0.41, 1.0])
    guidance = Guidance(2.0, low=0.4)
    combined = guidance.combine(v, u, t)
    assert guidance.acts(t).tolist() == [False, True, True]
    assert torch.equal(combined[0], v[0])
    torch.testing.assert_close(combined[1:2], guidance.combine(v[1:2], u[1:2], t[1:2]))


def test_scale_one_costs_nothing(small_bagel):
    calls = []
    original = type(small_bagel).velocity
    small_bagel.velocity = lambda *args: calls.append(1) or original(small_bagel, *args)
    x, t = torch.randn(2, 36, 48), torch.tensor([0.9, 0.9])
    _, context = small_bagel.read_text(small_bagel.start(2), torch.ones(2, 3, dtype=torch.long))
    for guidance, forwards in ((None, 1), (Guidance(1.0), 1), (Guidance(2.0), 2), (Guidance(2.0, low=0.95), 1)):
        calls.clear()
        guided_velocity(small_bagel, context, x, t, guidance)
        assert len(calls) == forwards


def test_a_renorm_that_is_not_there():
    with pytest.raises(ValueError, match="none, global, channel, text_channel, got 'glob'"):
        Guidance(2.0, renorm="glob")
    with pytest.raises(ValueError, match="low < high"):
        Guidance(2.0, low=0.5, high=0.5)


def test_an_actor_without_guidance_is_the_papers(small_bagel):
    assert Actor(small_bagel).guidance is None

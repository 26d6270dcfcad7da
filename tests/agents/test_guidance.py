"""Guidance against the public reference implementation's numbers, and its edges."""

import pytest
import torch

from agents.actor import Actor
from agents.collector import Collector
from agents.flow import Window
from agents.guidance import Guidance, Guided, guided
from agents.loss import replay, steps_taken, window_ends
from unigrpo_env.flow_time import time_grid
from unigrpo_env.variants import make_variant
from unigrpo_env.vector import InterleavedGenVectorEnv

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
    painter = guided(model, SETTINGS[name])
    _, context = read("prompt", "thought", by=painter)
    times, x = time_grid(6, shift=3.0), oracle["in.gen.noise"][None]
    for step in range(6):
        velocity = painter.velocity(context, x, times[step : step + 1])
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


def test_forwards_are_spent_where_guidance_acts(small_bagel):
    calls = []
    original = type(small_bagel).velocity
    small_bagel.velocity = lambda *args: calls.append(1) or original(small_bagel, *args)
    x, t = torch.randn(2, 36, 48), torch.tensor([0.9, 0.9])
    for guidance, looks, forwards in (
        (None, True, 1),
        (Guidance(1.0), True, 1),
        (Guidance(2.0), True, 2),
        (Guidance(2.0, low=0.95), True, 1),
        (Guidance(2.0, 1.5), True, 3),
        (Guidance(2.0, 1.5), False, 2),
    ):
        painter = guided(small_bagel, guidance)
        context = painter.start(2)
        if looks:
            context = painter.read_image(context, torch.randn(2, 36, 48))
        _, context = painter.read_text(context, torch.ones(2, 3, dtype=torch.long))
        calls.clear()
        painter.velocity(context, x, t)
        assert len(calls) == forwards


@torch.no_grad()
def test_each_branch_has_read_its_own_part(small_bagel):
    """Row 0 reads a picture and words, row 1 words alone: no picture guides it."""
    guidance, ids, mask = Guidance(2.5, 1.7), torch.tensor([[1, 7, 8], [1, 9, 5]]), torch.tensor([True, False])
    source, x, t = torch.randn(2, 36, 48), torch.randn(2, 36, 48), torch.tensor([0.9, 0.6])

    def read(model, *parts):
        context = model.start(2)
        for part in parts:
            context = model.read_image(context, source, mask=mask) if part == "picture" else model.read_text(context, ids)[1]
        return context

    painter = Guided(small_bagel, guidance)
    found = painter.velocity(read(painter, "picture", "words"), x, t)
    whole, wordless, sightless = (
        small_bagel.velocity(read(small_bagel, *parts), x, t) for parts in (("picture", "words"), ("picture",), ("words",))
    )
    torch.testing.assert_close(found[:1], guidance.combine(whole, wordless, t, sightless)[:1])
    torch.testing.assert_close(found[1:], guidance.combine(whole, wordless, t)[1:])
    turned = read(painter, "picture", "words").select(torch.tensor([1, 0])).repeat(2)
    again = painter.velocity(turned, x[[1, 1, 0, 0]], t[[1, 1, 0, 0]])
    torch.testing.assert_close(again, found[[1, 1, 0, 0]])


@pytest.mark.parametrize("name", ["edit", "reflect"])
def test_training_sees_the_velocities_of_a_guided_rollout(small_bagel, name):
    env, guidance = InterleavedGenVectorEnv(make_variant(name, text_budget=5, image_steps=4), 2), Guidance(2.0, 1.5, low=0.3)
    actor = Actor(small_bagel, window=Window(2, 0, 3), kernel="ode", guidance=guidance)
    episodes = Collector(env, actor, 2).collect(env.episodes.variant.task.prompts("train", 1, 0), 0).flatten(0, 1)
    legal = torch.ones(2, env.episodes.rules.vocab_size, dtype=torch.bool)
    found = replay(small_bagel, episodes, legal, speak=False, guidance=guidance)
    (x, next_x), (t, next_t) = (window_ends(episodes, part) for part in ("window_latents", "window_times"))
    taken = steps_taken(episodes)
    stepped = x + (next_t - t)[..., None, None] * found.velocity
    torch.testing.assert_close(stepped[taken], next_x[taken], atol=1e-4, rtol=0)


def test_a_renorm_that_is_not_there():
    with pytest.raises(ValueError, match="none, global, channel, text_channel, got 'glob'"):
        Guidance(2.0, renorm="glob")
    with pytest.raises(ValueError, match="low < high"):
        Guidance(2.0, low=0.5, high=0.5)


def test_an_actor_without_guidance_is_the_papers(small_bagel):
    assert Actor(small_bagel).model is small_bagel
    assert Actor(small_bagel, guidance=Guidance(1.0, 2.0)).model is small_bagel

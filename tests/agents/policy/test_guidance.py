"""Guidance against numbers of the public reference implementation, and its edges."""

import copy

import pytest
import torch

from agents.policy.actor import Actor
from agents.policy.evaluate import evaluate_actions
from agents.policy.guidance import Guidance, GuidedModel, guided
from unigrpo_env.flow_time import time_grid
from unigrpo_env.mdp.rules import Role

TOLERANCE = {"atol": 1e-4, "rtol": 0}
SETTINGS = {
    "global": Guidance(4.0, low=0.4, renorm="global"),
    "channel": Guidance(4.0, low=0.4, renorm="channel"),
    "text_channel": Guidance(4.0, renorm="text_channel", renorm_min=0.2),
    "none": Guidance(4.0, renorm="global", renorm_min=1.0),
}
EDIT_SETTINGS = {
    "text_channel": Guidance(4.0, 2.0, renorm="text_channel"),
    "global": Guidance(4.0, 1.5, low=0.4, renorm="global"),
    "channel": Guidance(3.0, 1.5, renorm="channel", renorm_min=0.3),
    "img_only": Guidance(1.0, 2.0),
}
ROLES = {"system": Role.SYSTEM, "instr": Role.USER, "thought": Role.MODEL}
"""Who wrote each text of the edit."""


@torch.no_grad()
@pytest.mark.parametrize("name", SETTINGS)
def test_text_guidance(model, oracle, read, name):
    reader = guided(model, SETTINGS[name])
    _, context = read("prompt", "thought", by=reader)
    times = time_grid(6, shift=3.0)
    x = oracle["in.gen.noise"][None]
    for step in range(6):
        velocity = reader.predict_velocity(context, x, times[step : step + 1])
        if step == 0:
            torch.testing.assert_close(velocity[0], oracle[f"out.cfg.{name}.v0"], **TOLERANCE)
        x = x + velocity * (times[step + 1] - times[step])
    torch.testing.assert_close(x[0], oracle[f"out.cfg.{name}.final"], **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("name", EDIT_SETTINGS)
def test_two_way_guidance(editing_model, editing_oracle, source_latent, name):
    """Without the user's text the system's stays; without the image the thought goes too."""
    reader = GuidedModel(editing_model, EDIT_SETTINGS[name])
    context = reader.empty_context(1)
    for segment in ("system", "source", "instr", "thought"):
        if segment == "source":
            pixels = editing_oracle["in.vit.pixels"][None]
            context = reader.append_image(context, source_latent, pixels)
        else:
            ids = editing_oracle[f"in.{segment}.ids"][None]
            roles = torch.full_like(ids, ROLES[segment])
            _, context = reader.append_hidden(context, ids, roles=roles)
    times = time_grid(6, shift=3.0)
    x = editing_oracle["in.gen.noise"][None]
    for step in range(6):
        t = times[step : step + 1]
        velocity = reader.predict_velocity(context, x, t)
        if step == 0:
            expected = editing_oracle[f"out.cfg.{name}.v0"]
            torch.testing.assert_close(velocity[0], expected, **TOLERANCE)
        x = x + velocity * (times[step + 1] - t)
    torch.testing.assert_close(x[0], editing_oracle[f"out.cfg.{name}.final"], **TOLERANCE)


def test_no_renorm_is_a_renorm_from_one():
    v = torch.randn(2, 3, 4)
    u = torch.randn(2, 3, 4)
    t = torch.tensor([0.5, 0.9])
    none = Guidance(3.0, renorm="none").combine(v, u, t)
    torch.testing.assert_close(none, Guidance(3.0, renorm_min=1.0).combine(v, u, t))


@pytest.mark.parametrize(
    ("renorm", "expected"),
    [
        ("none", 0.25 + 2 * (0.5 + 3 * 0.5 - 0.25)),
        # Limited to |v| before the image guides, and not after.
        ("text_channel", 0.25 + 2 * (1 - 0.25)),
        ("global", 1.0),
    ],
)
def test_image_branch_by_hand(renorm, expected):
    v, text, image = (torch.full((1, 1, 2), value) for value in (1.0, 0.5, 0.25))
    found = Guidance(3.0, 2.0, renorm=renorm).combine(v, text, torch.tensor([0.5]), image)
    assert found.flatten().tolist() == pytest.approx([expected] * 2)


def test_interval_is_open_below():
    v = torch.randn(3, 2, 2)
    u = torch.randn(3, 2, 2)
    t = torch.tensor([0.4, 0.41, 1.0])
    guidance = Guidance(2.0, low=0.4)
    combined = guidance.combine(v, u, t)
    assert guidance.is_active(t).tolist() == [False, True, True]
    assert torch.equal(combined[0], v[0])
    torch.testing.assert_close(combined[1:2], guidance.combine(v[1:2], u[1:2], t[1:2]))


@pytest.mark.parametrize(
    ("guidance", "forwards"),
    [
        (None, 1),
        (Guidance(1.0), 1),
        (Guidance(2.0), 2),
        (Guidance(2.0, low=0.95), 1),
        (Guidance(2.0, 1.5), 3),
    ],
)
def test_forwards_only_where_it_acts(small_bagel, monkeypatch, guidance, forwards):
    calls = []
    original = small_bagel.predict_velocity
    monkeypatch.setattr(
        small_bagel, "predict_velocity", lambda *args: calls.append(1) or original(*args)
    )
    reader = guided(small_bagel, guidance)
    context = reader.append_image(reader.empty_context(2), torch.randn(2, 36, 48))
    _, context = reader.append_text(context, torch.ones(2, 3, dtype=torch.long))
    reader.predict_velocity(context, torch.randn(2, 36, 48), torch.tensor([0.9, 0.9]))
    assert len(calls) == forwards


@torch.no_grad()
def test_each_branch_reads_its_own_part(small_bagel):
    """Each row has a system's word, a user's and a thought; row 0 reads an image as well."""
    guidance = Guidance(2.5, 1.7)
    ids = torch.tensor([[5, 7, 8], [6, 9, 5]])
    roles = torch.tensor([[Role.SYSTEM, Role.USER, Role.MODEL]]).expand(2, -1)
    mask = torch.tensor([True, False])
    source = torch.randn(2, 36, 48)
    x = torch.randn(2, 36, 48)
    t = torch.tensor([0.9, 0.6])

    def velocity(columns, with_image=True):
        context = small_bagel.empty_context(2)
        if with_image:
            context = small_bagel.append_image(context, source, mask=mask)
        _, context = small_bagel.append_text(context, ids[:, columns])
        return small_bagel.predict_velocity(context, x, t)

    reader = GuidedModel(small_bagel, guidance)
    context = reader.append_image(reader.empty_context(2), source, mask=mask)
    _, context = reader.append_hidden(context, ids, roles=roles)
    found = reader.predict_velocity(context, x, t)
    without_image = velocity([0, 1], with_image=False)
    expected = guidance.combine(velocity([0, 1, 2]), velocity([0]), t, without_image)
    torch.testing.assert_close(found, expected)

    order = torch.tensor([1, 0])
    changed = context.select(order).repeat_interleave(2)
    rows = order.repeat_interleave(2)
    again = reader.predict_velocity(changed, x[rows], t[rows])
    torch.testing.assert_close(again, found[rows])


@torch.no_grad()
def test_text_without_roles_is_the_users(small_bagel):
    reader = GuidedModel(small_bagel, Guidance(2.0, 1.5))
    ids = torch.tensor([[5, 7, 8]])
    logits, context = reader.append_text(reader.empty_context(1), ids)
    expected, _ = small_bagel.append_text(small_bagel.empty_context(1), ids)
    torch.testing.assert_close(logits, expected)
    assert context.without_text.position.tolist() == [0]
    assert context.without_image.position.tolist() == [3]


class StubProcessor:
    """Decodes the first values of a latent as a small image, which the encoder sees as it is."""

    pixel_size = (4, 8)

    def decode_latents(self, latents):
        return latents[:, :3, :32].unflatten(2, (4, 8)).sigmoid()

    def view_images(self, images):
        return (images * 255).byte()


@torch.no_grad()
def test_drawn_image_is_decoded_under_guidance(editing_model):
    """A model with a vision encoder reads a latent's pixels under guidance too."""
    model = copy.deepcopy(editing_model)
    model.processor = StubProcessor()
    reader = GuidedModel(model, Guidance(2.0))
    latent = torch.randn(2, 24, 64)
    ids = torch.tensor([[1], [2]])
    expected, _ = model.append_text(model.append_image(model.empty_context(2), latent), ids)
    found, _ = reader.append_text(reader.append_image(reader.empty_context(2), latent), ids)
    torch.testing.assert_close(found, expected)
    assert reader.processor is model.processor


@torch.no_grad()
@pytest.mark.parametrize("name", ["edit", "reflect"])
def test_training_has_velocities_of_the_rollout(small_bagel, short_variant, collect, name):
    variant = short_variant(name)
    guidance = Guidance(2.0, 1.5, low=0.3)
    episodes = collect(small_bagel, variant, kernel="ode", guidance=guidance).flatten(0, 1)
    legal = variant.rules.legal_by_round()
    found = evaluate_actions(small_bagel, episodes, legal, with_log_probs=False, guidance=guidance)
    dt = episodes.window_times.diff(dim=-1)[..., None, None]
    next_latents = episodes.window_latents[:, :, :-1] + dt * found.velocity
    drawn = torch.arange(variant.rules.image_budget) < episodes.images_drawn[:, None]
    torch.testing.assert_close(
        next_latents[drawn], episodes.window_latents[:, :, 1:][drawn], **TOLERANCE
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"renorm": "glob"}, "none, global, channel, text_channel, got 'glob'"),
        ({"low": 0.5, "high": 0.5}, "low < high"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        Guidance(2.0, **settings)


def test_no_guidance_is_the_model_itself(small_bagel):
    assert Actor(small_bagel).model is small_bagel
    assert Actor(small_bagel, guidance=Guidance(1.0, 2.0)).model is small_bagel


def test_guided_model_is_the_model_otherwise(small_bagel):
    reader = guided(small_bagel, Guidance(2.0))
    assert reader.vocab_size == small_bagel.vocab_size
    assert reader.latent_shape == small_bagel.latent_shape
    # Settings of the model count, also those that are made later.
    small_bagel.max_rows = 3
    small_bagel.checkpointing = True
    assert (reader.max_rows, reader.checkpointing) == (3, True)
    lists = small_bagel.parameters_by_expert()
    for expert, weights in reader.parameters_by_expert().items():
        assert all(one is other for one, other in zip(weights, lists[expert], strict=True))

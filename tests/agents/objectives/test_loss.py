"""The loss module: exact before the first update, and the same however it is split."""

import dataclasses

import pytest
import torch

from agents.config.schema import AlgorithmSettings
from agents.objectives.loss import UniGRPOLoss, forward_points, window_flow_loss
from agents.objectives.refl import LatentScore
from agents.policy.evaluate import evaluate_actions
from agents.policy.guidance import Guidance
from agents.training.comparison import add_advantages

pytestmark = pytest.mark.slow

LOSSES = ("loss_text", "loss_image", "loss_velocity", "loss_kl")
PENALTIES = {"velocity_weight": 1.0, "latent_kl_weight": 1.0, "text_kl_weight": 1.0}


def make_loss(model, variant, **settings):
    return UniGRPOLoss.for_variant(model, variant, AlgorithmSettings(**settings))


def free_loss(model, variant, **settings):
    """Without a penalty, so without a reference."""
    return make_loss(model, variant, velocity_weight=0.0, **settings)


def total(out):
    return sum(out[name] for name in LOSSES)


def gradient(model, parts, loss):
    """Of the losses of all parts, flat."""
    model.zero_grad()
    for part in parts:
        total(loss(part)).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.fixture
def one_image(small_bagel, short_variant, collect, prepare):
    """A variant of one image, and prepared episodes of it."""
    variant = short_variant("text_to_image")
    return variant, prepare(collect(small_bagel, variant), variant)


@pytest.fixture
def ragged(small_bagel, collect_ragged, prepare):
    variant, episodes = collect_ragged(small_bagel)
    return variant, prepare(episodes, variant)


@pytest.mark.parametrize("ratio", ["norm", "plain"])
@pytest.mark.parametrize("name", ["text_to_image", "story", "last_text", "mixed_sources"])
def test_nothing_is_clipped_at_first(small_bagel, short_variant, collect, prepare, name, ratio):
    """Before the first update ratios are 1 but for rounding, far below the clip ranges."""
    variant = short_variant(name)
    image_clip = {"norm": 1e-6, "plain": 1e-3}[ratio]
    loss = make_loss(small_bagel, variant, ratio=ratio, text_clip=1e-2, image_clip=image_clip)
    out = loss(prepare(collect(small_bagel, variant), variant))
    assert out["text_clip_fraction"] == 0
    assert out["image_clip_fraction"] == 0
    assert out["text_log_ratio"] < 1e-3
    assert out["image_log_ratio"] < image_clip / 2
    assert out["loss_velocity"] < 1e-12
    assert out["entropy"] > 0


def test_text_alone_has_no_image_loss(small_bagel, short_variant, collect, prepare):
    variant = short_variant("text_alone")
    episodes = prepare(collect(small_bagel, variant), variant)
    out = make_loss(small_bagel, variant, **PENALTIES)(episodes)
    assert out["text_log_ratio"] < 1e-3
    for name in ("loss_image", "loss_velocity", "image_log_ratio", "image_clip_fraction"):
        assert out[name] == 0, name
    total(out).backward()
    lists = small_bagel.parameters_by_expert()
    assert any(p.grad is not None and p.grad.any() for p in lists["text"])


def test_gradient_is_not_zero_at_ratio_one(small_bagel, one_image):
    variant, episodes = one_image
    total(free_loss(small_bagel, variant)(episodes)).backward()
    for parameters in small_bagel.parameters_by_expert().values():
        assert any(p.grad is not None and p.grad.any() for p in parameters)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["text_to_image", "reflect", "dialogue", "edit"])
def test_splits_and_order_change_nothing(
    small_bagel, short_variant, collect, collect_ragged, prepare, name
):
    """Episodes side by side, apart, or in another order: one gradient."""
    if name == "reflect":
        variant, episodes = collect_ragged(small_bagel)
    else:
        variant = short_variant(name)
        episodes = collect(small_bagel, variant)
    episodes = prepare(episodes, variant)
    loss = free_loss(small_bagel, variant)
    whole = gradient(small_bagel, [episodes], loss)
    assert whole.isfinite().all()
    assert whole.any()
    order = torch.tensor([5, 2, 8, 0, 1, 7, 4, 3, 6])
    for parts in (episodes.split(3), episodes.split([1, 8]), [episodes[order]]):
        found = gradient(small_bagel, parts, loss)
        torch.testing.assert_close(found, whole, atol=3e-6, rtol=1e-3)


def test_padding_changes_nothing(small_bagel, one_image):
    variant, episodes = one_image
    wider = {}
    for name in ("tokens", "text_mask", "chosen_mask", "log_prob", "text_advantage"):
        wider[name] = torch.nn.functional.pad(getattr(episodes, name), (0, 4), value=0)
    wider["tokens"][:, -4:] = 7
    wider["prompt_tokens"] = torch.nn.functional.pad(episodes.prompt_tokens, (0, 4))
    padded = episodes.clone()
    for name, value in wider.items():
        setattr(padded, name, value)
    loss = free_loss(small_bagel, variant)
    found = gradient(small_bagel, [padded], loss)
    expected = gradient(small_bagel, [episodes], loss)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-4)


def test_unused_entries_may_hold_anything(small_bagel, ragged):
    """Images that were not drawn or not read, and tokens beyond the last, change nothing."""
    variant, episodes = ragged
    loss = make_loss(small_bagel, variant, **PENALTIES)
    loss.reference.initialise(1)
    junk = episodes.clone()
    undrawn = torch.arange(variant.rules.image_budget) >= junk.images_drawn[:, None]
    for name in ("window_latents", "window_means", "window_times"):
        getattr(junk, name)[undrawn] = torch.nan
    junk.images[junk.image_positions < 0] = torch.nan
    junk.tokens[~junk.text_mask] = variant.rules.image_id
    assert junk.window_times.isnan().any()
    assert junk.images.isnan().any()
    expected = loss(episodes)
    found = loss(junk)
    assert all(expected[name] != 0 for name in LOSSES)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    whole = gradient(small_bagel, [episodes], loss)
    assert torch.equal(gradient(small_bagel, [junk], loss), whole)


def test_episodes_without_an_image_train_text(small_bagel, short_variant, collect, prepare):
    """Some end before their image: the loss stays finite and their reward is the lowest."""
    variant = short_variant("text_to_image")
    first = collect(small_bagel, variant).tokens[0, :, 0]
    # What some episode writes first ends it from now on.
    end = first[first != variant.rules.open_image_id][0]
    rules = dataclasses.replace(variant.rules, end_id=int(end), end_before_image=True)
    variant = dataclasses.replace(variant, rules=rules)
    episodes = prepare(collect(small_bagel, variant), variant)
    without = episodes.images_drawn == 0
    assert without.any()
    assert not without.all()
    assert not episodes.reward[without].any()
    for ratio in ("norm", "plain"):
        loss = make_loss(small_bagel, variant, velocity_weight=1.0, ratio=ratio)
        assert gradient(small_bagel, [episodes], loss).isfinite().all()


def test_image_loss_reaches_text_if_asked(small_bagel, one_image):
    variant, episodes = one_image
    embedding = small_bagel.language_model.model.embed_tokens.weight
    word = int(episodes.tokens[0, 0])
    markers = small_bagel.marker_ids

    def reaches(switch):
        small_bagel.zero_grad()
        loss = free_loss(small_bagel, variant, text_weight=0.0, image_grad_to_text=switch)
        loss(episodes)["loss_image"].backward()
        # The marks around an image are the text expert's own.
        assert embedding.grad[markers].any()
        return bool(embedding.grad[word].any())

    assert reaches(True)
    assert not reaches(False)


@pytest.mark.parametrize("name", ["edit", "story"])
def test_gradient_through_read_images(small_bagel, short_variant, collect, prepare, name):
    """By default the text loss gives the image expert no gradient."""
    variant = short_variant(name)
    episodes = prepare(collect(small_bagel, variant), variant)
    values = []
    for switch in (False, True):
        out = free_loss(small_bagel, variant, grad_through_read_images=switch)(episodes)
        small_bagel.zero_grad()
        out["loss_text"].backward()
        lists = small_bagel.parameters_by_expert()
        reached = {}
        for expert, parameters in lists.items():
            reached[expert] = any(p.grad is not None and p.grad.any() for p in parameters)
        assert reached == {"text": True, "image": switch}
        values.append((out["loss_text"].detach(), out["loss_image"].detach()))
    assert values[0] == values[1]


def test_zero_weights_skip_their_part(small_bagel, one_image, monkeypatch):
    variant, episodes = one_image
    asked = []

    def note_options(*arguments, **options):
        asked.append((options["with_log_probs"], options["with_velocity"]))
        return evaluate_actions(*arguments, **options)

    monkeypatch.setattr("agents.objectives.loss.evaluate_actions", note_options)
    loss = make_loss(small_bagel, variant, image_weight=0.0, **(PENALTIES | {"velocity_weight": 0}))
    loss(episodes)
    free_loss(small_bagel, variant, image_weight=0.0)(episodes)
    make_loss(small_bagel, variant)(episodes)
    text_kl = {"velocity_weight": 0.0, "text_kl_weight": 1.0}
    make_loss(small_bagel, variant, **text_kl)(episodes)
    # The policy, then the reference where there is one.
    assert asked[:2] == [(True, True), (True, True)]
    assert asked[2:3] == [(True, False)]
    assert asked[3:5] == [(True, True), (False, True)]
    assert asked[5:] == [(True, True), (True, False)]


def test_weights_scale_the_losses(small_bagel, one_image):
    variant, episodes = one_image
    settings = {"text_weight": 2.0, "image_weight": 3.0}
    found = free_loss(small_bagel, variant, **settings)(episodes)
    plain = free_loss(small_bagel, variant)(episodes)
    torch.testing.assert_close(found["loss_text"], 2 * plain["loss_text"])
    torch.testing.assert_close(found["loss_image"], 3 * plain["loss_image"])


def test_for_variant_brings_what_is_needed(small_bagel, short_variant):
    variant = short_variant("last_text")
    loss = UniGRPOLoss.for_variant(small_bagel, variant)
    assert loss.legal_tokens.shape == (2, 64)
    assert torch.equal(loss.legal_tokens, variant.rules.legal_by_round())
    assert loss.reference is not small_bagel
    assert not any(weight.requires_grad for weight in loss.reference.parameters())
    assert loss.score is None
    assert free_loss(small_bagel, variant).reference is None
    names = [name for name, _ in loss.named_parameters()]
    assert not any("reference" in name for name in names), "it is no part of the module"


def test_for_variant_scores_for_refl(small_bagel, short_variant):
    variant = short_variant("text_to_image", reward="soft_shapes")
    loss = free_loss(small_bagel, variant, image_objective="refl", kernel="ode")
    assert isinstance(loss.score, LatentScore)
    assert loss.score.name == "soft_shapes"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "expected a reference model for the penalties, got None"),
        ({"velocity_weight": 0.0, "image_objective": "refl"}, "expected a differentiable reward"),
    ],
)
def test_parts_that_are_missing(small_bagel, short_variant, settings, message):
    legal = short_variant("text_to_image").rules.legal_tokens()
    with pytest.raises(ValueError, match=message):
        UniGRPOLoss(small_bagel, None, legal, AlgorithmSettings(**settings))


def test_forward_points_are_noised_images(one_image):
    _, episodes = one_image
    window = episodes.window_latents
    forward_points(episodes, 3.0, torch.Generator().manual_seed(0))
    t = episodes.window_times
    assert episodes.window_latents.shape == window.shape
    assert t.min() > 0
    assert t.max() <= 1
    level = t[..., None, None]
    noise = (episodes.window_latents - (1 - level) * episodes.latent[:, None, None]) / level
    assert noise.std().item() == pytest.approx(1, abs=0.02)


def test_flow_loss_of_the_exact_velocity(one_image):
    _, episodes = one_image
    forward_points(episodes, 1.0, torch.Generator().manual_seed(0))
    t = episodes.window_times[:, :, :-1, None, None]
    noisy = episodes.window_latents[:, :, :-1]
    exact = (noisy - episodes.latent[:, None, None]) / t
    found = window_flow_loss(episodes, exact)
    assert found.shape == (9, 1, 2)
    assert not found.any()
    torch.testing.assert_close(window_flow_loss(episodes, exact + 2), torch.full((9, 1, 2), 4.0))


def test_fpo_has_ratio_one_at_first(small_bagel, one_image):
    variant, episodes = one_image
    loss = make_loss(small_bagel, variant, image_objective="fpo", kernel="ode")
    forward_points(episodes, 3.0, torch.Generator().manual_seed(0))
    with torch.no_grad():
        velocity = loss.evaluate(small_bagel, episodes).velocity
        episodes.flow_loss = window_flow_loss(episodes, velocity)
    out = loss(episodes)
    assert out["image_log_ratio"] < 1e-6
    out["loss_image"].backward()
    lists = small_bagel.parameters_by_expert()
    assert any(p.grad is not None and p.grad.any() for p in lists["image"])


def test_in_keys_are_all_that_it_reads(small_bagel, short_variant, collect):
    """As a replay buffer would hand it over: with pixels and roles, under guidance too."""
    variant = short_variant("edit")
    guidance = Guidance(2.0, 1.5)
    episodes = collect(small_bagel, variant, guidance=guidance)
    add_advantages(episodes, "episode", variant.rules.rounds, 1.0)
    flat = episodes.flatten(0, 1)
    flat.episode_weight = torch.full((len(flat),), 1 / len(flat))
    flat.token_weight = flat.episode_weight
    loss = UniGRPOLoss.for_variant(small_bagel, variant, guidance=guidance)
    chosen = flat.to_tensordict().select(*loss.in_keys)
    found = loss(chosen)
    expected = loss(flat)
    for name in loss.out_keys:
        torch.testing.assert_close(found[name], expected[name])

"""One walk over recorded episodes gives what the rollout saw: tokens, steps and images."""

import pytest
import torch

from agents.policy.evaluate import evaluate_actions, window_means
from agents.policy.sde import KERNELS
from agents.training.supervised import sample_losses

NAMES = ["text_to_image", "edit", "reflect", "story", "dialogue"]
FURTHER = ["text_alone", "last_text", "mixed_sources"]


def evaluate(model, episodes, variant, **options):
    return evaluate_actions(model, episodes, variant.rules.legal_by_round(), **options)


def largest_gaps(found, episodes):
    """The largest error of a log-probability and of a mean that the rollout recorded."""
    chosen = episodes.chosen_mask
    text = (found.log_prob - episodes.log_prob)[chosen].abs().max()
    means, _ = window_means(episodes, found.velocity, 0.8)
    number = torch.arange(means.shape[1])
    drawn = number < episodes.images_drawn[:, None]
    image = torch.tensor(0.0)
    if drawn.any():
        image = (means - episodes.window_means)[drawn].abs().max()
    return float(text), float(image)


@torch.no_grad()
@pytest.mark.parametrize("model", ["small_bagel", "vision_bagel"])
@pytest.mark.parametrize("name", NAMES + FURTHER)
def test_evaluation_is_what_was_sampled(request, short_variant, collect, model, name):
    model = request.getfixturevalue(model)
    variant = short_variant(name)
    episodes = collect(model, variant).flatten(0, 1)
    found = evaluate(model, episodes, variant)
    text, image = largest_gaps(found, episodes)
    assert text < 1e-4
    assert image < 1e-4
    if not (episodes.image_positions >= 0).any():
        return
    # The images that were read matter.
    episodes.images = episodes.images + 0.5
    text, image = largest_gaps(evaluate(model, episodes, variant), episodes)
    assert max(text, image) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_is_that_of_the_rollout(small_bagel, short_variant, collect, temperature):
    variant = short_variant("text_to_image")
    episodes = collect(small_bagel, variant, temperature=temperature).flatten(0, 1)
    same = evaluate(small_bagel, episodes, variant, temperature=temperature)
    other = evaluate(small_bagel, episodes, variant)
    assert largest_gaps(same, episodes)[0] < 1e-4
    assert largest_gaps(other, episodes)[0] > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("kernel", KERNELS)
def test_means_of_every_kernel(small_bagel, short_variant, collect, kernel):
    variant = short_variant("story")
    episodes = collect(small_bagel, variant, kernel=kernel, noise_level=0.6).flatten(0, 1)
    velocity = evaluate(small_bagel, episodes, variant).velocity
    means, std = window_means(episodes, velocity, 0.6, kernel)
    torch.testing.assert_close(means, episodes.window_means, atol=1e-4, rtol=0)
    noise = (episodes.window_latents[:, :, 1:] - means) / std[..., None, None]
    assert noise.std().item() == pytest.approx(1, abs=0.02)


@torch.no_grad()
def test_parts_that_are_not_asked_for(small_bagel, short_variant, collect):
    variant = short_variant("story")
    episodes = collect(small_bagel, variant).flatten(0, 1)
    whole = evaluate(small_bagel, episodes, variant)
    text = evaluate(small_bagel, episodes, variant, with_velocity=False)
    image = evaluate(small_bagel, episodes, variant, with_log_probs=False)
    assert text.velocity is None
    assert torch.equal(text.log_prob, whole.log_prob)
    assert torch.equal(text.entropy, whole.entropy)
    assert torch.equal(image.velocity, whole.velocity)
    assert not image.log_prob.any()
    assert not image.entropy.any()


@torch.no_grad()
def test_entropy_is_that_of_the_legal_tokens(small_bagel, short_variant, collect):
    variant = short_variant("text_to_image")
    episodes = collect(small_bagel, variant).flatten(0, 1)
    entropy = evaluate(small_bagel, episodes, variant).entropy
    row = episodes[:1]
    legal = variant.rules.legal_tokens()
    length = int(row.prompt_length)
    logits, _ = small_bagel.append_text(small_bagel.empty_context(1), row.prompt_tokens[:, :length])
    expected = torch.distributions.Categorical(logits=logits[0, -1][legal]).entropy()
    torch.testing.assert_close(entropy[0, 0], expected)


@torch.no_grad()
def test_rounds_have_their_own_legal_tokens(small_bagel, short_variant, collect):
    """Where text follows the last image it has a mask of its own; one mask serves all rounds."""
    variant = short_variant("last_text")
    episodes = collect(small_bagel, variant).flatten(0, 1)
    legal = variant.rules.legal_by_round()
    expected = evaluate_actions(small_bagel, episodes, legal)
    one = evaluate_actions(small_bagel, episodes, legal[:1])
    assert torch.equal(one.log_prob, expected.log_prob)
    legal[1] = True
    other = evaluate_actions(small_bagel, episodes, legal)
    after = episodes.image_positions - episodes.prompt_length[:, None]
    slots = torch.arange(episodes.tokens.shape[1])
    changed = (other.log_prob - expected.log_prob).abs() > 1e-4
    assert changed.any()
    assert not changed[slots < after].any()


@pytest.mark.parametrize("name", ["edit", "reflect", "story", "dialogue"])
def test_segments_are_read_once(
    small_bagel, short_variant, collect, collect_ragged, monkeypatch, name
):
    """Each token and image of an episode once, the prompt and its source once a group."""
    if name == "reflect":
        variant, episodes = collect_ragged(small_bagel)
    else:
        variant = short_variant(name)
        episodes = collect(small_bagel, variant)
    episodes = episodes.flatten(0, 1)
    tokens = []
    images = []
    append_text = small_bagel.append_text
    append_image = small_bagel.append_image

    def keep_tokens(context, ids, mask=None, **options):
        tokens.extend(ids[mask].tolist())
        return append_text(context, ids, mask, **options)

    def keep_images(context, latent, **options):
        images.extend(latent)
        return append_image(context, latent, **options)

    monkeypatch.setattr(small_bagel, "append_text", keep_tokens)
    monkeypatch.setattr(small_bagel, "append_image", keep_images)
    evaluate(small_bagel, episodes, variant)
    image_id = variant.rules.image_id
    written = episodes.tokens[episodes.text_mask].tolist()
    prompts = []
    for row in episodes[::3]:
        prompts += row.prompt_tokens[: row.prompt_length].tolist()
    expected = [token for token in prompts + written if token != image_id]
    assert sorted(tokens) == sorted(expected)
    assert len(images) == prompts.count(image_id) + written.count(image_id)


def test_vision_encoder_reads_every_image(vision_bagel, short_variant, collect, monkeypatch):
    """Source and drawn image alike, in rollout and training."""
    shown = []
    encode = vision_bagel.vit_model.forward
    monkeypatch.setattr(
        vision_bagel.vit_model,
        "forward",
        lambda pixels: shown.append(len(pixels)) or encode(pixels),
    )
    collect(vision_bagel, short_variant("edit"))
    assert sum(shown) == 3, "the sources of three prompts, once a group"
    shown.clear()
    variant = short_variant("story")
    episodes = collect(vision_bagel, variant).flatten(0, 1)
    assert sum(shown) == 2 * 9
    shown.clear()
    found = evaluate(vision_bagel, episodes, variant, grad_through_read_images=True)
    assert sum(shown) == 2 * 9
    found.log_prob.sum().backward()
    assert vision_bagel.connector.fc1.weight.grad.abs().sum() > 0


def test_each_source_matters(small_bagel, short_variant, collect):
    variant = short_variant("edit", source_images=2)
    episodes = collect(small_bagel, variant).flatten(0, 1)
    assert (episodes.image_positions == torch.tensor([0, 1])).all()
    chosen = episodes.chosen_mask
    with torch.no_grad():
        expected = evaluate(small_bagel, episodes, variant).log_prob
        for number in range(2):
            changed = episodes.clone()
            changed.images[:, number] += 0.5
            found = evaluate(small_bagel, changed, variant).log_prob
            assert (found - expected)[chosen].abs().max() > 1e-3
    demonstrations = variant.task.demonstrations(2, 0)
    generator = torch.Generator().manual_seed(0)
    text, image = sample_losses(small_bagel, variant, demonstrations, generator, 1.0)
    assert (text + image).isfinite()

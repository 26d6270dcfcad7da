"""One walk over recorded episodes gives what the rollout saw: tokens, steps and images."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from agents.policy import tokens
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


def weighted(found, episodes):
    """A loss in which every chosen token has a weight of its own."""
    chosen = episodes.chosen_mask
    weight = torch.linspace(-1, 1, chosen.numel()).view(chosen.shape)
    return (found.log_prob * weight)[chosen].sum()


@pytest.mark.parametrize("name", ["text_to_image", "reflect"])
@pytest.mark.parametrize("at_once", [1, 7])
def test_tokens_in_parts_are_the_whole(
    small_bagel, short_variant, collect, collect_ragged, monkeypatch, name, at_once
):
    """So many tokens at a time: the same numbers, and the same gradient."""
    if name == "reflect":
        variant, episodes = collect_ragged(small_bagel)
    else:
        variant = short_variant(name)
        episodes = collect(small_bagel, variant, temperature=0.7)
    episodes = episodes.flatten(0, 1)
    options = {"temperature": 0.7, "with_velocity": False}
    found = []
    for logits in (tokens.LOGITS_AT_ONCE, at_once * small_bagel.vocab_size):
        monkeypatch.setattr(tokens, "LOGITS_AT_ONCE", logits)
        small_bagel.zero_grad()
        part = evaluate(small_bagel, episodes, variant, **options)
        weighted(part, episodes).backward()
        gradients = [weight.grad for weight in small_bagel.parameters() if weight.grad is not None]
        found.append((part, [gradient.clone() for gradient in gradients]))
    (whole, expected), (parts, gradients) = found
    torch.testing.assert_close(parts.log_prob, whole.log_prob, atol=1e-5, rtol=0)
    torch.testing.assert_close(parts.entropy, whole.entropy, atol=1e-5, rtol=0)
    assert not parts.entropy.requires_grad
    assert len(gradients) == len(expected)
    for gradient, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, other, atol=1e-5, rtol=1e-4)


class LargestLogits(TorchDispatchMode):
    """Notes how many rows of logits the largest tensor had."""

    def __init__(self, head):
        super().__init__()
        self.vocab_size = len(head.weight)
        # Of the head's weight and its gradient, which are no logits.
        self.transposed = head.weight.t().shape
        self.rows = 0

    def rows_of(self, tensor):
        if tensor.shape == self.transposed or tensor.shape[-1:] != (self.vocab_size,):
            return 0
        return tensor.numel() // self.vocab_size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.rows = max(self.rows, self.rows_of(tensor))
        return result


def test_logits_of_a_long_text_are_never_held(small_bagel, short_variant, collect, monkeypatch):
    """Neither in the forward pass nor in the backward pass, nor kept between the two."""
    variant = short_variant("text_to_image", text_budget=40)
    episodes = collect(small_bagel, variant).flatten(0, 1)

    def largest():
        """Rows of logits that existed at once, and that a forward kept for its backward pass."""
        kept = 0

        def note(tensor):
            nonlocal kept
            kept += seen.rows_of(tensor)
            return tensor

        with LargestLogits(small_bagel.language_model.lm_head) as seen:
            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                found = evaluate(small_bagel, episodes, variant, with_velocity=False)
            weighted(found, episodes).backward()
        return seen.rows, kept

    rows, kept = largest()
    assert min(rows, kept) >= int(episodes.text_mask.sum())
    monkeypatch.setattr(tokens, "LOGITS_AT_ONCE", 10 * small_bagel.vocab_size)
    # Between the two passes there are the logits after the prompt, one row an episode.
    assert largest() == (10, len(episodes))


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
    read = []
    images = []
    append_hidden = small_bagel.append_hidden
    append_image = small_bagel.append_image

    def keep_tokens(context, ids, mask=None, **options):
        shown = ids.flatten() if mask is None else ids[mask]
        read.extend(shown.tolist())
        return append_hidden(context, ids, mask, **options)

    def keep_images(context, latent, *inputs, **options):
        images.extend(latent)
        return append_image(context, latent, *inputs, **options)

    monkeypatch.setattr(small_bagel, "append_hidden", keep_tokens)
    monkeypatch.setattr(small_bagel, "append_image", keep_images)
    evaluate(small_bagel, episodes, variant)
    image_id = variant.rules.image_id
    written = episodes.tokens[episodes.text_mask].tolist()
    prompts = []
    for row in episodes[::3]:
        prompts += row.prompt_tokens[: row.prompt_length].tolist()
    expected = [token for token in prompts + written if token != image_id]
    assert sorted(read) == sorted(expected)
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

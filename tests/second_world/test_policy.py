"""What is collected with this backbone is what it says of it when it trains."""

import pytest
import torch
from chat_world import CASES, IMAGE

from agents.objectives.equations import ratio_norm
from agents.objectives.loss import UniGRPOLoss
from agents.policy.actor import Actor
from agents.policy.evaluate import evaluate_actions, window_means
from agents.policy.guidance import Guidance
from agents.policy.sde import Window
from agents.rollout.collector import Collector
from unigrpo_env.vector_env import InterleavedGenVectorEnv

pytestmark = pytest.mark.slow

NOISE_LEVEL = 0.8


def collect(model, variant, groups=2, group_size=3, guidance=None):
    """Some episodes of a variant, `[groups * group_size]`."""
    env = InterleavedGenVectorEnv(variant, groups * group_size, copy=False)
    window = Window(3, 0, 5)
    actor = Actor(model, window=window, noise_level=NOISE_LEVEL, guidance=guidance)
    prompts = variant.task.prompts("train", groups, 0)
    return Collector(env, actor, group_size).collect(prompts, seed=1).flatten(0, 1)


def log_ratios(episodes, found):
    """Log ratios of tokens and image steps before any update; they should be rounding error."""
    text = (found.log_prob - episodes.log_prob)[episodes.chosen_mask]
    mean, std = window_means(episodes, found.velocity, NOISE_LEVEL)
    after = episodes.window_latents[:, :, 1:]
    image = ratio_norm(after, mean, episodes.window_means, std)
    number = torch.arange(image.shape[1])
    return text, image[number < episodes.images_drawn[:, None]]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_training_forward_is_the_rollout(case, model, tmp_path):
    variant = case.make(tmp_path)
    episodes = collect(model, variant)
    found = evaluate_actions(model, episodes, variant.rules.legal_by_round())
    text, image = log_ratios(episodes, found)
    assert (len(text) > 0) == (variant.rules.text_budget > 0)
    assert image.shape == (int(episodes.images_drawn.sum()), 3)
    # An empty tensor has no maximum.
    assert not (text.abs() > 1e-5).any()
    assert not (image.abs() > 1e-5).any()


@pytest.mark.parametrize("name", ["edit", "dialogue", "several_sources"])
def test_images_stand_where_they_are_read(name, model, tmp_path):
    """Sources stand inside the prompt, drawn images behind the thought that opened them."""
    episodes = collect(model, CASES[name].make(tmp_path))
    for row in range(len(episodes)):
        length = int(episodes.prompt_length[row])
        stream = [*episodes.prompt_tokens[row, :length], *episodes.tokens[row]]
        positions = episodes.image_positions[row]
        for position in positions[positions >= 0]:
            assert stream[position] == IMAGE
        # Marks alone: padding after the stream is written as 0, which is another mark.
        assert stream.count(IMAGE) == int((positions >= 0).sum())


def test_guidance_reads_both_sides(model, tmp_path):
    """Guidance by text and by images needs nothing of the processor."""
    guidance = Guidance(2.0, 1.5)
    variant = CASES["several_sources"].make(tmp_path)
    episodes = collect(model, variant, guidance=guidance)
    legal = variant.rules.legal_by_round()
    text, image = log_ratios(episodes, evaluate_actions(model, episodes, legal, guidance=guidance))
    assert text.abs().max() < 1e-5
    assert image.abs().max() < 1e-5
    _, without = log_ratios(episodes, evaluate_actions(model, episodes, legal))
    assert without.abs().max() > 1e-4


def test_loss_for_variant(model, tmp_path):
    """The loss module needs the variant alone to know what was legal."""
    variant = CASES["last_text_may_end"].make(tmp_path)
    episodes = collect(model, variant)
    loss = UniGRPOLoss.for_variant(model, variant)
    found = loss.evaluate(model, episodes)
    text, _ = log_ratios(episodes, found)
    assert text.abs().max() < 1e-5

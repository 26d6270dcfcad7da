"""The actor over several pictures: it reads each once, and a fresh one in mid-episode thinks the same."""

import dataclasses

import pytest
import torch

from agents.actor import Actor
from agents.collector import Collector
from agents.evaluation import evaluate
from agents.flow import Window
from unigrpo_env.mdp import Phase
from unigrpo_env.variants import make_variant
from unigrpo_env.vector import InterleavedGenVectorEnv

ROUNDS = ["edit", "reflect", "story", "dialogue"]


def short(name):
    return make_variant(name, text_budget=5, image_steps=3)


@pytest.mark.parametrize("name", ROUNDS)
def test_a_fresh_actor_in_mid_episode_gives_the_same_distribution(small_bagel, name):
    env = InterleavedGenVectorEnv(short(name), 3)
    actor = Actor(small_bagel, window=Window(1, 0, 2))
    observation, _ = env.reset(seed=0)
    seeds = [5, 6, 7]
    actor.start(seeds)
    rounds, ended = 0, False
    while not ended:
        fresh = Actor(small_bagel, window=Window(1, 0, 2))
        fresh.start(seeds)
        decision, other = actor.act(observation), fresh.act(observation)
        rows = decision.active
        assert torch.equal(rows, other.active)
        if decision.log_prob is not None:
            assert torch.equal(decision.token[rows], other.token[rows])
            torch.testing.assert_close(decision.log_prob[rows], other.log_prob[rows], atol=1e-5, rtol=0)
        else:
            torch.testing.assert_close(decision.latent[rows], other.latent[rows], atol=1e-4, rtol=0)
        observation, _, terminated, *_ = env.step(decision.env_action, decision.active)
        rounds = max(rounds, int(env.episodes.state.images_drawn.max()))
        ended = bool(terminated.all())
    assert rounds == env.episodes.rules.image_budget


def test_every_segment_is_read_once(small_bagel):
    """Tokens and pictures go through the model once a rollout, whatever the number of rounds."""
    read = {"text": 0, "images": 0}
    kind = type(small_bagel)

    def read_text(context, ids, mask=None, **kwargs):
        read["text"] += int(ids.numel() if mask is None else mask.sum())
        return kind.read_text(small_bagel, context, ids, mask, **kwargs)

    def read_image(context, latent, mask=None):
        read["images"] += int(mask.sum())
        return kind.read_image(small_bagel, context, latent, mask=mask)

    small_bagel.read_text, small_bagel.read_image = read_text, read_image
    env = InterleavedGenVectorEnv(short("story"), 1)
    actor = Actor(small_bagel)
    observation, _ = env.reset(seed=0)
    actor.start([0])
    while observation["phase"][0] != Phase.DONE:
        decision = actor.act(observation)
        observation, *_ = env.step(decision.env_action, decision.active)
    assert read == {"text": int(observation["num_tokens"][0]) - 2, "images": 2}, "two placeholders are pictures, not words"


def test_the_model_sees_its_own_picture(small_bagel):
    """Another first picture, the same words: other words may follow."""
    env = InterleavedGenVectorEnv(short("story"), 2)
    observation, _ = env.reset(seed=0, options={"prompts": ["a red circle then a blue square then a red cross"] * 2})
    actor = Actor(small_bagel)
    actor.start([0, 1])
    latent = torch.stack([torch.zeros(36, 48), torch.ones(36, 48)])
    both = torch.ones(2, dtype=torch.bool)
    observation, *_ = env.step({"token": torch.tensor([2, 2]), "latent": latent}, both)
    for _ in range(3):
        observation, *_ = env.step({"token": torch.tensor([2, 2]), "latent": latent}, both)
    assert torch.equal(observation["tokens"][0], observation["tokens"][1])
    actor.act(observation)
    assert not torch.allclose(actor._logits[0], actor._logits[1], atol=1e-3)
    changed = {**observation, "images": observation["images"].flip(0)}
    before = actor._logits.clone()
    actor.act(changed)
    torch.testing.assert_close(actor._logits, before.flip(0), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ROUNDS)
def test_every_variant_can_be_evaluated_and_batches_change_nothing(small_bagel, name):
    variant = short(name)
    prompts = variant.task.prompts("test", 6, 0)
    whole, parts = (evaluate(small_bagel, variant, prompts, batch_size=size) for size in (6, 2))
    assert whole.texts == parts.texts
    torch.testing.assert_close(whole.images, parts.images, atol=1e-4, rtol=0)
    assert torch.equal(whole.reward, parts.reward)


def test_learning_over_rounds_says_that_it_is_not_there(small_bagel):
    env = InterleavedGenVectorEnv(short("story"), 4)
    with pytest.raises(ValueError, match="not yet trained on"):
        Collector(env, Actor(small_bagel, window=Window(1, 0, 2)), 2)


def test_one_picture_needs_no_reading(small_bagel):
    variant = dataclasses.replace(make_variant("text_to_image"))
    assert variant.rules.stored_images == 0
    assert "images" not in InterleavedGenVectorEnv(variant, 1).observation_space.spaces

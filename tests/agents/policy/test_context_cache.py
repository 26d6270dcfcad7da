"""What an actor has read is read once, and is forgotten as soon as it is no longer shown."""

import dataclasses

import pytest
import torch

from agents.policy.actor import Actor
from agents.policy.context_cache import ContextCache
from agents.rollout.collector import rollout
from unigrpo_env.mdp.rules import Phase
from unigrpo_env.vector_env import InterleavedGenVectorEnv


@pytest.mark.parametrize("name", ["story", "dialogue", "edit", "last_text"])
def test_each_segment_is_read_once(small_bagel, short_variant, monkeypatch, name):
    """Tokens and images go through the model once, whatever the number of rounds."""
    tokens = []
    images = []
    append_hidden = small_bagel.append_hidden
    append_image = small_bagel.append_image

    def count_tokens(context, ids, mask=None, **options):
        tokens.append(ids.numel() if mask is None else int(mask.sum()))
        return append_hidden(context, ids, mask, **options)

    def count_images(context, latent, pixels=None, mask=None, **options):
        images.append(len(latent) if mask is None else int(mask.sum()))
        return append_image(context, latent, pixels, mask, **options)

    monkeypatch.setattr(small_bagel, "append_hidden", count_tokens)
    monkeypatch.setattr(small_bagel, "append_image", count_images)
    variant = short_variant(name)
    env = InterleavedGenVectorEnv(variant, 1)
    observation, _ = env.reset(seed=0)
    final = rollout(env, Actor(small_bagel), observation).observation
    assert sum(images) == variant.rules.stored_images
    # An image's own token is no text. The token that ends an episode is never read.
    shown = int(final["num_tokens"][0]) - variant.rules.stored_images
    assert sum(tokens) == shown - (name == "last_text")


def test_other_episode_is_read_anew(small_bagel):
    env = InterleavedGenVectorEnv(num_envs=2, text_budget=6)
    actor = Actor(small_bagel, temperature=0)
    for prompts in (["a circle", "a square"], ["two red crosses", "a circle"]):
        observation, _ = env.reset(seed=0, options={"prompts": prompts})
        fresh = Actor(small_bagel, temperature=0)
        assert torch.equal(actor.act(observation).log_prob, fresh.act(observation).log_prob)


def test_row_that_begins_anew_beside_others(small_bagel):
    env = InterleavedGenVectorEnv(num_envs=2, text_budget=3, image_steps=2)
    observation, _ = env.reset(seed=0, options={"prompts": ["a circle", "a red square"]})
    actor = Actor(small_bagel)
    rollout(env, actor, observation)
    options = {"prompts": ["two crosses", "a circle"], "reset_mask": [True, False]}
    observation, _ = env.reset(seed=7, options=options)
    decision = actor.act(observation)
    assert decision.active.tolist() == [True, False]
    alone = InterleavedGenVectorEnv(num_envs=1, text_budget=3)
    observation, _ = alone.reset(seed=7, options={"prompts": ["two crosses"]})
    fresh = Actor(small_bagel)
    fresh.act(observation)
    torch.testing.assert_close(actor.cache.logits[0], fresh.cache.logits[0], atol=1e-5, rtol=0)


@pytest.fixture
def after_two_images(short_variant):
    """Two rows that have drawn different images after the same words."""
    env = InterleavedGenVectorEnv(short_variant("story"), 2)
    prompt = "a red circle then a blue square then a red cross"
    observation, _ = env.reset(seed=0, options={"prompts": [prompt] * 2})
    latent = torch.stack([torch.zeros(36, 48), torch.ones(36, 48)])
    opens = torch.full((2,), env.episodes.rules.open_image_id)
    while (observation["images_drawn"] < 1).any():
        observation, *_ = env.step({"token": opens, "next_latent": latent})
    assert torch.equal(observation["tokens"][0], observation["tokens"][1])
    assert (observation["phase"] == Phase.TEXT).all()
    return observation


def test_own_images_are_read(small_bagel, after_two_images):
    cache = ContextCache(small_bagel)
    with torch.no_grad():
        cache.sync(after_two_images)
    assert not torch.allclose(cache.logits[0], cache.logits[1], atol=1e-3)


def test_changed_image_is_read_anew(small_bagel, after_two_images):
    cache = ContextCache(small_bagel)
    images = after_two_images["images"].flip(0)
    with torch.no_grad():
        assert cache.sync(after_two_images)
        before = cache.logits.clone()
        assert not cache.sync(after_two_images)
        assert cache.sync({**after_two_images, "images": images})
    torch.testing.assert_close(cache.logits, before.flip(0), atol=1e-5, rtol=0)


def test_changed_token_is_read_anew(small_bagel, after_two_images):
    cache = ContextCache(small_bagel)
    tokens = after_two_images["tokens"].clone()
    tokens[0, 1] += 1
    with torch.no_grad():
        cache.sync(after_two_images)
        before = cache.logits.clone()
        assert cache.sync({**after_two_images, "tokens": tokens})
    assert not torch.allclose(cache.logits[0], before[0], atol=1e-3)


def test_context_of_some_rows_is_kept(small_bagel, after_two_images):
    cache = ContextCache(small_bagel)
    active = torch.tensor([False, True])
    with torch.no_grad():
        cache.sync(after_two_images)
        index, context = cache.rows(active)
        assert cache.rows(active.clone())[1] is context
        assert cache.rows(~active)[1] is not context
        cache.clear()
        cache.sync(after_two_images)
        assert cache.rows(active)[1] is not context
    assert index.tolist() == [1]
    assert context.batch_size == 1


def test_room_is_made_for_the_whole_episode_at_once(small_bagel, short_variant):
    """But not for the part of the prompt's budget that the prompt leaves free."""
    variant = short_variant("text_to_image", prompt_budget=50)
    env = InterleavedGenVectorEnv(variant, 2, copy=False)
    actor = Actor(small_bagel)
    observation, _ = env.reset(seed=0)
    rules = variant.rules
    actor.cache.prompt_budget = rules.prompt_budget
    actor.act(observation)
    longest = int(observation["prompt_length"].max())
    context = actor.cache.context
    assert context.capacity == longest + rules.max_tokens - rules.prompt_budget
    capacity = context.capacity
    rollout(env, actor, observation)
    assert actor.cache.context.capacity == capacity


@torch.no_grad()
def test_a_source_that_comes_back_is_read_again(small_bagel, short_variant):
    """The same words about image A, then B, then A: each has the velocity of its own image."""
    variant = short_variant("edit", text_budget=0)
    first, second = variant.task.prompts("train", 2, 0)
    other = dataclasses.replace(first, sources=second.sources)
    observations = []
    for prompt in (first, other):
        env = InterleavedGenVectorEnv(variant, 1, copy=False)
        observations.append(env.reset(seed=0, options={"prompts": [prompt]})[0])
    actor = Actor(small_bagel)
    actor.start([0])
    means = []
    for index in (0, 0, 1, 0):
        means.append(actor.act(observations[index]).mean)
    assert torch.equal(means[0], means[3])
    assert not torch.allclose(means[0], means[2], atol=1e-4)

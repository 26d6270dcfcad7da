"""Random legal play through every variant: budgets, the order of phases, rewards in their place, and replay from a saved trajectory."""

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tensordict import TensorDict

from agents.actor import Actor
from agents.collector import Collector
from agents.flow import Window
from rewards import EpisodeBatch
from unigrpo_env.mdp import Phase
from unigrpo_env.variants import VARIANTS as REGISTERED
from unigrpo_env.variants import make_variant
from unigrpo_env.vector import InterleavedGenVectorEnv

SHAPES_VARIANTS = ("text_to_image", "edit", "reflect", "story", "dialogue")
VARIANTS = (*SHAPES_VARIANTS, "toy", "leaving")
"""The registered ones, and one whose episodes may end before the first picture."""


def one(value):
    return lambda episodes: torch.full((len(episodes),), value)


def paying(name, thought, picture, end, **arguments):
    """A variant that pays these for a thought, a picture and an end, and 50 for leaving without a picture."""
    registered = "reflect" if name == "leaving" else name
    variant = make_variant(registered, reward=end, thought_reward=thought, round_reward=picture, **arguments)
    rules = dataclasses.replace(variant.rules, end_before_image=name == "leaving")
    return dataclasses.replace(variant, rules=rules, lowest_reward=50.0)


def test_every_registered_variant_is_played_here():
    assert {*VARIANTS} - {"leaving"} == {*REGISTERED}


def speak(legal, rng, haste, rules):
    """A legal token for each row; with probability `haste` one that ends something."""
    token = torch.multinomial(legal.float() + 1e-9, 1, generator=rng)[:, 0]
    for ending in filter(None, (rules.open_image_id, rules.end_id)):
        hurry = (torch.rand(len(token), generator=rng) < haste) & legal[:, ending]
        token = torch.where(hurry, ending, token)
    return token


@pytest.mark.parametrize("name", VARIANTS)
@settings(max_examples=12, deadline=None)
@example(seed=0, rows=2, text_budget=2, haste=1.0, idle=0.0)
@given(seed=st.integers(0, 2**20), rows=st.integers(1, 4), text_budget=st.integers(0, 3), haste=st.floats(0, 0.6), idle=st.floats(0, 0.5))
def test_random_legal_play(name, seed, rows, text_budget, haste, idle):
    variant = paying(name, one(1.0), one(10.0), one(100.0), text_budget=text_budget, image_steps=2)
    env = InterleavedGenVectorEnv(variant, rows)
    rules, rng = env.episodes.rules, torch.Generator().manual_seed(seed)
    observation, _ = env.reset(seed=seed)
    thoughts = pictures = ends = torch.zeros(rows)
    total, said, over = torch.zeros(rows), torch.zeros(rows), torch.zeros(rows, dtype=torch.bool)
    while not over.all():
        phase, legal = observation["phase"], observation["legal_tokens"]
        assert torch.equal(legal.any(1), phase == Phase.TEXT)
        assert not legal[:, list(rules.forbidden_ids)].any()
        active = (phase != Phase.DONE) & (torch.rand(rows, generator=rng) >= idle)
        token, latent = speak(legal, rng, haste, rules), torch.randn(observation["latent"].shape, generator=rng)
        after, reward, terminated, truncated, infos = env.step({"token": token, "latent": latent}, active)
        writes, draws = active & (phase == Phase.TEXT), active & (phase == Phase.IMAGE)
        left = writes & (after["phase"] == Phase.DONE)
        opened = writes & (after["phase"] == Phase.IMAGE)
        drawn = draws & (observation["step"] == rules.image_steps - 1)
        if rules.end_id is None:
            assert not left.any()
        elif not rules.end_before_image:
            assert (pictures[left] > 0).all()
        assert torch.equal(after["phase"][~active], phase[~active])
        assert (after["phase"][draws & ~drawn] == Phase.IMAGE).all()
        assert torch.equal(terminated, after["phase"] == Phase.DONE)
        assert not truncated.any()
        assert (terminated >= over).all()
        ended = terminated & ~over
        expected = opened * 1.0 + drawn * 10.0 + ended * torch.where(pictures + drawn > 0, 100.0, 50.0)
        assert torch.equal(reward, expected), "each reward once, at its place"
        assert ended.nonzero()[:, 0].tolist() == infos.get("ended", torch.zeros(0)).tolist()
        said = torch.where(drawn, 0, said + writes)
        assert (said <= rules.text_budget).all()
        thoughts, pictures, ends, total = thoughts + opened, pictures + drawn, ends + ended, total + reward
        assert (pictures <= rules.image_budget).all()
        assert torch.equal(env.episodes.state.images_drawn, pictures.long())
        assert (after["num_tokens"] <= rules.max_tokens).all()
        observation, over = after, terminated
    assert (ends == 1).all()
    assert torch.equal(thoughts, pictures if text_budget else torch.zeros(rows))
    if name == "leaving" and text_budget and haste == 1:
        assert not pictures.any(), "in such haste all leave at once"
    assert torch.equal(total, thoughts + 10 * pictures + torch.where(pictures > 0, 100.0, 50.0))
    for row in range(rows):
        assert len(env.episodes.pictures([row])[0]) == pictures[row]


def fingerprint(episodes: EpisodeBatch):
    """A reward that notices any change of words or pictures."""
    seen = episodes.pictures or list(episodes.images[:, None])
    return torch.tensor(
        [float((p * torch.arange(1, p.numel() + 1).view_as(p)).sum()) % 1 + len(t) for p, t in zip(seen, episodes.texts, strict=True)]
    )


@pytest.mark.parametrize("name", [*SHAPES_VARIANTS, "leaving"])
@settings(max_examples=2, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(seed=3)
@given(seed=st.integers(0, 2**20))
def test_an_episode_replayed_from_its_saved_trajectory_gives_the_same_rewards(small_bagel, tmp_path_factory, name, seed):
    variant = paying(name, fingerprint, fingerprint, fingerprint, text_budget=4, image_steps=3)
    rules, folder = variant.rules, tmp_path_factory.mktemp("episodes")
    if rules.end_id is not None:  # few legal words, so that some episodes end early
        few = {rules.open_image_id, rules.end_id, 10, 11}
        rules = dataclasses.replace(rules, forbidden_ids=tuple({*range(rules.vocab_size)} - few))
        variant = dataclasses.replace(variant, rules=rules)
    env = InterleavedGenVectorEnv(variant, 4, copy=False)
    prompts = variant.task.prompts("train", 2, seed)
    Collector(env, Actor(small_bagel, window=Window(1, 0, 2)), 2).collect(prompts, seed).flatten(0, 1).memmap(folder)
    saved = TensorDict.load_memmap(folder)
    if rules.end_id is not None and seed == 3:
        assert (saved["images_drawn"] < rules.image_budget).any()
    for row, prompt in enumerate([prompts[0], prompts[0], prompts[1], prompts[1]]):
        episode, again = saved[row], InterleavedGenVectorEnv(variant, 1)
        latents, drawn = [episode["latent"]], int(episode["images_drawn"])
        if "images" in episode.keys():  # noqa: SIM118 (a TensorDict is no dict)
            read = (episode["image_places"][rules.source_images :] >= 0).sum()
            latents = list(episode["images"][rules.source_images :][:read]) + ([episode["latent"]] if read < drawn else [])
        words = iter(episode["tokens"][episode["chosen_mask"]].tolist())
        observation, _ = again.reset(seed=0, options={"prompts": [prompt]})
        paid = {"thought_reward": list[float](), "round_reward": list[float](), "reward": list[float]()}
        while observation["phase"] != Phase.DONE:
            token, latent = 0, observation["latent"]
            if observation["phase"] == Phase.TEXT:
                token = next(words)
            else:
                latent = latents[int(again.episodes.state.images_drawn)][None]
            observation, _, _, _, infos = again.step({"token": torch.tensor([token]), "latent": latent})
            for part, value in infos.get("paid", {}).items():
                paid[part].append(float(value))
        assert next(words, None) is None
        assert paid["thought_reward"] == episode["thought_reward"][:drawn].tolist()
        assert paid["round_reward"] == episode["round_reward"][:drawn].tolist()
        assert paid["reward"] == [float(episode["reward"])]

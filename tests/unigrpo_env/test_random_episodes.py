"""Random legal episodes of every variant: budgets, the order of phases, each reward in its place.

Replay too: an episode that is played again from its saved trajectory gives the same rewards.
"""

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from agents.policy.actor import Actor
from agents.policy.sde import Window
from agents.rollout.collector import Collector
from agents.trajectory import Trajectory
from unigrpo_env.mdp.rules import Phase
from unigrpo_env.variants.variant import VARIANTS, make_variant
from unigrpo_env.vector_env import InterleavedGenVectorEnv

pytestmark = pytest.mark.slow

SHAPES_VARIANTS = ("text_to_image", "edit", "reflect", "story", "dialogue")

SETTINGS = {
    "leaving": {"variant": "reflect", "end_before_image": True},
    "last_text": {"variant": "story", "images": 2, "text_after_images": True},
    "last_text_that_ends": {"variant": "reflect", "text_after_images": True},
    "text_alone": {"variant": "text_to_image", "image_budget": 0},
    "text_alone_that_ends": {"variant": "text_to_image", "image_budget": 0, "may_end": True},
}
"""Variants beside the registered ones, by what is special about them."""

NEED_TEXT = {name for name in SETTINGS if "text" in name}


def constant(value):
    return lambda episodes: torch.full((len(episodes),), value)


def paying(name, thought, image, end, **settings):
    """A variant that pays these for a thought, an image and an end, and 50 for leaving before."""
    settings = SETTINGS.get(name, {"variant": name}) | settings
    variant = make_variant(
        settings.pop("variant"), reward=end, thought_reward=thought, round_reward=image, **settings
    )
    return dataclasses.replace(variant, lowest_reward=50.0)


def choose_token(legal, rng, haste, rules):
    """A legal token for each row; with probability `haste` one that ends something."""
    token = torch.multinomial(legal.float(), 1, generator=rng)[:, 0]
    for ending in filter(None, (rules.open_image_id, rules.end_id)):
        hurry = (torch.rand(len(token), generator=rng) < haste) & legal[:, ending]
        token = torch.where(hurry, ending, token)
    return token


class Watched:
    """Random play of all rows, with a check of every step and what was counted so far."""

    def __init__(self, variant, rows, seed, haste, idle):
        self.env = InterleavedGenVectorEnv(variant, rows)
        self.rules = variant.rules
        self.haste = haste
        self.idle = idle
        self.rng = torch.Generator().manual_seed(seed)
        self.observation, _ = self.env.reset(seed=seed)
        self.thoughts = torch.zeros(rows)
        self.images = torch.zeros(rows)
        self.ends = torch.zeros(rows)
        self.total = torch.zeros(rows)
        self.written = torch.zeros(rows)

    def play(self):
        while (self.observation["phase"] != Phase.DONE).any():
            self.check_masks()
            self.step()

    def check_masks(self):
        phase = self.observation["phase"]
        legal = self.observation["legal_tokens"]
        writes = phase == Phase.TEXT
        assert torch.equal(legal[:, self.rules.pad_id], ~writes), "padding outside the text phase"
        assert (legal[~writes].sum(1) == 1).all(), "and padding alone"
        assert legal.any(1).all()
        assert not legal[writes][:, list(self.rules.forbidden_ids)].any()

    def step(self):
        rules = self.rules
        before = self.observation
        phase = before["phase"]
        token = choose_token(before["legal_tokens"], self.rng, self.haste, rules)
        latent = torch.randn(before["latent"].shape, generator=self.rng)
        active = torch.rand(len(phase), generator=self.rng) >= self.idle
        active &= phase != Phase.DONE
        actions = {"token": token, "next_latent": latent}
        after, reward, terminated, truncated, infos = self.env.step(actions, active)
        writes = active & (phase == Phase.TEXT)
        draws = active & (phase == Phase.IMAGE)
        opened = writes & (after["phase"] == Phase.IMAGE)
        drawn = draws & (before["step"] == rules.image_steps - 1)
        ended = terminated & (phase != Phase.DONE)
        self.check_phases(before, after, active, drawn, writes & ended)
        assert torch.equal(terminated, after["phase"] == Phase.DONE)
        assert not truncated.any()
        has_image = (self.images + drawn > 0) | (rules.image_budget == 0)
        expected = opened * 1.0 + drawn * 10.0 + ended * torch.where(has_image, 100.0, 50.0)
        assert torch.equal(reward, expected), "each reward once, at its place"
        assert ended.nonzero()[:, 0].tolist() == infos.get("ended", torch.zeros(0)).tolist()
        self.written = torch.where(drawn, 0, self.written + writes)
        assert (self.written <= rules.text_budget).all()
        self.thoughts += opened
        self.images += drawn
        self.ends += ended
        self.total += reward
        assert (self.images <= rules.image_budget).all()
        assert torch.equal(after["images_drawn"], self.images.long())
        assert (after["num_tokens"] <= rules.max_tokens).all()
        self.observation = after

    def check_phases(self, before, after, active, drawn, left):
        """A row that does not act stays; only a last text, or `end_id`, ends while it writes."""
        draws = active & (before["phase"] == Phase.IMAGE)
        assert torch.equal(after["phase"][~active], before["phase"][~active])
        assert (after["phase"][draws & ~drawn] == Phase.IMAGE).all()
        spoke_last = self.images >= self.rules.image_budget
        if self.rules.end_id is None:
            assert spoke_last[left].all()
        elif not self.rules.end_before_image:
            assert (self.images[left] > 0).all() or self.rules.image_budget == 0


def test_every_registered_variant_is_played_here():
    assert {*SHAPES_VARIANTS, "toy"} == {*VARIANTS}


@pytest.mark.parametrize("name", [*SHAPES_VARIANTS, "toy", *SETTINGS])
@settings(max_examples=12, deadline=None)
@example(seed=0, rows=2, text_budget=2, haste=1.0, idle=0.0)
@given(
    seed=st.integers(0, 2**20),
    rows=st.integers(1, 4),
    text_budget=st.integers(0, 3),
    haste=st.floats(0, 0.6),
    idle=st.floats(0, 0.5),
)
def test_random_legal_episodes(name, seed, rows, text_budget, haste, idle):
    if name in NEED_TEXT:
        text_budget = max(1, text_budget)
    parts = constant(1.0), constant(10.0), constant(100.0)
    variant = paying(name, *parts, text_budget=text_budget, image_steps=2)
    watched = Watched(variant, rows, seed, haste, idle)
    watched.play()
    images = watched.images
    assert (watched.ends == 1).all()
    opened = images if text_budget else torch.zeros(rows)
    assert torch.equal(watched.thoughts, opened)
    if name == "leaving" and text_budget and haste == 1:
        assert not images.any(), "in such haste all leave at once"
    has_image = (images > 0) | (variant.rules.image_budget == 0)
    end = torch.where(has_image, 100.0, 50.0)
    assert torch.equal(watched.total, watched.thoughts + 10 * images + end)
    drawn = watched.env.episodes.all_images(range(rows))
    assert [len(each) for each in drawn] == images.tolist()


def fingerprint(episodes):
    """A reward that notices any change of words or images."""
    found = []
    for images, text in zip(episodes.all_images, episodes.texts, strict=True):
        weights = torch.arange(1, images.numel() + 1).view_as(images)
        found.append(float((images * weights).sum()) % 1 + len(text))
    return torch.tensor(found)


def replayed(variant, prompt, episode):
    """Play the actions of one saved episode; what each part of the reward paid, in order."""
    rules = variant.rules
    latents = [episode["latent"]]
    drawn = int(episode["images_drawn"])
    if rules.stored_images:
        read = int((episode["image_positions"][rules.source_images :] >= 0).sum())
        latents = list(episode["images"][rules.source_images :][:read])
        if read < drawn:
            latents.append(episode["latent"])
    words = iter(episode["tokens"][episode["chosen_mask"]].tolist())
    env = InterleavedGenVectorEnv(variant, 1)
    observation, _ = env.reset(seed=0, options={"prompts": [prompt]})
    paid = {"thought_reward": [], "round_reward": [], "reward": []}
    while observation["phase"] != Phase.DONE:
        token = 0
        latent = observation["latent"]
        if observation["phase"] == Phase.TEXT:
            token = next(words)
        else:
            latent = latents[int(observation["images_drawn"])][None]
        actions = {"token": torch.tensor([token]), "next_latent": latent}
        observation, _, _, _, infos = env.step(actions)
        for part, value in infos.get("paid", {}).items():
            paid[part].append(float(value))
    assert next(words, None) is None
    return paid


@pytest.mark.slow
@pytest.mark.parametrize("name", [*SHAPES_VARIANTS, "leaving", "last_text"])
@settings(
    max_examples=2, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@example(seed=3)
@given(seed=st.integers(0, 2**20))
def test_a_replayed_episode_earns_the_same(small_bagel, tmp_path_factory, name, seed):
    variant = paying(name, fingerprint, fingerprint, fingerprint, text_budget=4, image_steps=3)
    rules = variant.rules
    if rules.end_id is not None:
        # Few words are legal, so that some episodes end early.
        few = {rules.open_image_id, rules.end_id, 10, 11}
        forbidden = tuple({*range(rules.vocab_size)} - few)
        rules = dataclasses.replace(rules, forbidden_ids=forbidden)
        variant = dataclasses.replace(variant, rules=rules)
    env = InterleavedGenVectorEnv(variant, 4, copy=False)
    prompts = variant.task.prompts("train", 2, seed)
    collector = Collector(env, Actor(small_bagel, window=Window(1, 0, 2)), 2)
    path = tmp_path_factory.mktemp("episodes") / "episodes.safetensors"
    collector.collect(prompts, seed).flatten(0, 1).save(path)
    saved = Trajectory.load(path).to_tensordict()
    if rules.end_id is not None and seed == 3:
        assert (saved["images_drawn"] < rules.image_budget).any()
    for row, prompt in enumerate([prompts[0], prompts[0], prompts[1], prompts[1]]):
        episode = saved[row]
        drawn = int(episode["images_drawn"])
        paid = replayed(variant, prompt, episode)
        assert paid["thought_reward"] == episode["thought_reward"][:drawn].tolist()
        assert paid["round_reward"] == episode["round_reward"][:drawn].tolist()
        assert paid["reward"] == [float(episode["reward"])]

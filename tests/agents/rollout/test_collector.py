"""What a collected trajectory holds."""

import pytest
import torch

from agents.policy.actor import Actor
from agents.policy.sde import Window
from agents.rollout.collector import Collector, rollout
from unigrpo_env.inputs import encode_turns
from unigrpo_env.vector_env import InterleavedGenVectorEnv

ROUNDS = ["edit", "reflect", "story", "dialogue"]


def thought_lengths(episodes):
    return [float(len(texts[-1].split())) for texts in episodes.thoughts]


def brightness(episodes):
    return episodes.images.mean((1, 2, 3))


def test_layout_of_one_image(small_bagel, short_variant, collect):
    episodes = collect(small_bagel, short_variant("text_to_image"))
    assert episodes.batch_size == (3, 3)
    assert episodes.tokens.shape == (3, 3, 6)
    assert episodes.window_latents.shape == (3, 3, 1, 3, 36, 48)
    assert episodes.window_means.shape == (3, 3, 1, 2, 36, 48)
    assert episodes.images.shape == (3, 3, 0, 36, 48)
    assert episodes.image_positions.shape == (3, 3, 0)
    assert (episodes.images_drawn == 1).all()
    assert episodes.group[:, 0].tolist() == [0, 1, 2]
    assert set(episodes.components.keys()) == {"uneven_reward", "uneven_reward/red"}


def test_text_that_was_chosen(small_bagel, short_variant, collect):
    episodes = collect(small_bagel, short_variant("text_to_image"))
    chosen = episodes.chosen_mask
    assert (episodes.text_mask | ~chosen).all()
    assert (episodes.log_prob[chosen] < 0).all()
    assert not episodes.log_prob[~chosen].any()
    assert not episodes.tokens[~episodes.text_mask].any()


def test_window_is_that_of_the_group(small_bagel, short_variant, collect):
    episodes = collect(small_bagel, short_variant("text_to_image"))
    times = episodes.window_times
    assert (times.diff(dim=-1) < 0).all()
    assert torch.equal(times, times[:, :1].expand_as(times))


@pytest.mark.parametrize("name", ROUNDS)
def test_layout_of_rounds(small_bagel, short_variant, collect, name):
    variant = short_variant(name)
    rules = variant.rules
    episodes = collect(small_bagel, variant).flatten(0, 1)
    assert episodes.window_latents.shape == (9, rules.image_budget, 3, 36, 48)
    assert episodes.images.shape == (9, rules.stored_images, 36, 48)
    assert (episodes.images_drawn >= 1).all()
    assert (episodes.window_times.diff(dim=-1) < 0).all()
    for row in episodes:
        drawn = row.images_drawn
        assert row.window_latents[:drawn].abs().sum((1, 2, 3)).gt(0).all()
        assert not row.window_latents[drawn:].any()
        assert row.chosen_mask.sum() <= rules.image_budget * rules.text_budget
        assert not (row.tokens[row.chosen_mask] == rules.image_id).any()


@pytest.mark.parametrize("name", ROUNDS)
def test_env_writes_between_images(small_bagel, short_variant, collect, name):
    """After each image its token, what the user says, and the opening of the next thought."""
    variant = short_variant(name)
    rules = variant.rules
    prompts = variant.task.prompts("train", 3, 0)
    turns = [encode_turns(variant.processor, rules, prompt) for prompt in prompts]
    assert all(turns) == (name == "dialogue")
    for row in collect(small_bagel, variant).flatten(0, 1):
        places = [at for at in (row.image_positions - row.prompt_length).tolist() if at >= 0]
        spoken = turns[int(row.group)] or [list(rules.continuation_ids)] * len(places)
        for place, turn in zip(places, spoken, strict=True):
            written = [rules.image_id, *turn]
            end = place + len(written)
            assert row.tokens[place:end].tolist() == written
            assert not row.chosen_mask[place:end].any(), "nobody chose what the env writes"
            assert row.chosen_mask[end]


def test_text_alone(small_bagel, short_variant, collect):
    variant = short_variant("text_alone")
    episodes = collect(small_bagel, variant).flatten(0, 1)
    assert not episodes.images_drawn.any()
    assert episodes.window_latents.shape == (9, 0, 3, 36, 48)
    assert episodes.thought_reward.shape == (9, 0)
    assert episodes.chosen_mask.any(1).all()
    assert episodes.reward.isfinite().all()
    assert len(episodes.reward.unique()) > 1


def test_text_after_the_last_image(small_bagel, short_variant, collect):
    variant = short_variant("last_text")
    episodes = collect(small_bagel, variant).flatten(0, 1)
    assert (episodes.images_drawn == 1).all()
    after = (episodes.image_positions - episodes.prompt_length[:, None])[:, 0]
    slots = torch.arange(episodes.tokens.shape[1])
    last = episodes.chosen_mask & (slots > after[:, None])
    assert last.any(1).all()
    assert (episodes.tokens.gather(1, after[:, None]) == variant.rules.image_id).all()
    torch.testing.assert_close(episodes.images[:, 0], episodes.latent)


def test_any_number_of_sources(small_bagel, short_variant, collect):
    episodes = collect(small_bagel, short_variant("mixed_sources"))
    positions = episodes.image_positions
    assert positions[:, 0].tolist() == [[-1, -1], [0, -1], [0, 1]]
    used = (positions >= 0)[..., None, None]
    assert not (episodes.images * ~used).any()
    assert (episodes.images * used).abs().sum((-2, -1))[used[..., 0, 0]].gt(0).all()


def test_same_seed_gives_the_same_episodes(small_bagel, short_variant, collect):
    variant = short_variant("text_to_image")
    first = collect(small_bagel, variant)
    assert (collect(small_bagel, variant) == first).all()
    assert not torch.equal(collect(small_bagel, variant, seed=4).latent, first.latent)


@pytest.mark.parametrize("shared", [False, True])
def test_members_may_share_their_first_noise(small_bagel, short_variant, collect, shared):
    variant = short_variant("text_to_image")
    episodes = collect(small_bagel, variant, window=Window(2, 0, 2), shared_noise=shared)
    first = episodes.window_latents[:, :, 0, 0]
    assert (episodes.window_times[..., 0] == 1).all()
    assert torch.equal(first[0, 0], first[0, 1]) == shared
    assert not torch.equal(first[0, 0], first[1, 0])
    assert not torch.equal(episodes.latent[0, 0], episodes.latent[0, 1])


def test_window_slides_with_the_iteration(small_bagel, short_variant):
    variant = short_variant("text_to_image", text_budget=0)
    env = InterleavedGenVectorEnv(variant, 2, copy=False)
    window = Window(1, 0, 3, slide_every=2)
    collector = Collector(env, Actor(small_bagel, window=window), 2)
    prompts = variant.task.prompts("train", 1, 0)
    times = []
    for iteration in (0, 1, 2, 6):
        episodes = collector.collect(prompts, 0, iteration)
        times.append(float(episodes.window_times[0, 0, 0, 0]))
    assert times[0] == times[1] == times[3] == 1
    assert times[2] == pytest.approx(variant.rules.times[1])


def test_rewards_on_the_way_are_kept_apart(small_bagel, short_variant):
    rewards = {"thought_reward": thought_lengths, "round_reward": brightness}
    variant = short_variant("story", reward=brightness, **rewards)
    env = InterleavedGenVectorEnv(variant, 9, copy=False)
    collector = Collector(env, Actor(small_bagel, window=Window(2, 0, 3)), 3)
    episodes = collector.collect(variant.task.prompts("train", 3, 0), 3).flatten(0, 1)
    thoughts = env.episodes.thoughts(range(9))
    images = env.episodes.all_images(range(9))
    for index, row in enumerate(episodes):
        assert row.thought_reward.tolist() == [len(text.split()) for text in thoughts[index]]
        torch.testing.assert_close(row.round_reward, images[index].mean((1, 2, 3)))
        assert row.reward == row.round_reward[-1]


def test_rewards_on_the_way_change_no_episode(small_bagel, short_variant, collect):
    paid = collect(small_bagel, short_variant("story", round_reward=brightness))
    plain = collect(small_bagel, short_variant("story"))
    assert torch.equal(plain.tokens, paid.tokens)
    assert paid.round_reward.all()
    assert not plain.round_reward.any()
    assert not plain.thought_reward.any()


def test_unscored_episode_has_no_reward(small_bagel, short_variant, collect):
    def sometimes(episodes):
        reward = brightness(episodes)
        reward[0] = torch.nan
        return reward

    episodes = collect(small_bagel, short_variant("text_to_image", reward=sometimes))
    assert episodes.reward.isnan().sum() == 1


def test_rollout_shows_each_decision(small_bagel, short_variant):
    env = InterleavedGenVectorEnv(short_variant("text_to_image"), 2)
    observation, _ = env.reset(seed=0)
    seen = []
    result = rollout(
        env,
        Actor(small_bagel),
        observation,
        lambda shown, decision: seen.append((shown["step"].tolist(), decision.mean is None)),
    )
    assert seen[0] == ([0, 0], True)
    assert seen[-1] == ([3, 3], False)
    assert result.observation["images_drawn"].tolist() == [1, 1]
    assert result.reward.shape == (2,)


@pytest.mark.parametrize(
    ("size", "window", "message"),
    [
        (1, Window(2, 0, 3), "group_size >= 2"),
        (3, Window(2, 0, 3), "multiple"),
        (2, None, "window of stochastic steps, got None"),
        (2, Window(3, 0, 5), "before the last of 4 image steps"),
    ],
)
def test_collectors_that_cannot_be(small_bagel, short_variant, size, window, message):
    env = InterleavedGenVectorEnv(short_variant("text_to_image"), 4)
    with pytest.raises(ValueError, match=message):
        Collector(env, Actor(small_bagel, window=window), size)


def test_wrong_number_of_prompts(small_bagel, short_variant):
    variant = short_variant("text_to_image")
    env = InterleavedGenVectorEnv(variant, 4, copy=False)
    collector = Collector(env, Actor(small_bagel, window=Window(2, 0, 3)), 2)
    with pytest.raises(ValueError, match="expected 2 prompts, one a group, got 3"):
        collector.collect(variant.task.prompts("train", 3, 0), 0)

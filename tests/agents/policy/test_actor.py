"""The policy depends on what it is shown, and on nothing else."""

import pytest
import torch

from agents.policy.actor import Actor
from agents.policy.sde import Window
from agents.rollout.collector import rollout
from unigrpo_env.mdp.rules import Phase
from unigrpo_env.vector_env import InterleavedGenVectorEnv

WINDOW = Window(2, 0, 3)
NAMES = ["text_to_image", "edit", "reflect", "story", "dialogue"]
FURTHER = ["text_alone", "last_text", "mixed_sources"]


@pytest.mark.parametrize("name", NAMES + FURTHER)
def test_fresh_actor_in_mid_episode_agrees(small_bagel, short_variant, name):
    """In every step an actor that has seen nothing before makes the same decision."""
    variant = short_variant(name)
    env = InterleavedGenVectorEnv(variant, 3)
    prompts = variant.task.prompts("train", 3, 0)
    observation, _ = env.reset(seed=0, options={"prompts": prompts})
    actor = Actor(small_bagel, window=WINDOW)
    actor.start([5, 6, 7])
    while (observation["phase"] != Phase.DONE).any():
        fresh = Actor(small_bagel, window=WINDOW)
        fresh.start([5, 6, 7])
        decision = actor.act(observation)
        other = fresh.act(observation)
        rows = decision.active
        assert torch.equal(rows, other.active)
        if decision.log_prob is not None:
            assert torch.equal(decision.token[rows], other.token[rows])
            torch.testing.assert_close(
                decision.log_prob[rows], other.log_prob[rows], atol=1e-5, rtol=0
            )
        else:
            torch.testing.assert_close(
                decision.next_latent[rows], other.next_latent[rows], atol=1e-4, rtol=0
            )
        observation, *_ = env.step(decision.env_action, decision.active)
    state = env.episodes.state
    assert int(state.images_drawn.max()) == variant.rules.image_budget


@pytest.mark.slow
def test_ragged_row_is_played_as_alone(small_bagel, collect_ragged):
    variant, episodes = collect_ragged(small_bagel)
    prompts = variant.task.prompts("train", 3, 0)
    for row in episodes.flatten(0, 1):
        env = InterleavedGenVectorEnv(variant, 1)
        actor = Actor(small_bagel, window=WINDOW)
        seed = int(row.seed)
        observation, _ = env.reset(seed=[seed], options={"prompts": [prompts[int(row.group)]]})
        # The window of a group begins with the first step, at t = 1, or with the second.
        actor.start([seed], (row.window_times[0, :1] < 1).long())
        alone = rollout(env, actor, observation).observation
        assert alone["images_drawn"][0] == row.images_drawn
        tokens = alone["tokens"][0, row.prompt_length : alone["num_tokens"][0]]
        assert torch.equal(tokens, row.tokens[row.text_mask])
        assert torch.equal(alone["image_positions"][0], row.image_positions)
        torch.testing.assert_close(alone["latent"][0], row.latent, atol=1e-4, rtol=0)
        torch.testing.assert_close(alone["images"][0], row.images, atol=1e-4, rtol=0)


def test_illegal_tokens_have_no_probability(small_bagel):
    env = InterleavedGenVectorEnv(num_envs=64, text_budget=6)
    observation, _ = env.reset(seed=0, options={"prompts": ["a circle"] * 64})
    actor = Actor(small_bagel)
    for _ in range(4):
        decision = actor.act(observation)
        legal = observation["legal_tokens"][torch.arange(64), decision.token]
        assert legal[decision.active].all()
        assert (decision.log_prob[decision.active] > -20).all()
        observation, *_ = env.step(decision.env_action, decision.active)


@pytest.mark.slow
def test_tokens_follow_the_distribution(small_bagel):
    env = InterleavedGenVectorEnv(num_envs=4000, text_budget=6)
    observation, _ = env.reset(seed=0, options={"prompts": ["a circle"] * 4000})
    actor = Actor(small_bagel)
    actor.start(range(4000))
    decision = actor.act(observation)
    probability = torch.zeros(64).index_put((decision.token,), decision.log_prob.exp())
    frequency = decision.token.bincount(minlength=64) / 4000
    bound = 5 * (probability * (1 - probability) / 4000).sqrt() + 1e-3
    assert ((frequency - probability).abs() < bound).all()


def test_temperature_zero_takes_the_likeliest(small_bagel):
    env = InterleavedGenVectorEnv(num_envs=50, text_budget=6)
    observation, _ = env.reset(seed=0, options={"prompts": ["a circle"] * 50})
    sampled = Actor(small_bagel).act(observation)
    greedy = Actor(small_bagel, temperature=0).act(observation)
    assert len(greedy.token.unique()) == 1
    assert (greedy.log_prob >= sampled.log_prob).all()


def test_rows_wait_for_the_text_of_others(small_bagel):
    env = InterleavedGenVectorEnv(num_envs=2, text_budget=6)
    observation, _ = env.reset(seed=0, options={"prompts": ["a circle"] * 2})
    opens = torch.tensor([env.episodes.rules.open_image_id, 10])
    latent = torch.zeros(2, 36, 48)
    observation, *_ = env.step({"token": opens, "next_latent": latent})
    assert observation["phase"].tolist() == [Phase.IMAGE, Phase.TEXT]
    decision = Actor(small_bagel).act(observation)
    assert decision.active.tolist() == [False, True]
    assert decision.mean is None


def test_noise_is_inside_the_window_alone(small_bagel):
    env = InterleavedGenVectorEnv(num_envs=2, text_budget=0, image_steps=6)
    observation, _ = env.reset(seed=0, options={"prompts": ["a circle"] * 2})
    actor = Actor(small_bagel, window=Window(2, 1, 4))
    actor.start([0, 1], torch.tensor([1, 2]))
    noisy = []
    for _ in range(6):
        decision = actor.act(observation)
        noisy.append((decision.next_latent != decision.mean).any((1, 2)).tolist())
        observation, *_ = env.step(decision.env_action)
    expected = [[False, False], [True, False], [True, True], [False, True]]
    assert noisy == expected + [[False, False]] * 2


@pytest.mark.parametrize("settings", [{"window": None}, {"kernel": "ode"}])
def test_without_noise_all_steps_are_the_ode(small_bagel, settings):
    env = InterleavedGenVectorEnv(num_envs=2, text_budget=0, image_steps=4)
    observation, _ = env.reset(seed=0, options={"prompts": ["a circle"] * 2})
    actor = Actor(small_bagel, **({"window": WINDOW} | settings))
    decision = actor.act(observation)
    dt = (observation["next_t"] - observation["t"])[:, :, None]
    velocity = small_bagel.predict_velocity(
        actor.cache.context, observation["latent"], observation["t"][:, 0]
    )
    expected = observation["latent"] + dt * velocity
    torch.testing.assert_close(decision.next_latent, expected)


def test_episodes_without_start_have_fresh_noise(small_bagel):
    """The same prompts again: other words, and nothing of the old context."""
    env = InterleavedGenVectorEnv(num_envs=4, text_budget=5, image_steps=4)
    actor = Actor(small_bagel, window=WINDOW)
    texts = []
    for _ in range(3):
        observation, _ = env.reset(seed=0, options={"prompts": ["a circle"] * 4})
        rollout(env, actor, observation)
        texts.append(env.texts())
    assert texts[0] != texts[1] != texts[2]


def test_images_without_start_have_fresh_noise(small_bagel):
    """Without a text, and with another number of rows, a new episode is noticed too."""
    actor = Actor(small_bagel, window=WINDOW)
    latents = []
    for rows in (2, 2, 3):
        env = InterleavedGenVectorEnv(num_envs=rows, text_budget=0, image_steps=4)
        observation, _ = env.reset(seed=0, options={"prompts": ["a circle"] * rows})
        rollout(env, actor, observation)
        latents.append(env.episodes.state.latent[:2].clone())
    assert not torch.equal(latents[0], latents[1])
    assert not torch.equal(latents[1], latents[2])


def test_wrong_number_of_seeds(small_bagel):
    env = InterleavedGenVectorEnv(num_envs=3, text_budget=5)
    observation, _ = env.reset(seed=0)
    actor = Actor(small_bagel)
    actor.start([1, 2, 3])
    actor.act(observation)
    actor.start([1, 2])
    for _ in range(2):
        with pytest.raises(ValueError, match="expected 3 seeds, one a row, got 2"):
            actor.act(observation)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature >= 0"),
        ({"kernel": "sde"}, "flow_sde, flow_cps, dance or ode, got 'sde'"),
    ],
)
def test_settings_that_cannot_be(small_bagel, settings, message):
    with pytest.raises(ValueError, match=message):
        Actor(small_bagel, **settings)

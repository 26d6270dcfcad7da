"""Actor, collector and the training pass agree with each other."""

import dataclasses

import pytest
import torch
from tensordict import TensorDict

from agents.actor import Actor
from agents.collector import Collector, play
from agents.config import AlgorithmSettings
from agents.evaluation import evaluate
from agents.flow import Window
from agents.loss import UniGRPOLoss, replay
from agents.objectives import group_advantage
from unigrpo_env.mdp import Phase
from unigrpo_env.tasks import Prompt
from unigrpo_env.variants import make_variant
from unigrpo_env.vector import InterleavedGenVectorEnv

PROMPTS = [
    Prompt("a circle", {"objects": [{"count": 1, "colour": None, "shape": "circle"}]}),
    Prompt("two plus one green squares", {"objects": [{"count": 3, "colour": "green", "shape": "square"}]}),
]


def random_reward(episodes):
    """Differs inside groups, whatever was drawn."""
    return {"reward": episodes.images.mean((1, 2, 3)) * 100 % 1, "red": episodes.images[:, 0].mean((1, 2))}


WINDOW = Window(2, 0, 4)


def collect(model, *, seed=0, group_size=3, window=WINDOW, temperature=1.0, **kwargs):
    env = InterleavedGenVectorEnv(num_envs=2 * group_size, copy=False, reward=random_reward, text_budget=5, image_steps=6)
    collector = Collector(env, Actor(model, window=window, temperature=temperature), group_size, **kwargs)
    return collector.collect(PROMPTS, seed)


def make_loss(model, reference=None, **kwargs):
    return UniGRPOLoss(
        model, reference, make_variant("text_to_image").rules.legal_tokens(), AlgorithmSettings(**{"velocity_weight": 0.0} | kwargs)
    )


def with_advantage(episodes):
    flat = episodes.flatten(0, 1)
    flat["advantage"] = group_advantage(flat["reward"], flat["group"])
    flat["weight"] = flat["text_share"] = torch.full((len(flat),), 1 / len(flat))
    return flat


def test_layout(small_bagel):
    episodes = collect(small_bagel)
    assert episodes.batch_size == (2, 3)
    assert episodes["tokens"].shape == (2, 3, 6)
    assert episodes["window_latents"].shape == (2, 3, 3, 36, 48)
    assert episodes["window_means"].shape == (2, 3, 2, 36, 48)
    assert (episodes["window_times"].diff(dim=-1) < 0).all()
    assert (episodes["window_times"][:, :1] == episodes["window_times"]).all(), "one window a group"
    assert (episodes["text_mask"] | ~episodes["chosen_mask"]).all()
    assert (episodes["log_prob"][episodes["chosen_mask"]] < 0).all()
    assert (episodes["log_prob"][~episodes["chosen_mask"]] == 0).all()
    assert set(episodes["components"].keys()) == {"random_reward", "random_reward/red"}


def test_trajectories_can_be_saved_loaded_and_joined(small_bagel, tmp_path):
    episodes = collect(small_bagel)
    episodes.memmap(tmp_path)
    loaded = TensorDict.load_memmap(tmp_path)
    assert (torch.cat([episodes, loaded]) == torch.cat([episodes, episodes])).all()


def test_same_seed_same_trajectories(small_bagel):
    first, second, other = collect(small_bagel), collect(small_bagel), collect(small_bagel, seed=1)
    assert (first == second).all()
    assert not (first["latent"] == other["latent"]).all()


@pytest.mark.parametrize("shared", [False, True])
def test_members_draw_their_own_noise_unless_told_otherwise(small_bagel, shared):
    episodes = collect(small_bagel, window=Window(2, 0, 2), shared_noise=shared)
    first = episodes["window_latents"][:, :, 0]
    assert (episodes["window_times"][..., 0] == 1).all()
    assert torch.equal(first[0, 0], first[0, 1]) == shared
    assert not torch.equal(first[0, 0], first[1, 0])
    assert not torch.equal(episodes["latent"][0, 0], episodes["latent"][0, 1]), "the steps' noise is each its own"


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_the_training_pass_knows_the_temperature(small_bagel, temperature):
    batch = with_advantage(collect(small_bagel, temperature=temperature))
    assert make_loss(small_bagel, temperature=temperature)(batch)["text_log_ratio"] < 1e-4
    assert make_loss(small_bagel)(batch)["text_log_ratio"] > 1e-2


def test_episodes_without_an_image_teach_the_words_alone(small_bagel):
    variant = make_variant("text_to_image", reward=random_reward, text_budget=5, image_steps=6)
    first, _ = InterleavedGenVectorEnv(variant, 1).reset(seed=0, options={"prompts": PROMPTS[:1]})
    likely = int(Actor(small_bagel, temperature=0).act(first).token[0])
    variant = dataclasses.replace(variant, rules=dataclasses.replace(variant.rules, end_id=likely))
    env = InterleavedGenVectorEnv(variant, 16, copy=False)
    collector = Collector(env, Actor(small_bagel, window=WINDOW), 8)
    batch = with_advantage(collector.collect(PROMPTS, 3))
    left = batch["images_drawn"] == 0
    assert left.any()
    assert not left.all()
    assert (batch["reward"][left] == 0).all()
    for ratio in ("norm", "plain"):
        assert gradients(small_bagel, [batch], reference=small_bagel, velocity_weight=1.0, ratio=ratio).isfinite().all()


def test_nothing_is_clipped_before_the_first_update(small_bagel):
    for ratio in ("norm", "plain"):
        text_clip, image_clip = 1e-2, 1e-6 if ratio == "norm" else 1e-3
        loss = make_loss(small_bagel, text_clip=text_clip, image_clip=image_clip, ratio=ratio)
        out = loss(with_advantage(collect(small_bagel)))
        assert out["text_clip_fraction"] == 0
        assert out["image_clip_fraction"] == 0
        assert out["text_log_ratio"] < text_clip / 10
        assert out["image_log_ratio"] < image_clip / 10


def test_the_mean_of_the_gradient_is_not_zero_although_the_ratio_is_one(small_bagel):
    loss = make_loss(small_bagel)(with_advantage(collect(small_bagel)))
    (loss["loss_text"] + loss["loss_image"]).backward()
    for parameters in small_bagel.parameter_lists().values():
        assert sum(float(p.grad.abs().sum()) for p in parameters if p.grad is not None) > 0


def gradients(model, batches, **kwargs):
    loss = make_loss(model, **kwargs)
    model.zero_grad()
    for batch in batches:
        out = loss(batch)
        (out["loss_text"] + out["loss_image"] + out["loss_velocity"]).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("parts", [2, 3, 6])
def test_micro_batches_do_not_change_the_update(small_bagel, parts):
    batch = with_advantage(collect(small_bagel))
    torch.testing.assert_close(gradients(small_bagel, batch.chunk(parts)), gradients(small_bagel, [batch]), atol=2e-6, rtol=1e-4)


def test_order_does_not_change_the_update(small_bagel):
    batch = with_advantage(collect(small_bagel))
    torch.testing.assert_close(
        gradients(small_bagel, [batch[torch.tensor([5, 2, 0, 1, 4, 3])]]), gradients(small_bagel, [batch]), atol=2e-6, rtol=1e-4
    )


def test_padding_does_not_change_the_update(small_bagel):
    batch = with_advantage(collect(small_bagel))
    wider = batch.clone()
    for name in ("tokens", "text_mask", "chosen_mask", "log_prob", "prompt_tokens"):
        wider[name] = torch.nn.functional.pad(batch[name], (0, 4), value=7 if name in ("tokens", "prompt_tokens") else 0)
    places = torch.arange(wider["prompt_tokens"].shape[1])
    wider["prompt_tokens"] = wider["prompt_tokens"].masked_fill(places >= wider["prompt_length"][:, None], 0)
    torch.testing.assert_close(gradients(small_bagel, [wider]), gradients(small_bagel, [batch]), atol=2e-6, rtol=1e-4)


def test_the_image_loss_reaches_the_context_only_through_the_switch(small_bagel):
    batch = with_advantage(collect(small_bagel))
    embedding = small_bagel.language_model.model.embed_tokens.weight
    word = int(batch["tokens"][0, 0])

    def reached(through):
        small_bagel.zero_grad()
        make_loss(small_bagel, text_weight=0.0, through_context=through)(batch)["loss_image"].backward()
        assert embedding.grad[[3, 4]].abs().sum() > 0, "the markers are the understanding expert's own"
        return bool(embedding.grad[word].abs().sum() > 0)

    assert reached(True)
    assert not reached(False)


def test_prompts_are_read_once_a_group(small_bagel, monkeypatch):
    batch = with_advantage(collect(small_bagel))
    rows = []
    original = type(small_bagel).read_text
    monkeypatch.setattr(
        type(small_bagel), "read_text", lambda self, context, ids, *a, **k: rows.append(len(ids)) or original(self, context, ids, *a, **k)
    )
    replay(small_bagel, batch, make_variant("text_to_image").rules.legal_tokens().expand(2, -1))
    assert rows == [2, 6]


def act_until(phase, model, env, observation, actor):
    while (observation["phase"] < phase).any():
        decision = actor.act(observation)
        observation = env.step(decision.env_action, decision.active)[0]
    return observation


@pytest.mark.parametrize("phase", [Phase.TEXT, Phase.IMAGE])
def test_a_fresh_actor_in_mid_episode_gives_the_same_distribution(small_bagel, phase):
    env = InterleavedGenVectorEnv(num_envs=3, text_budget=6)
    observation, _ = env.reset(seed=0, options={"prompts": ["a circle", "a red square and a blue cross", "a circle"]})
    old = Actor(small_bagel)
    old.start([1, 2, 3])
    if phase == Phase.TEXT:
        for _ in range(2):
            decision = old.act(observation)
            observation = env.step(decision.env_action, decision.active)[0]
    else:
        observation = act_until(Phase.IMAGE, small_bagel, env, observation, old)
    fresh = Actor(small_bagel)
    fresh.start([1, 2, 3])
    one, two = old.act(observation), fresh.act(observation)
    if phase == Phase.TEXT:
        torch.testing.assert_close(one.log_prob, two.log_prob, atol=1e-5, rtol=0)
        assert torch.equal(one.token[one.active], two.token[two.active])
    else:
        torch.testing.assert_close(one.mean, two.mean, atol=1e-5, rtol=0)


def test_the_actor_starts_over_when_the_observation_is_another_episode(small_bagel):
    env = InterleavedGenVectorEnv(num_envs=2, text_budget=6)
    actor = Actor(small_bagel)
    for prompts in (["a circle", "a square"], ["two red crosses", "a circle"]):
        observation, _ = env.reset(seed=0, options={"prompts": prompts})
        fresh = Actor(small_bagel, temperature=0)
        fresh.start([0, 1])
        actor.temperature = 0
        assert torch.equal(actor.act(observation).log_prob, fresh.act(observation).log_prob)


def test_an_episode_does_not_depend_on_its_batch(small_bagel):
    variant = make_variant("text_to_image", reward=random_reward, text_budget=6, image_steps=3)
    together = evaluate(small_bagel, variant, PROMPTS * 2, seed=5)
    apart = evaluate(small_bagel, variant, PROMPTS * 2, seed=5, batch_size=1)
    assert together.texts == apart.texts
    torch.testing.assert_close(together.images, apart.images, atol=1e-4, rtol=0)


def test_rows_that_begin_anew_beside_others_are_read_anew(small_bagel):
    env = InterleavedGenVectorEnv(num_envs=2, text_budget=3, image_steps=2)
    observation, _ = env.reset(seed=0, options={"prompts": ["a circle", "a red square"]})
    actor = Actor(small_bagel)
    play(env, actor, observation)
    observation, _ = env.reset(seed=7, options={"prompts": ["two crosses", "a circle"], "reset_mask": [True, False]})
    decision = actor.act(observation)
    assert decision.active.tolist() == [True, False]
    fresh, _ = InterleavedGenVectorEnv(num_envs=1, text_budget=3).reset(seed=7, options={"prompts": ["two crosses"]})
    other = Actor(small_bagel)
    other.start([0])
    other.act(fresh)
    torch.testing.assert_close(actor._logits[0], other._logits[0], atol=1e-5, rtol=0)


def test_a_look_without_gradient_leaves_the_context_its_gradient(small_bagel):
    x, t = torch.randn(1, 36, 48), torch.tensor([0.5])
    _, context = small_bagel.read_text(small_bagel.start(1), torch.tensor([[1, 9, 2]]))
    with torch.no_grad():
        small_bagel.velocity(context, x, t)
    small_bagel.zero_grad()
    small_bagel.velocity(context, x, t).sum().backward()
    assert small_bagel.language_model.model.embed_tokens.weight.grad[9].abs().sum() > 0


def test_illegal_tokens_have_no_probability(small_bagel):
    env = InterleavedGenVectorEnv(num_envs=64, text_budget=6)
    observation, _ = env.reset(seed=0, options={"prompts": ["a circle"] * 64})
    actor = Actor(small_bagel)
    for _ in range(4):
        decision = actor.act(observation)
        legal = observation["legal_tokens"][torch.arange(64), decision.token]
        assert legal[decision.active].all()
        assert (decision.log_prob[decision.active] > -20).all()
        observation = env.step(decision.env_action, decision.active)[0]


def test_tokens_are_drawn_from_the_distribution(small_bagel):
    env = InterleavedGenVectorEnv(num_envs=4000, text_budget=6)
    observation, _ = env.reset(seed=0, options={"prompts": ["a circle"] * 4000})
    actor = Actor(small_bagel)
    actor.start(range(4000))
    decision = actor.act(observation)
    probability = torch.zeros(64).index_put((decision.token,), decision.log_prob.exp())
    frequency = decision.token.bincount(minlength=64) / 4000
    bound = 5 * (probability * (1 - probability) / 4000).sqrt() + 1e-3
    assert ((frequency - probability).abs() < bound).all()


@pytest.mark.parametrize(("size", "rows", "message"), [(1, 4, "group_size >= 2"), (3, 4, "multiple")])
def test_groups_that_cannot_be(small_bagel, size, rows, message):
    env = InterleavedGenVectorEnv(num_envs=rows)
    with pytest.raises(ValueError, match=message):
        Collector(env, Actor(small_bagel, window=Window()), size)


def test_without_start_each_new_episode_has_fresh_noise(small_bagel):
    """The same prompts again: other words, other SDE noise, and none of the old context."""
    env = InterleavedGenVectorEnv(num_envs=4, text_budget=5, image_steps=6)
    actor, seen = Actor(small_bagel, window=WINDOW), []
    for _ in range(3):
        observation, _ = env.reset(seed=0, options={"prompts": ["a circle"] * 4})
        play(env, actor, observation)
        seen.append(env.texts())
    assert seen[0] != seen[1] != seen[2]
    pictures = Actor(small_bagel, window=WINDOW)
    latents = []
    for rows in (2, 2, 3):
        env = InterleavedGenVectorEnv(num_envs=rows, text_budget=0, image_steps=6)
        observation, _ = env.reset(seed=0, options={"prompts": ["a circle"] * rows})
        play(env, pictures, observation)
        latents.append(env.episodes.state.latent[:2].clone())
    assert not torch.equal(latents[0], latents[1])

"""Rewards on the way: kept apart in the trajectory, and each stage learns from what was paid after it began."""

import pytest
import torch

from agents.actor import Actor
from agents.collector import Collector
from agents.config import AlgorithmSettings, load_config
from agents.flow import Window
from agents.loss import UniGRPOLoss, stage_advantages
from agents.objectives import group_advantage, stage_returns
from agents.trainer import Trainer
from rewards import UnscoredError, WeightedReward
from unigrpo_env.env import InterleavedGenEnv
from unigrpo_env.variants import make_variant
from unigrpo_env.vector import InterleavedGenVectorEnv

SHORT = {"text_budget": 4, "image_steps": 4}


def words(episodes):
    """How long the last thought is: a thought's own business."""
    return [float(len(said[-1].split())) for said in episodes.rounds]


def light(episodes):
    return episodes.images.mean((1, 2, 3))


def collect(model, name, **rewards):
    env = InterleavedGenVectorEnv(make_variant(name, **SHORT, **rewards), 8, copy=False)
    prompts = env.episodes.variant.task.prompts("train", 2, 0)
    return env, Collector(env, Actor(model, window=Window(2, 0, 3)), 4).collect(prompts, 3)


def test_the_trajectory_keeps_them_apart(small_bagel):
    env, episodes = collect(small_bagel, "story", thought_reward=words, round_reward=light, reward=light)
    flat = episodes.flatten(0, 1)
    rounds, pictures = env.episodes.rounds(range(8)), env.episodes.pictures(range(8))
    for row in range(8):
        assert flat["thought_reward"][row].tolist() == [len(said.split()) for said in rounds[row]]
        torch.testing.assert_close(flat["round_reward"][row], pictures[row].mean((1, 2, 3)))
        assert flat["reward"][row] == flat["round_reward"][row, -1]
    plain = collect(small_bagel, "story", reward=light)[1]
    assert not plain["thought_reward"].any()
    assert not plain["round_reward"].any()
    assert torch.equal(plain["tokens"], episodes["tokens"]), "what is paid changes nothing of what is played"


def test_the_single_env_names_what_it_paid():
    env = InterleavedGenEnv("text_to_image", **SHORT, thought_reward=lambda e: [2.0], round_reward=lambda e: [3.0], reward=lambda e: [5.0])
    observation, _ = env.reset(seed=0)
    paid, ended = [], False
    while not ended:
        observation, reward, ended, _, info = env.step({"token": 2, "latent": observation["latent"]})
        if "paid" in info:
            assert reward == sum(info["paid"].values())
            paid.append(info["paid"])
    assert paid == [{"thought_reward": 2.0}, {"round_reward": 3.0, "reward": 5.0}]


def test_returns_of_stages():
    nan = torch.nan
    found = stage_returns(
        reward=torch.tensor([1.0, 1.0, 1.0]),
        thought_reward=torch.tensor([[10.0, 20.0], [10.0, 0.0], [nan, 20.0]]),
        round_reward=torch.tensor([[100.0, 200.0], [100.0, 0.0], [100.0, 200.0]]),
        images_drawn=torch.tensor([2, 1, 2]),
        rounds_begun=torch.tensor([2, 2, 2]),
    )
    expected = [[331.0, 321.0, 221.0, 201.0], [111.0, 101.0, 1.0, nan], [nan] * 4]
    torch.testing.assert_close(found, torch.tensor(expected), equal_nan=True)


@pytest.mark.parametrize("name", ["text_to_image", "reflect", "dialogue"])
def test_each_token_and_step_gets_its_stage(small_bagel, name):
    episodes = collect(small_bagel, name, reward=light)[1].flatten(0, 1)
    rounds = make_variant(name, **SHORT).rules.image_budget
    stages = torch.arange(8.0)[:, None] * 100 + torch.arange(2 * rounds)
    episodes["advantage"] = stages
    text, image = stage_advantages(episodes)
    assert torch.equal(image, stages[:, 1::2].repeat_interleave(2, 1))
    for row in range(8):
        number = 0
        places = (episodes["image_places"][row] - episodes["prompt_length"][row]).tolist() if rounds > 1 else []
        for slot, chosen in enumerate(episodes["chosen_mask"][row].tolist()):
            number += slot in places
            if chosen:
                assert text[row, slot] == stages[row, 2 * number]


def test_one_advantage_a_stage_can_be_one_for_all(small_bagel):
    episodes = collect(small_bagel, "story", reward=light)[1].flatten(0, 1)
    one = group_advantage(episodes["reward"], episodes["group"])
    rules = make_variant("story", **SHORT).rules
    legal = torch.stack([rules.legal_tokens(), rules.legal_tokens(after_image=True)])
    loss = UniGRPOLoss(small_bagel, None, legal, AlgorithmSettings(velocity_weight=0.0))
    episodes["weight"] = episodes["text_share"] = torch.full((8,), 1 / 8)
    gradients = []
    for advantage in (one, one[:, None].expand(-1, 6)):
        small_bagel.zero_grad()
        out = loss(episodes.clone().update({"advantage": advantage}))
        (out["loss_text"] + out["loss_image"]).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in small_bagel.parameters() if p.grad is not None]))
    assert torch.equal(*gradients)


def trainer(model, folder, *overrides):
    settings = ["trainer.groups=2", "trainer.group_size=4", "env.text_budget=6", "env.image_steps=6", f"output.folder={folder}"]
    return Trainer(load_config("unigrpo", [*settings, *overrides]), model)


def test_credit_says_who_learns_from_a_thoughts_reward(small_bagel, tmp_path):
    """All pictures are worth the same; thoughts are not. Onward, pictures have nothing to learn; by episodes, they have."""
    found = {}
    for credit in ("episode", "onward"):
        one = trainer(small_bagel, tmp_path, f"algorithm.credit={credit}", "env.thought_reward=brevity")
        one.env.episodes.reward = lambda batch: type("Scores", (), {"reward": torch.ones(len(batch)), "components": {}})()
        episodes, metrics = one._gather(5)
        assert 0 < metrics["thought_reward"] <= 1
        assert metrics["signal"] > 0
        found[credit] = episodes.flatten(0, 1)
    assert found["episode"]["advantage"].shape == (8,)
    assert found["onward"]["advantage"].shape == (8, 2)
    assert not found["onward"]["advantage"][:, 1].any()
    torch.testing.assert_close(found["onward"]["advantage"][:, 0], found["episode"]["advantage"])
    torch.testing.assert_close(found["onward"]["returns"][:, 1], torch.ones(8))


def follow(one, script):
    """Let each row say that many words before each of its pictures, and then, if it has pictures left, `<end>`."""
    act, rules, state = one.collector.actor.act, one.variant.rules, one.env.episodes.state
    (word,) = one.variant.tokenizer.encode("red", add_special_tokens=False)

    def scripted(observation):
        decision = act(observation)
        for row, lengths in enumerate(script):
            number = int(state.images_drawn[row])
            decision.token[row] = (
                rules.end_id if number >= len(lengths) else word if state.sampled[row] < lengths[number] else rules.open_image_id
            )
        return decision

    one.collector.actor.act = scripted


RAGGED = [[2, 2, 3], [0], [2, 1], [4, 3]]
"""Words before each picture of four episodes; three of them stop early."""


@pytest.mark.parametrize("credit", ["episode", "onward"])
def test_pictures_paid_one_by_one_in_ragged_episodes_by_hand(small_bagel, tmp_path, credit):
    """A picture is paid the number of words before it; at the end there are 4 for one picture, 1 for more. The second group is all alike."""
    settings = ["env.variant=reflect", "env.image_steps=4", "algorithm.window_size=2", "algorithm.window_high=3"]
    one = trainer(small_bagel, tmp_path, *settings, f"algorithm.credit={credit}")
    one.env.episodes.reward = WeightedReward(lambda batch: [4.0 if len(drawn) == 1 else 1.0 for drawn in batch.pictures])
    one.env.episodes.on_the_way["round_reward"] = WeightedReward(
        lambda batch: [float(len(said[len(drawn) - 1].split())) for said, drawn in zip(batch.rounds, batch.pictures, strict=True)]
    )
    follow(one, [*RAGGED, *[[1, 2]] * 4])
    episodes, metrics = one._gather(5)
    assert episodes["images_drawn"].tolist() == [[3, 1, 2, 2], [2] * 4]
    assert episodes["round_reward"].tolist() == [[[2, 2, 3], [0, 0, 0], [2, 1, 0], [4, 3, 0]], [[1, 2, 0]] * 4]
    assert episodes["counts"].all()
    assert {name: metrics[name] for name in ("reward", "round_reward", "signal")} == {
        "reward": 11 / 8,
        "round_reward": 29 / 8,
        "signal": 0.5,
    }
    nan, two, three = torch.nan, 2**0.5, 1.5**0.5
    if credit == "episode":
        returns, advantage, alike = [8, 4, 4, 8], [1, -1, -1, 1], [4] * 4
    else:  # thought 1, picture 1, ...: a thought begun without a picture after it earns what the end pays, and is compared
        returns = [[8, 8, 6, 6, 4, 4], [4, 4, 4, nan, nan, nan], [4, 4, 2, 2, 1, nan], [8, 8, 4, 4, 1, nan]]
        advantage = [[1, 1, two, three, two, 0], [-1, -1, 0, 0, 0, 0], [-1, -1, -two, -three, -1 / two, 0], [1, 1, 0, 0, -1 / two, 0]]
        alike = [[4, 4, 3, 3, 1, nan]] * 4
    torch.testing.assert_close(episodes["returns"], torch.tensor([returns, alike], dtype=torch.float32), equal_nan=True)
    torch.testing.assert_close(episodes["advantage"][0], torch.tensor(advantage, dtype=torch.float32))
    assert not episodes["advantage"][1].any()


@pytest.mark.parametrize("credit", ["episode", "onward"])
def test_an_unscored_part_leaves_the_whole_episode_out(small_bagel, tmp_path, credit):
    one = trainer(small_bagel, tmp_path, f"algorithm.credit={credit}", "env.thought_reward=brevity", "trainer.max_unscored=0.5")
    score = one.env.episodes.on_the_way["thought_reward"]
    calls = []

    def sometimes(batch):
        scores = score(batch)
        calls.append(len(batch))
        scores.reward[0] = torch.nan if len(calls) == 1 else scores.reward[0]
        return scores

    one.env.episodes.on_the_way["thought_reward"] = sometimes
    episodes, metrics = one._gather(5)
    assert metrics["unscored"] == 1 / 8
    left_out = ~episodes["counts"]
    assert left_out.sum() == 1
    assert not episodes["advantage"][left_out].any()
    assert not episodes["reward"].isnan().any(), "what was paid at the end is still known"
    one.env.episodes.on_the_way["thought_reward"] = lambda batch: type("Scores", (), {"reward": torch.full((len(batch),), torch.nan)})()
    with pytest.raises(UnscoredError):
        one._gather(6)


@pytest.mark.parametrize("name", ["reflect", "story"])
def test_onward_over_rounds_trains(small_bagel, tmp_path, name):
    settings = [
        f"env.variant={name}",
        "algorithm.credit=onward",
        "env.thought_reward=brevity",
        "env.round_reward=crispness",
        "env.reward=extra_pictures",
    ]
    before = {key: value.clone() for key, value in small_bagel.state_dict().items()}
    metrics = trainer(small_bagel, tmp_path, *settings).iterate()
    assert metrics["text_clip_fraction"] < 0.1
    assert metrics["image_log_ratio"] < 1e-6
    assert any(not torch.equal(value, before[key]) for key, value in small_bagel.state_dict().items())

"""What is paid, when, and what could not be scored."""

import dataclasses
import math

import pytest
import torch

from rewards import REWARDS, Failures, Scores
from unigrpo_env.env import InterleavedGenEnv
from unigrpo_env.episodes import Episodes
from unigrpo_env.tasks.task import Prompt
from unigrpo_env.variants.variant import make_variant
from unigrpo_env.vector_env import InterleavedGenVectorEnv

LAST = {"token": torch.zeros(3, dtype=torch.long), "next_latent": torch.zeros(3, 36, 48)}


def reward_env(reward):
    env = InterleavedGenVectorEnv(num_envs=3, reward=reward, text_budget=0, image_steps=1)
    env.reset(seed=0)
    return env


def single_action(token=10):
    return {"token": token, "next_latent": LAST["next_latent"][0]}


def test_a_reward_that_raises_keeps_its_own_text():
    def broken(episodes):
        raise ZeroDivisionError("the scorer's own words")

    with pytest.raises(ZeroDivisionError, match="the scorer's own words") as caught:
        reward_env(broken).step(LAST)
    assert any("'broken'" in note for note in caught.value.__notes__)


def test_a_reward_of_the_wrong_length():
    with pytest.raises(ValueError, match=r"shape \[2\]; expected one number an episode, \[3\]"):
        reward_env(lambda episodes: [0.0, 1.0]).step(LAST)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_unscorable_is_not_zero(bad):
    env = reward_env(lambda episodes: [1.0, bad, 0.5])
    _, reward, terminated, _, infos = env.step(LAST)
    assert reward[0] == 1
    assert reward[1].isnan()
    assert infos["unscored"].tolist() == [False, True, False]
    assert terminated.all()


def test_a_reward_sees_all_ended_rows_at_once():
    calls = []

    def counted(episodes):
        calls.append(len(episodes))
        return torch.arange(float(len(episodes)))

    env = reward_env(counted)
    _, reward, _, _, infos = env.step(LAST, torch.tensor([True, False, True]))
    assert calls == [2]
    assert reward.tolist() == [0, 0, 1]
    assert infos["ended"].tolist() == [0, 2]
    assert infos["components"]["counted"][[0, 2]].tolist() == [0, 1]
    assert infos["components"]["counted"][1].isnan()


@pytest.mark.parametrize("name", ["thought_reward", "round_reward"])
def test_an_unscored_part_is_reported_at_the_end(name):
    def no_circles(episodes):
        """NaN for the first thought or image of a circle's episode."""
        count = int(name == "round_reward")
        values = []
        for prompt, drawn in zip(episodes.prompts, episodes.all_images, strict=True):
            is_bad = "circle" in prompt and len(drawn) == count
            values.append(math.nan if is_bad else 1.0)
        return values

    variant = make_variant(
        "story", images=2, text_budget=1, image_steps=1, reward="extra_images", **{name: no_circles}
    )
    one = InterleavedGenEnv(variant)
    two = InterleavedGenVectorEnv(variant, 2)
    for prompts in (["a circle", "a square"], ["a square", "a circle"]):
        one.reset(seed=0, options={"prompt": prompts[0]})
        for _ in range(4):
            info = one.step(single_action())[-1]
        assert info["unscored"] == ("circle" in prompts[0])
        two.reset(seed=0, options={"prompts": prompts})
        reported = []
        # Row 1 is a step behind row 0.
        for active in ([1, 0], [1, 1], [1, 1], [1, 1], [0, 1]):
            actions = {entry: value[:2] for entry, value in LAST.items()}
            infos = two.step(actions, torch.tensor(active) > 0)[-1]
            if "unscored" in infos:
                reported.append(infos["unscored"].tolist())
        assert reported == [["circle" in prompts[0], False], [False, "circle" in prompts[1]]]


def test_leaving_gets_the_lowest_reward():
    variant = make_variant("text_to_image", reward=lambda episodes: [math.nan] * len(episodes))
    rules = dataclasses.replace(variant.rules, end_id=10, end_before_image=True)
    env = InterleavedGenEnv(dataclasses.replace(variant, rules=rules, lowest_reward=-2.0))
    env.reset(seed=0)
    _, reward, terminated, _, info = env.step(single_action(10))
    assert terminated
    assert reward == -2.0
    assert not info["unscored"]
    assert info["components"] == {}
    assert "image" not in info


def test_text_alone_is_scored():
    seen = []

    def reward(episodes):
        seen.append((episodes.texts, episodes.images.shape, episodes.all_images[0].shape))
        return [0.5]

    variant = make_variant("text_to_image", image_budget=0, text_budget=1, reward=reward)
    env = InterleavedGenEnv(dataclasses.replace(variant, lowest_reward=-9.0))
    env.reset(seed=0)
    _, paid, terminated, _, info = env.step(single_action(10))
    assert terminated
    assert paid == 0.5
    assert seen == [([info["text"]], (1, 3, 24, 24), (0, 3, 24, 24))]


def test_parts_are_paid_each_in_its_step():
    variant = make_variant(
        "story",
        images=2,
        text_budget=1,
        image_steps=1,
        text_after_images=True,
        thought_reward=lambda episodes: [1.0] * len(episodes),
        round_reward=lambda episodes: [10.0] * len(episodes),
        reward=lambda episodes: [100.0] * len(episodes),
    )
    env = InterleavedGenEnv(variant)
    env.reset(seed=0)
    paid = []
    for _ in range(5):
        _, reward, *_, info = env.step(single_action())
        paid.append((reward, info.get("paid")))
    thought = (1.0, {"thought_reward": 1.0})
    image = (10.0, {"round_reward": 10.0})
    # The last text opens no image, so it earns no thought_reward.
    assert paid == [thought, image, thought, image, (100.0, {"reward": 100.0})]


def late(episodes):
    """No score for the first episode, which says why."""
    values = torch.ones(len(episodes))
    values[0] = math.nan
    failures = Failures.of([TimeoutError("no answer")], kind=lambda error: "timeout")
    return Scores(values, {"raw": 3 * values}, failures)


def test_a_step_says_why_there_is_no_score():
    env = reward_env({late: 2.0})
    _, reward, _, _, infos = env.step(LAST)
    assert reward[0].isnan()
    assert reward[1:].tolist() == [2, 2]
    assert infos["components"]["late/raw"][1:].tolist() == [3, 3]
    assert infos["failures"].counts == {"late: timeout": 1}
    assert isinstance(infos["failures"].first, TimeoutError)
    assert "failures" not in reward_env(lambda episodes: [1.0] * 3).step(LAST)[-1]


def test_arrays_hold_no_failures(caplog):
    """Gymnasium's infos keep their form; the log has the failure."""
    variant = make_variant("text_to_image", reward=late, text_budget=0, image_steps=1)
    env = InterleavedGenVectorEnv(variant, 3, to_numpy=True)
    env.reset(seed=0)
    actions = {name: value.numpy() for name, value in LAST.items()}
    infos = env.step(actions)[-1]
    assert "failures" not in infos
    assert infos["unscored"].tolist() == [True, False, False]
    assert "1 x late: timeout; the first: no answer" in caplog.text


def test_failures_of_all_payments_add_up():
    variant = make_variant(
        "text_to_image", text_budget=1, image_steps=1, reward=late, round_reward=late,
        thought_reward=late,
    )  # fmt: skip
    episodes = Episodes(variant, 3)
    episodes.reset(range(3), [Prompt("a circle")] * 3, range(3))
    everyone = torch.ones(3, dtype=torch.bool)
    first = episodes.step(torch.full((3,), 10), LAST["next_latent"], everyone)
    assert first.failures.counts == {"late: timeout": 1}
    second = episodes.step(LAST["token"], LAST["next_latent"], everyone)
    assert second.failures.counts == {"late: timeout": 2}


class Grey:
    """How near the images are to a grey."""

    def __init__(self, *, level=0.5):
        self.level = level

    def __call__(self, episodes):
        return [self.level] * len(episodes)


def test_rewards_have_the_options_of_the_variant(monkeypatch):
    monkeypatch.setattr(REWARDS, "_entries", {**REWARDS._entries, "grey": Grey})
    variant = make_variant(
        "text_to_image",
        text_budget=1,
        image_steps=1,
        reward="grey + dark",
        thought_reward="2 * dark",
        round_reward="2 * grey",
        reward_options={"grey": {"level": 4}, "dark": {"use": "grey", "level": 0.25}},
    )
    hash(variant)
    env = InterleavedGenEnv(variant)
    env.reset(seed=0)
    assert env.step(single_action())[1] == 0.5
    _, _, _, _, info = env.step(single_action())
    assert info["paid"] == {"round_reward": 8, "reward": 4.25}
    assert info["components"] == {"grey": 4, "dark": 0.25}

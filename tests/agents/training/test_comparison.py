"""Comparing the episodes of a group, by hand in ragged episodes."""

import pytest
import torch

from rewards import Failures, Scores, UnscoredError, WeightedReward

pytestmark = pytest.mark.slow

NAN = torch.nan
RAGGED = [[2, 2, 3], [0], [2, 1], [4, 3]]
"""Words before each image of four episodes of `reflect`; three of them stop early."""
REFLECT = [
    "env=reflect",
    "env.image_steps=4",
    "env.text_budget=6",
    "algorithm.window_size=2",
    "algorithm.window_high=3",
]
BY_EPISODE = {
    "returns": [8, 4, 4, 8],
    "advantage": [1, -1, -1, 1],
    "alike": 4,
}
# Thought 1, image 1, thought 2, ... A thought that no image follows earns what the end pays.
BY_STAGE = {
    "returns": [
        [8, 8, 6, 6, 4, 4],
        [4, 4, 4, NAN, NAN, NAN],
        [4, 4, 2, 2, 1, NAN],
        [8, 8, 4, 4, 1, NAN],
    ],
    "advantage": [
        [1, 1, 2**0.5, 1.5**0.5, 2**0.5, 0],
        [-1, -1, 0, 0, 0, 0],
        [-1, -1, -(2**0.5), -(1.5**0.5), -(0.5**0.5), 0],
        [1, 1, 0, 0, -(0.5**0.5), 0],
    ],
    "alike": [4, 4, 3, 3, 1, NAN],
}


def paid_at_the_end(batch):
    """4 for one image, 1 for more."""
    return [4.0 if len(drawn) == 1 else 1.0 for drawn in batch.all_images]


def paid_for_images(batch):
    """The number of words before the image."""
    found = []
    for texts, drawn in zip(batch.thoughts, batch.all_images, strict=True):
        found.append(float(len(texts[len(drawn) - 1].split())))
    return found


def follow(trainer, script):
    """Let each row write so many words before each of its images, and then end its episode."""
    act = trainer.collector.actor.act
    rules = trainer.variant.rules
    state = trainer.env.episodes.state
    (word,) = trainer.variant.processor.encode_text("red")

    def scripted(observation):
        decision = act(observation)
        for row, lengths in enumerate(script):
            number = int(state.images_drawn[row])
            token = rules.open_image_id
            if number >= len(lengths):
                token = rules.end_id
            elif state.sampled[row] < lengths[number]:
                token = word
            decision.token[row] = token
        return decision

    trainer.collector.actor.act = scripted


@pytest.mark.parametrize("advantage", ["episode", "reward_to_go"])
def test_ragged_episodes_by_hand(small_bagel, small_trainer, advantage):
    """The second group is all alike, so it has no signal."""
    trainer = small_trainer(small_bagel, *REFLECT, f"algorithm.advantage={advantage}")
    scorer = trainer.env.episodes.scorer
    scorer.final = WeightedReward(paid_at_the_end)
    scorer.intermediate["round_reward"] = WeightedReward(paid_for_images)
    follow(trainer, [*RAGGED, *[[1, 2]] * 4])
    episodes, metrics = trainer._collect(5)
    assert episodes.images_drawn.tolist() == [[3, 1, 2, 2], [2] * 4]
    paid = [[2, 2, 3], [0, 0, 0], [2, 1, 0], [4, 3, 0]]
    assert episodes.round_reward.tolist() == [paid, [[1, 2, 0]] * 4]
    assert episodes.is_scored.all()
    assert metrics["reward"] == 11 / 8
    assert metrics["round_reward"] == 29 / 8
    assert metrics["frac_groups_with_signal"] == 0.5
    expected = BY_EPISODE if advantage == "episode" else BY_STAGE
    alike = [expected["alike"]] * 4
    returns = torch.tensor([expected["returns"], alike], dtype=torch.float32)
    torch.testing.assert_close(episodes.returns, returns, equal_nan=True)
    image = torch.tensor(expected["advantage"], dtype=torch.float32)
    if advantage == "episode":
        image = image[:, None].expand(4, 3)
    else:
        image = image[:, 1::2]
    torch.testing.assert_close(episodes.image_advantage[0], image[:, :, None].expand(4, 3, 2))
    assert not episodes.image_advantage[1].any()
    assert not episodes.text_advantage[1].any()
    for row, lengths in enumerate(RAGGED):
        chosen = episodes.chosen_mask[0, row]
        values = []
        # The word tokens of each round, and the one that opened the image or ended the episode.
        rounds = [length + 1 for length in lengths]
        if len(lengths) < 3:
            rounds.append(1)
        for number, count in enumerate(rounds):
            stage = expected["advantage"][row]
            if advantage == "reward_to_go":
                stage = stage[2 * number]
            values += [stage] * count
        found = episodes.text_advantage[0, row][chosen]
        torch.testing.assert_close(found, torch.tensor(values, dtype=torch.float32))


@pytest.mark.parametrize("advantage", ["episode", "reward_to_go"])
def test_who_learns_from_a_reward_for_thoughts(small_bagel, small_trainer, advantage):
    """All images are worth the same: with reward-to-go they have nothing to learn."""
    trainer = small_trainer(
        small_bagel,
        f"algorithm.advantage={advantage}",
        "env.thought_reward=brevity",
        "env.reward=constant",
        "env.text_budget=6",
    )
    episodes, metrics = trainer._collect(5)
    assert 0 < metrics["thought_reward"] <= 1
    assert metrics["frac_groups_with_signal"] > 0
    flat = episodes.flatten(0, 1)
    assert flat.text_advantage[flat.chosen_mask].any()
    if advantage == "episode":
        assert flat.returns.shape == (8,)
        assert flat.image_advantage.any()
    else:
        assert flat.returns.shape == (8, 2)
        assert not flat.image_advantage.any()
        torch.testing.assert_close(flat.returns[:, 1], torch.full((8,), 0.7))


@pytest.mark.parametrize("advantage", ["episode", "reward_to_go"])
def test_unscored_part_leaves_the_episode_out(small_bagel, small_trainer, advantage):
    trainer = small_trainer(
        small_bagel,
        f"algorithm.advantage={advantage}",
        "env.thought_reward=brevity",
        "trainer.max_unscored=0.5",
    )
    intermediate = trainer.env.episodes.scorer.intermediate
    score = intermediate["thought_reward"]
    calls = []

    def sometimes(batch):
        scores = score(batch)
        calls.append(len(batch))
        if len(calls) == 1:
            scores.reward[0] = NAN
        return scores

    intermediate["thought_reward"] = sometimes
    episodes, metrics = trainer._collect(5)
    assert metrics["unscored"] == 1 / 8
    left_out = ~episodes.is_scored
    assert left_out.sum() == 1
    assert not episodes.text_advantage[left_out].any()
    assert not episodes.image_advantage[left_out].any()
    assert not episodes.reward.isnan().any(), "what was paid at the end is still known"
    intermediate["thought_reward"] = WeightedReward("all_nan")
    with pytest.raises(UnscoredError, match="8 of 8 episodes could not be scored"):
        trainer._collect(6)


def test_return_of_an_episode_is_a_sum(small_bagel, short_variant, collect, prepare):
    """What is paid on the way counts beside what is paid at the end."""
    variant = short_variant("story", thought_reward=lambda batch: [0.5] * len(batch))
    episodes = prepare(collect(small_bagel, variant), variant)
    torch.testing.assert_close(episodes.returns, episodes.reward + 1.5)


@pytest.fixture
def unreachable(rewards):
    """Register a reward of the name: every other episode fails, in two kinds."""

    class Refused(OSError):
        def __init__(self, kind):
            super().__init__(f"{kind}: CUDA out of memory")
            self.kind = kind

    def unreachable(batch):
        values = torch.arange(len(batch), dtype=torch.float32)
        values[::2] = NAN
        errors = [Refused("HTTP 503")] + [Refused("HTTP 500")] * (len(values[::2]) - 1)
        return Scores(values, failures=Failures.of(errors))

    rewards.add("unreachable", unreachable)


def test_too_many_failures_stop_with_the_error_of_the_scorer(
    small_bagel, small_trainer, unreachable
):
    trainer = small_trainer(small_bagel, "env.reward=unreachable")
    with pytest.raises(UnscoredError) as caught:
        trainer.iterate()
    assert (
        "4 of 8 episodes could not be scored: 3 x unreachable: HTTP 500, 1 x unreachable: HTTP 503;"
        " the first: HTTP 503: CUDA out of memory. Mend the reward, or raise trainer.max_unscored"
    ) in str(caught.value)
    assert isinstance(caught.value.__cause__, OSError)


def test_failures_are_those_of_the_last_rollout(small_bagel, small_trainer, unreachable):
    overrides = ["env.reward=unreachable", "trainer.max_unscored=0.5"]
    trainer = small_trainer(small_bagel, *overrides)
    for seed in (5, 6):
        _, metrics = trainer._collect(seed)
        assert metrics["unscored"] == 0.5
        assert sum(trainer.collector.failures.counts.values()) == 4
    trainer.env.episodes.scorer.final = WeightedReward("all_nan")
    with pytest.raises(
        UnscoredError, match="the reward returned NaN or infinity for them"
    ) as error:
        trainer._collect(7)
    assert error.value.__cause__ is None

"""A task that answers what was drawn speaks for the user."""

import numpy as np
import pytest
import torch

from unigrpo_env.env import InterleavedGenEnv
from unigrpo_env.mdp.rules import Phase
from unigrpo_env.tasks.shapes.vocabulary import shapes_tokenizer
from unigrpo_env.tasks.task import Prompt
from unigrpo_env.variants.variant import make_variant
from unigrpo_env.vector_env import InterleavedGenVectorEnv

EOS = shapes_tokenizer().eos_token_id


class Replier:
    """Answers with what `answers` gives for the batch, and keeps every batch."""

    def __init__(self, answers):
        self.answers = answers
        self.batches = []

    def prompts(self, split, count, seed):
        return [Prompt("a circle")] * count

    def reply(self, episodes):
        self.batches.append(episodes)
        return self.answers(episodes)


def replying(answers, **settings):
    defaults = {"image_budget": 3, "text_budget": 1, "image_steps": 2, "reward": "extra_images"}
    return make_variant("dialogue", task=Replier(answers), **(defaults | settings))


def step(env, value=0.5, active=None):
    rows = env.num_envs
    latent = torch.full((rows, 36, 48), value)
    return env.step({"token": torch.full((rows,), EOS), "next_latent": latent}, active)


def begin(variant, rows=1, prompts=None):
    env = InterleavedGenVectorEnv(variant, rows)
    options = {"prompts": prompts or ["a circle"] * rows}
    observation, _ = env.reset(seed=0, options=options)
    return env, observation


def stream(env, row=0):
    state = env.episodes.state
    ids = state.tokens[row, : state.num_tokens[row]].tolist()
    return " ".join(shapes_tokenizer().convert_ids_to_tokens(ids))


def test_all_waiting_rows_are_answered_at_once():
    variant = replying(lambda episodes: ["make the circle blue"] * len(episodes))
    env, _ = begin(variant, 3, ["a circle", "a square", "a cross"])
    active = torch.tensor([True, False, True])
    for _ in range(3):
        observation, *_ = step(env, 0.5, active)
    task = variant.task
    assert [batch.prompts for batch in task.batches] == [["a circle", "a cross"]]
    assert observation["phase"].tolist() == [Phase.TEXT] * 3
    assert stream(env, 0).endswith("<image> <bos> make the circle blue <eos> <bos>")
    assert stream(env, 1).endswith("a square <eos> <bos>")


def test_the_user_sees_the_image_just_drawn():
    variant = replying(lambda episodes: ["red"] * len(episodes))
    env, _ = begin(variant)
    drawn = []
    for value in (0.5, -0.5):
        for _ in range(3):
            step(env, value)
        drawn.append(value * 0.5 + 0.5)
    seen = variant.task.batches
    assert [len(batch.all_images[0]) for batch in seen] == [1, 2]
    assert [float(batch.images.mean()) for batch in seen] == pytest.approx(drawn)
    assert [float(mean) for mean in seen[1].all_images[0].mean((1, 2, 3))] == pytest.approx(drawn)
    assert [batch.thoughts for batch in seen] == [[[""]], [["", ""]]]


@pytest.mark.parametrize("nothing", [None, ""])
def test_nothing_to_say_ends_the_episode(nothing):
    def answers(episodes):
        return [nothing if "square" in prompt else "red" for prompt in episodes.prompts]

    env, _ = begin(replying(answers), 2, ["a circle", "a square"])
    for _ in range(3):
        observation, reward, terminated, _, infos = step(env)
    assert terminated.tolist() == [False, True]
    assert infos["ended"].tolist() == [1]
    assert (observation["image_positions"] >= 0).tolist() == [[True, False], [False, False]]
    assert observation["images_drawn"].tolist() == [1, 1]
    assert reward.tolist() == [0, 0]


def test_nobody_is_asked_after_the_last_image():
    variant = replying(lambda episodes: ["red"] * len(episodes), image_budget=2)
    env, _ = begin(variant)
    for _ in range(6):
        *_, terminated, _, _ = step(env)
    assert terminated.all()
    assert len(variant.task.batches) == 1


def test_the_user_may_ask_for_a_last_text():
    variant = replying(
        lambda episodes: ["right-picture"] * len(episodes), image_budget=1, text_after_images=True
    )
    env, _ = begin(variant)
    for _ in range(3):
        *_, terminated, _, _ = step(env)
    assert not terminated.any()
    assert stream(env).endswith("<image> <bos> right-picture <eos> <bos>")
    *_, terminated, _, _ = step(env)
    assert terminated.all()


def test_a_reply_stands_in_place_of_fixed_turns():
    answers = iter([["red"], [None]])
    env, _ = begin(
        replying(lambda episodes: next(answers)),
        prompts=[Prompt("a circle", turns=("make the circle blue", "remove the circle"))],
    )
    for _ in range(3):
        step(env)
    assert stream(env).endswith("<image> <bos> red <eos> <bos>")
    for _ in range(3):
        *_, terminated, _, _ = step(env)
    assert terminated.all(), "the second fixed turn is not said"


def test_fixed_turns_need_no_reply():
    variant = make_variant("dialogue", text_budget=1, image_steps=1)
    assert not hasattr(variant.task, "reply")
    env, _ = begin(variant, prompts=[Prompt("a circle", turns=("make the circle blue",))])
    for _ in range(2):
        step(env)
    assert stream(env).endswith("make the circle blue <eos> <bos>")


def test_nobody_replies_without_a_turn_budget():
    variant = replying(lambda episodes: ["red"] * len(episodes), turn_budget=0)
    env, _ = begin(variant)
    for _ in range(3):
        step(env)
    assert variant.task.batches == []
    assert stream(env).endswith("<image> <bos>")


def failing(episodes):
    raise ConnectionError("the user is away")


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (["red"], TypeError, r"reply\(\) of Replier to return a list of 2 texts or None, got"),
        ("ab", TypeError, r"reply\(\) of Replier to return a list of 2 texts or None, got 'ab'"),
        (None, TypeError, r"reply\(\) of Replier to return a list of 2 texts or None, got None"),
        (["red", 3], TypeError, r"reply\(\) of Replier to return texts or None, got int: 3"),
        (["red", b"red"], TypeError, "texts or None, got bytes"),
        (["red", "red " * 9], ValueError, "'red red .* takes 11 tokens .* at most turn_budget=10"),
        (["red", "<image>"], ValueError, "got the control token '<image>'; take it out"),
        (["red", "red <eos>"], ValueError, "got the control token '<eos>'"),
        (failing, ConnectionError, "the user is away"),
    ],
)
def test_a_failed_reply_loses_nothing(wrong, error, message):
    variant = replying(lambda episodes: ["red"] * len(episodes))
    # Row 2 writes while rows 0 and 1 draw.
    env, _ = begin(variant, 3)
    active = torch.tensor([True, True, False])
    step(env, active=active)
    before, *_ = step(env, active=active)
    good = variant.task.answers
    variant.task.answers = wrong if callable(wrong) else lambda episodes: wrong
    with pytest.raises(error, match=message):
        step(env)
    after = env.episodes.observe()
    assert all(torch.equal(before[name], after[name]) for name in before)
    variant.task.answers = good
    observation, *_ = step(env)
    assert observation["images_drawn"].tolist() == [1, 1, 0]
    assert stream(env, 1).endswith("<image> <bos> red <eos> <bos>")
    assert observation["phase"].tolist() == [Phase.TEXT, Phase.TEXT, Phase.IMAGE]


def test_the_single_env_asks_too():
    env = InterleavedGenEnv(replying(lambda episodes: ["red"]))
    env.reset(seed=0)
    action = {"token": EOS, "next_latent": np.zeros((36, 48), np.float32)}
    for _ in range(3):
        observation, _, ended, *_ = env.step(action)
    assert not ended
    assert observation["phase"] == Phase.TEXT

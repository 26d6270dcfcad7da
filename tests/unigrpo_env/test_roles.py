"""Who wrote each token of an episode."""

import torch

from unigrpo_env.mdp.rules import Phase, Role
from unigrpo_env.tasks.task import Prompt
from unigrpo_env.vector_env import InterleavedGenVectorEnv

PROMPT = Prompt("a red circle", turns=("make the circle green",))


def draw(env, observation, active):
    """Write an opening token, then keep the noise for an image."""
    tokens = torch.full((env.num_envs,), env.episodes.rules.open_image_id)
    while True:
        actions = {"token": tokens, "next_latent": observation["latent"]}
        drawn = observation["images_drawn"].clone()
        observation, *_ = env.step(actions, active)
        if (observation["images_drawn"] > drawn).any():
            return observation


def test_system_user_and_model():
    env = InterleavedGenVectorEnv(
        "dialogue", 2, image_steps=2, prompt_budget=32, system_prompt="a blue square"
    )
    processor = env.episodes.processor
    system = len(processor.encode_segment("a blue square"))
    user = len(processor.encode_segment("a red circle"))
    observation, _ = env.reset(seed=0, options={"prompts": [PROMPT, PROMPT]})
    roles = observation["roles"][0].tolist()
    assert roles[: system + user] == [Role.SYSTEM] * system + [Role.USER] * user
    assert set(roles[system + user :]) == {Role.MODEL}, "the mark that opens the thought as well"

    observation = draw(env, observation, torch.tensor([True, False]))
    start = int(observation["image_positions"][0, 0]) + 1
    turn = len(processor.encode_segment("make the circle green"))
    roles = observation["roles"][0].tolist()
    assert roles[start : start + turn] == [Role.USER] * turn
    assert set(roles[start + turn :]) == {Role.MODEL}
    assert observation["tokens"][0, start + turn] == processor.bos_id
    assert set(observation["roles"][1, system + user :].tolist()) == {Role.MODEL}

    observation, _ = env.reset(seed=0, options={"prompts": [PROMPT, PROMPT]})
    assert set(observation["roles"][0, system + user :].tolist()) == {Role.MODEL}, "begun anew"


def test_what_the_env_writes_without_a_user_opens_a_thought():
    env = InterleavedGenVectorEnv("story", 1, image_steps=2)
    observation, _ = env.reset(seed=0)
    observation = draw(env, observation, torch.tensor([True]))
    assert observation["phase"].tolist() == [Phase.TEXT]
    after = int(observation["image_positions"][0, 0])
    assert set(observation["roles"][0, after:].tolist()) == {Role.MODEL}


def test_a_scenario_without_thoughts_leaves_the_prompt_to_the_user():
    env = InterleavedGenVectorEnv("text_to_image", 1, text_budget=0)
    observation, _ = env.reset(seed=0)
    length = int(observation["prompt_length"])
    assert set(observation["roles"][0, :length].tolist()) == {Role.USER}

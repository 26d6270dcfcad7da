"""Contract tests that a variant of your own inherits.

    from unigrpo_env.testing import VariantContract

    class TestMyVariant(VariantContract):
        def make_variant(self):
            return my_variant()

Run with pytest; every method named `test_...` is one promise.
"""

from __future__ import annotations

import warnings
from itertools import groupby
from typing import Any

import numpy as np
import torch
from gymnasium.utils.env_checker import check_env

from unigrpo_env.env import InterleavedGenEnv
from unigrpo_env.episodes import Variant
from unigrpo_env.mdp import Phase
from unigrpo_env.vector import InterleavedGenVectorEnv

EXPECTED_WARNINGS = (
    "A Box action space minimum value is -infinity",  # latents are Gaussian: they have no bounds
    "A Box action space maximum value is infinity",
    "A Box observation space minimum value is -infinity",
    "A Box observation space maximum value is infinity",
)


def random_action(observation: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """A legal action for one episode: any legal token, or a step of plausible size."""
    legal = np.flatnonzero(observation["legal_tokens"])
    latent = observation["latent"]
    noise = rng.standard_normal(latent.shape).astype(np.float32)
    return {"token": np.int64(rng.choice(legal) if len(legal) else 0), "latent": latent + 0.3 * noise}


def play(env: InterleavedGenEnv, seed: int, rng_seed: int = 0, **options: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]], float]:
    """One random legal episode: its observations, its actions, its reward."""
    rng = np.random.default_rng(rng_seed)
    observation, _ = env.reset(seed=seed, options=options or None)
    observations, actions, total, ended = [observation], [], 0.0, False
    while not ended:
        action = random_action(observation, rng)
        observation, reward, ended, truncated, info = env.step(action)
        assert not truncated, "an episode of this library is never truncated by the env itself"
        assert reward == 0 or "paid" in info, "what is paid is named"
        assert ended or "reward" not in info.get("paid", ()), "the reward is paid once, at the end"
        observations.append(observation)
        actions.append(action)
        total += reward
    return observations, actions, total


class VariantContract:
    """What every variant promises. Override `make_variant`."""

    def make_variant(self) -> Variant:
        raise NotImplementedError("return the variant to test")

    def make_env(self) -> InterleavedGenEnv:
        return InterleavedGenEnv(self.make_variant())

    def test_gymnasium_checker_is_content(self) -> None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            check_env(self.make_env(), skip_render_check=True)
        unexpected = {str(w.message) for w in caught if not any(known in str(w.message) for known in EXPECTED_WARNINGS)}
        assert not unexpected, unexpected

    def test_same_seed_same_episode(self) -> None:
        used = self.make_env()
        play(used, 5)
        first, *others = play(self.make_env(), 3), play(self.make_env(), 3), play(used, 3)
        for other in others:
            for one, two in zip(first[0], other[0], strict=True):
                assert all(np.array_equal(one[name], two[name]) for name in one)
            assert first[2] == other[2]

    def test_budgets_and_phases(self) -> None:
        rules = self.make_variant().rules
        for seed in range(5):
            observations, actions, _ = play(self.make_env(), seed, rng_seed=seed)
            phases = [int(observation["phase"]) for observation in observations]
            assert phases[-1] == Phase.DONE
            assert Phase.DONE not in phases[:-1]
            spans = [(phase, len(list(span))) for phase, span in groupby(phases[:-1])]
            images = 0
            for phase, length in spans:
                if phase == Phase.TEXT:
                    assert length <= rules.text_budget, "no thought is longer than its budget"
                else:
                    assert length % rules.image_steps == 0, "a picture takes all its steps"
                    images += length // rules.image_steps
            assert images <= rules.image_budget
            assert images or spans[-1][0] == Phase.TEXT
            assert int(observations[-1]["num_tokens"]) <= rules.max_tokens
            steps = [int(o["step"]) for o in observations if o["phase"] == Phase.IMAGE]
            assert steps == list(range(rules.image_steps)) * images
            times = [float(o["t"]) for o in observations if o["phase"] == Phase.IMAGE][: rules.image_steps]
            assert times == sorted(times, reverse=True), "flow time falls"
            assert len(actions) + 1 == len(observations)

    def test_observations_are_in_their_space(self) -> None:
        env = self.make_env()
        for observation in play(env, 1)[0]:
            assert env.observation_space.contains(observation)

    def test_both_faces_play_one_episode(self) -> None:
        variant = self.make_variant()
        observations, actions, reward = play(InterleavedGenEnv(variant), 7)
        env = InterleavedGenVectorEnv(variant, 2)
        observation, _ = env.reset(seed=[7, 8])
        active = torch.tensor([True, False])
        total = torch.zeros(2, dtype=torch.float64)  # as Python adds up
        for expected, action in zip(observations, [*actions, None], strict=True):
            for name, value in expected.items():
                assert np.array_equal(np.asarray(observation[name][0]), value), name
            if action is not None:
                batch = {name: torch.as_tensor(np.stack([value, np.zeros_like(value)])) for name, value in action.items()}
                observation, paid, *_ = env.step(batch, active)
                total += paid
        assert float(total[0]) == reward or (np.isnan(reward) and bool(total[0].isnan()))
        assert int(observation["phase"][1]) != Phase.DONE, "an inactive row stays where it is"

    def test_no_picture_beats_none(self) -> None:
        variant = self.make_variant()
        if variant.rules.end_id is None:
            return
        rewards = [play(InterleavedGenEnv(variant), seed)[2] for seed in range(5)]
        assert all(variant.lowest_reward <= reward for reward in rewards if not np.isnan(reward))

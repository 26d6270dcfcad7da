"""Contract tests that a variant of your own inherits.

    from unigrpo_env.testing import VariantContract

    class TestMyVariant(VariantContract):
        def make_variant(self):
            return my_variant()

Run with pytest; every method named `test_...` is one promise.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
import torch
from gymnasium.utils.env_checker import check_env

from unigrpo_env.env import InterleavedGenEnv
from unigrpo_env.mdp.rules import Phase
from unigrpo_env.variants.variant import Variant
from unigrpo_env.vector_env import InterleavedGenVectorEnv

EXPECTED_WARNINGS = (
    # Latents are Gaussian: they have no bounds.
    "A Box action space minimum value is -infinity",
    "A Box action space maximum value is infinity",
    "A Box observation space minimum value is -infinity",
    "A Box observation space maximum value is infinity",
)


@dataclass
class RandomEpisode:
    """One random legal episode.

    Attributes:
        observations: one more than actions.
        actions: in order.
        reward: all that was paid.
        info: of the last step.
    """

    observations: list[dict[str, Any]] = field(default_factory=list)
    actions: list[dict[str, Any]] = field(default_factory=list)
    reward: float = 0.0
    info: dict[str, Any] = field(default_factory=dict)


def random_action(observation: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """A legal action for one episode: any legal token, and a latent near the present one."""
    # The mask leaves padding legal outside the text phase, so there is always a token to choose.
    legal = np.flatnonzero(observation["legal_tokens"])
    latent = observation["latent"]
    noise = rng.standard_normal(latent.shape).astype(np.float32)
    return {"token": np.int64(rng.choice(legal)), "next_latent": latent + 0.3 * noise}


def random_episode(
    env: InterleavedGenEnv, seed: int, rng_seed: int = 0, **options: Any
) -> RandomEpisode:
    """Play one random legal episode, and check what every step promises.

    Args:
        env: to play in.
        seed: of the reset.
        rng_seed: of the actions.
        options: of the reset.
    """
    rng = np.random.default_rng(rng_seed)
    observation, _ = env.reset(seed=seed, options=options or None)
    episode = RandomEpisode([observation])
    ended = False
    while not ended:
        assert observation["legal_tokens"].any(), "some token is legal in every phase"
        action = random_action(observation, rng)
        observation, reward, ended, truncated, info = env.step(action)
        assert not truncated, "an episode is never truncated by the env itself"
        assert reward == 0 or "paid" in info, "what is paid is named"
        paid_at_end = "reward" in info.get("paid", ())
        assert ended or not paid_at_end, "the reward is paid once, at the end"
        episode.observations.append(observation)
        episode.actions.append(action)
        episode.reward += reward
        episode.info = info
    return episode


class VariantContract:
    """What every variant promises. Override `make_variant`."""

    def make_variant(self) -> Variant:
        """The variant to test."""
        raise NotImplementedError("return the variant to test")

    def make_env(self) -> InterleavedGenEnv:
        """A single env of it."""
        return InterleavedGenEnv(self.make_variant())

    def test_gymnasium_checker_passes(self) -> None:
        """Gymnasium's own checker gives no warning but the expected ones."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            check_env(self.make_env(), skip_render_check=True)
        unexpected = set()
        for warning in caught:
            text = str(warning.message)
            if not any(known in text for known in EXPECTED_WARNINGS):
                unexpected.add(text)
        assert not unexpected, unexpected

    def test_same_seed_same_episode(self) -> None:
        """A seed fixes the episode, whatever was played before."""
        used = self.make_env()
        random_episode(used, 5)
        first = random_episode(self.make_env(), 3)
        for env in (self.make_env(), used):
            other = random_episode(env, 3)
            for one, two in zip(first.observations, other.observations, strict=True):
                assert all(np.array_equal(one[name], two[name]) for name in one)
            # NaN, the reward of an episode that could not be scored, is not equal to itself.
            assert first.reward == other.reward or np.isnan(first.reward)

    def test_budgets_and_phases(self) -> None:
        """Texts and images keep their budgets, and flow time falls."""
        rules = self.make_variant().rules
        for seed in range(5):
            episode = random_episode(self.make_env(), seed, rng_seed=seed)
            phases = [int(observation["phase"]) for observation in episode.observations]
            assert phases[-1] == Phase.DONE
            assert Phase.DONE not in phases[:-1]
            # (phase, steps in a row): images that no text parts make one span of several.
            spans = [(phase, len(list(span))) for phase, span in groupby(phases[:-1])]
            images = 0
            for phase, length in spans:
                if phase == Phase.TEXT:
                    assert length <= rules.text_budget, "no thought is longer than its budget"
                else:
                    assert length % rules.image_steps == 0, "an image takes all its steps"
                    images += length // rules.image_steps
            assert images <= rules.image_budget
            assert images or spans[-1][0] == Phase.TEXT
            self._check_image_steps(episode, images)

    def _check_image_steps(self, episode: RandomEpisode, images: int) -> None:
        rules = self.make_variant().rules
        last = episode.observations[-1]
        assert int(last["num_tokens"]) <= rules.max_tokens
        assert int(last["images_drawn"]) == images
        assert ("image" in episode.info) == (images > 0)
        drawing = [each for each in episode.observations if each["phase"] == Phase.IMAGE]
        steps = [int(each["step"]) for each in drawing]
        assert steps == list(range(rules.image_steps)) * images
        # Those of the first image; the others have the same.
        times = [float(each["t"][0]) for each in drawing[: rules.image_steps]]
        assert times == sorted(times, reverse=True), "flow time falls"

    def test_observations_are_in_their_space(self) -> None:
        """Every observation is a member of the space that the env declares."""
        env = self.make_env()
        for observation in random_episode(env, 1).observations:
            assert env.observation_space.contains(observation)

    def test_vector_env_plays_the_same_episode(self) -> None:
        """Single and vector env give one episode from one seed and the same actions."""
        variant = self.make_variant()
        episode = random_episode(InterleavedGenEnv(variant), 7)
        env = InterleavedGenVectorEnv(variant, 2)
        observation, _ = env.reset(seed=[7, 8])
        active = torch.tensor([True, False])
        # Summed up in double precision, as Python adds.
        total = torch.zeros(2, dtype=torch.float64)
        for number, expected in enumerate(episode.observations):
            for name, value in expected.items():
                assert np.array_equal(np.asarray(observation[name][0]), value), name
            if number == len(episode.actions):
                break
            batch = {}
            # [2, ...]: the second row does not act, so its zeros are not read.
            for name, value in episode.actions[number].items():
                batch[name] = torch.as_tensor(np.stack([value, np.zeros_like(value)]))
            observation, reward, *_ = env.step(batch, active)
            total += reward
        same = float(total[0]) == episode.reward
        assert same or (np.isnan(episode.reward) and bool(total[0].isnan()))
        assert int(observation["phase"][1]) != Phase.DONE, "an inactive row stays where it is"

    def test_no_image_is_worth_less_than_none(self) -> None:
        """Leaving without an image gets the lowest reward, or leaving becomes the exploit."""
        variant = self.make_variant()
        if variant.rules.end_id is None or variant.rules.image_budget == 0:
            return
        for seed in range(5):
            reward = random_episode(InterleavedGenEnv(variant), seed).reward
            assert np.isnan(reward) or variant.lowest_reward <= reward

    def test_replies_are_texts_or_none(self) -> None:
        """A task that answers what was drawn gives one text or None for each waiting row."""
        variant = self.make_variant()
        if not hasattr(variant.task, "reply"):
            return
        assert variant.rules.turn_budget, "a reply needs a turn_budget"
        for seed in range(3):
            random_episode(InterleavedGenEnv(variant), seed, rng_seed=seed)

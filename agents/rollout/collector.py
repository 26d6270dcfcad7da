"""The loop `env.step(actor.act(observation))`, the one that users write, and what it leaves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor

from agents.policy.actor import Actor, Decision
from agents.policy.sde import Window
from agents.policy.segments import stored_images
from agents.trajectory import Trajectory
from rewards import Failures
from unigrpo_env.mdp.rules import Phase, Rules
from unigrpo_env.tasks.task import Prompt
from unigrpo_env.vector_env import InterleavedGenVectorEnv

INTERMEDIATE = ("thought_reward", "round_reward")
"""Rewards that are paid on the way."""

Watch = Callable[[dict[str, Tensor], Decision], None]
"""Called with each observation and decision before the step."""


@dataclass
class RolloutResult:
    """How N episodes ended; R is the image budget.

    Attributes:
        observation: the last one.
        reward: `[N]` float32, paid at the end; NaN: unscored.
        components: its named parts, `[N]` float32.
        intermediate_rewards: `thought_reward` and `round_reward`, `[N, R]` float32: what each
            thought and each image was paid; 0 where nothing was.
        failures: why rewards could not score, where they said so.
    """

    observation: dict[str, Tensor]
    reward: Tensor
    components: dict[str, Tensor]
    intermediate_rewards: dict[str, Tensor]
    failures: Failures = field(default_factory=Failures)

    def add(self, infos: dict[str, Any], images_drawn: Tensor) -> None:
        """Take up what a step paid.

        Args:
            infos: of the step.
            images_drawn: `[N]`, after it.
        """
        rows = torch.arange(len(self.reward))
        self.failures = self.failures.merged(infos.get("failures", Failures()))
        for name, paid in infos.get("paid", {}).items():
            if name == "reward":
                self.reward += paid
                continue
            # An image is counted by now, the image of a thought is not.
            number = images_drawn.cpu() - int(name == "round_reward")
            rewards = self.intermediate_rewards[name]
            rewards[rows, number.clamp(0, rewards.shape[1] - 1)] += paid
        for name, values in infos.get("components", {}).items():
            if name not in self.components:
                self.components[name] = torch.full_like(values, torch.nan)
            ended = infos["ended"]
            self.components[name][ended] = values[ended]


def rollout(
    env: InterleavedGenVectorEnv,
    actor: Actor,
    observation: dict[str, Tensor],
    watch: Watch | None = None,
) -> RolloutResult:
    """Play all rows to their end.

    Args:
        env: reset, with `observation` its first.
        actor: the policy.
        observation: of the reset.
        watch: called with each observation and decision before the step.
    """
    rows = env.num_envs
    images = env.episodes.rules.image_budget
    intermediate = {name: torch.zeros(rows, images) for name in INTERMEDIATE}
    result = RolloutResult(observation, torch.zeros(rows), {}, intermediate)
    actor.cache.prompt_budget = env.episodes.rules.prompt_budget
    over = bool((observation["phase"] == Phase.DONE).all())
    while not over:
        decision = actor.act(observation)
        if watch is not None:
            watch(observation, decision)
        observation, _, terminated, _, infos = env.step(decision.env_action, decision.active)
        result.add(infos, observation["images_drawn"])
        over = bool(terminated.all())
    result.observation = observation
    return result


class Recorder:
    """Keeps what training needs of each decision, written once into its final place.

    Args:
        rules: of the episodes.
        window: of the actor.
        rows: N.
        device: where latents and means live.
    """

    def __init__(self, rules: Rules, window: Window, rows: int, device: torch.device) -> None:
        images = rules.image_budget
        size = window.size
        self.rules = rules
        self.window = window
        latent = rules.latent_shape
        self.latents = torch.zeros(rows, images, size + 1, *latent, device=device)
        self.means = torch.zeros(rows, images, size, *latent, device=device)
        # Any falling times will do until the real ones are written: they keep an episode without
        # an image from dividing by zero.
        falling = torch.linspace(0.9, 0.5, size + 1)
        self.times = falling.repeat(rows, images, 1)
        self._words: list[tuple[Tensor, Tensor, Tensor]] = []

    def record(
        self, observation: dict[str, Tensor], decision: Decision, window_start: Tensor | None
    ) -> None:
        """Keep one decision: image steps in their place, words in a list, to be placed at once.

        Args:
            observation: that the decision was made on.
            decision: of the actor.
            window_start: `[N]`, the first stochastic step of each row.
        """
        if decision.log_prob is not None:
            # Kept as [N] each and placed at the end: one write in place of one a token.
            position = observation["num_tokens"] - observation["prompt_length"]
            self._words.append((position, decision.active, decision.log_prob))
            return
        assert decision.mean is not None
        assert window_start is not None
        # Which step of the window each row takes, [N]; outside it nothing is kept.
        index = observation["step"] - window_start
        inside = decision.active & (index >= 0) & (index < self.window.size)
        rows = inside.nonzero()[:, 0]
        if len(rows) == 0:
            return
        index = index[rows]
        image = observation["images_drawn"][rows]
        self._write(self.latents, (rows, image, index), observation["latent"])
        self._write(self.means, (rows, image, index), decision.mean)
        self._write(self.times, (rows, image, index), observation["t"][:, 0])
        # Behind the last step of the window stands the latent that it led to.
        last = index == self.window.size - 1
        if last.any():
            rows = rows[last]
            place = rows, image[last], torch.full_like(rows, self.window.size)
            self._write(self.latents, place, decision.next_latent)
            self._write(self.times, place, observation["next_t"][:, 0])

    @staticmethod
    def _write(target: Tensor, place: tuple[Tensor, Tensor, Tensor], values: Tensor) -> None:
        """Write `values[rows]` to `target[rows, image, index]`."""
        # Indices are made on the CPU; to wait for the device here would cost each step its time.
        rows, image, index = (part.to(target.device, non_blocking=True) for part in place)
        target[rows, image, index] = values.to(target.device)[rows]

    def finish(self, result: RolloutResult, seeds: Tensor, group: Tensor) -> Trajectory:
        """The episodes as a `Trajectory` of N rows.

        Args:
            result: of the rollout.
            seeds: `[N]` int64.
            group: `[N]` int64.
        """
        observation = result.observation
        device = self.latents.device
        rows = len(seeds)
        log_prob, chosen_mask = self._place_words(rows, device)
        images, pixels = stored_images(observation)
        positions = observation.get("image_positions", observation["tokens"][:, :0])
        components = {name: values.to(device) for name, values in result.components.items()}
        intermediate = result.intermediate_rewards
        return Trajectory(
            **{name: part.to(device) for name, part in self._split_tokens(observation).items()},
            chosen_mask=chosen_mask,
            log_prob=log_prob,
            window_latents=self.latents,
            window_means=self.means,
            window_times=self.times.to(device),
            images_drawn=observation["images_drawn"].to(device, copy=True),
            latent=observation["latent"].clone(),
            images=images.clone(),
            pixels=pixels.to(device, copy=True),
            image_positions=positions.to(device, copy=True),
            reward=result.reward.to(device),
            thought_reward=intermediate["thought_reward"].to(device),
            round_reward=intermediate["round_reward"].to(device),
            group=group.to(device),
            seed=seeds.to(device),
            components=TensorDict(components, [rows]),
            batch_size=[rows],
        )

    def _place_words(self, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Log-probabilities and mask of the chosen tokens, `[N, K]` each."""
        slots = self.rules.max_tokens - self.rules.prompt_budget
        log_prob = torch.zeros(rows, slots, device=device)
        chosen_mask = torch.zeros(rows, slots, dtype=torch.bool, device=device)
        if not self._words:
            return log_prob, chosen_mask
        # [steps, N] each
        position, active, log_probs = (
            torch.stack(parts).to(device) for parts in zip(*self._words, strict=True)
        )
        step, row = active.nonzero(as_tuple=True)
        place = row, position[step, row]
        log_prob[place] = log_probs[step, row]
        chosen_mask[place] = True
        return log_prob, chosen_mask

    def _split_tokens(self, observation: dict[str, Tensor]) -> dict[str, Tensor]:
        """The token buffer as prompt and what follows it."""
        tokens = observation["tokens"]
        roles = observation["roles"]
        lengths = observation["prompt_length"]
        budget = self.rules.prompt_budget
        beyond = torch.arange(budget, device=tokens.device) >= lengths[:, None]
        slots = torch.arange(self.rules.max_tokens - budget, device=tokens.device)
        count = (observation["num_tokens"] - lengths)[:, None]
        places = (lengths[:, None] + slots).clamp_(max=tokens.shape[1] - 1)
        return {
            "prompt_tokens": tokens[:, :budget].masked_fill(beyond, 0),
            "prompt_roles": roles[:, :budget].clone(),
            "prompt_length": lengths.clone(),
            "tokens": tokens.gather(1, places).masked_fill(slots >= count, 0),
            "roles": roles.gather(1, places),
            "text_mask": slots < count,
        }


class Collector:
    """Collects groups of episodes as a `Trajectory` with batch size [groups, group_size].

    Args:
        env: a vector env; its `copy` may be False.
        actor: the policy, with a window.
        group_size: episodes a prompt; `env.num_envs` must be a multiple of it.
        shared_noise: start the images of a group from the same x_1.

    Attributes:
        failures: why rewards could not score episodes of the last call, where they said so.

    Raises:
        ValueError: a group size that does not divide the env's rows, a group of one, an actor
            without a window, or a window that could touch the last image step.
    """

    def __init__(
        self,
        env: InterleavedGenVectorEnv,
        actor: Actor,
        group_size: int,
        *,
        shared_noise: bool = False,
    ) -> None:
        if group_size < 2:
            raise ValueError(
                f"expected group_size >= 2, got {group_size}: "
                "an episode is judged against the others of its group"
            )
        if env.num_envs % group_size:
            raise ValueError(
                f"expected num_envs to be a multiple of {group_size=}, got {env.num_envs}"
            )
        if actor.window is None:
            raise ValueError(
                "expected an actor with a window of stochastic steps, got None; "
                "an ODE leaves nothing to learn from"
            )
        if env.episodes.rules.image_budget:
            actor.window.check(env.episodes.rules.image_steps)
        self.env = env
        self.actor = actor
        self.window = actor.window
        self.group_size = group_size
        self.shared_noise = shared_noise
        self.failures = Failures()

    @property
    def groups(self) -> int:
        """Prompts a call."""
        return self.env.num_envs // self.group_size

    def collect(self, prompts: Sequence[Prompt], seed: int, iteration: int = 0) -> Trajectory:
        """Play one episode for each member of each prompt's group.

        The same arguments and weights give the same trajectories.

        Args:
            prompts: one a group.
            seed: of all noise.
            iteration: where a sliding window stands.

        Raises:
            ValueError: another number of prompts than groups.
        """
        if len(prompts) != self.groups:
            raise ValueError(f"expected {self.groups} prompts, one a group, got {len(prompts)}")
        env = self.env
        size = self.group_size
        device = env.episodes.state.latent.device
        # Spread by numpy, so that neighbouring seeds share no episode.
        seeds = np.random.SeedSequence(seed).generate_state(env.num_envs).astype(np.int64)
        image_seeds = seeds
        if self.shared_noise:
            image_seeds = seeds.reshape(-1, size)[:, :1].repeat(size, 1).ravel()
        generator = torch.Generator().manual_seed(int(seeds[0]))
        starts = self.window.draw(self.groups, generator, iteration).repeat_interleave(size)
        # The members of a group stand side by side.
        members = [prompt for prompt in prompts for _ in range(size)]
        observation, _ = env.reset(seed=image_seeds.tolist(), options={"prompts": members})
        self.actor.start(seeds.tolist(), starts)
        recorder = Recorder(env.episodes.rules, self.window, env.num_envs, device)

        def _watch(seen: dict[str, Tensor], decision: Decision) -> None:
            recorder.record(seen, decision, self.actor.window_start)

        result = rollout(env, self.actor, observation, _watch)
        self.failures = result.failures
        # The update needs the memory of all that was read.
        self.actor.cache.clear()
        group = torch.arange(self.groups).repeat_interleave(size)
        episodes = recorder.finish(result, torch.as_tensor(seeds), group)
        return episodes.unflatten(0, (self.groups, size))

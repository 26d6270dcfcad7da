"""The actor as a TorchRL policy."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.envs.utils import ExplorationType, exploration_type

from agents.policy.actor import Actor, Decision, Observation
from unigrpo_env.mdp.rules import Phase, Rules

OBSERVED = (
    "phase", "tokens", "roles", "num_tokens", "prompt_length", "legal_tokens", "latent", "step",
    "images_drawn", "t", "next_t",
)  # fmt: skip
"""Entries that the actor reads, as `InterleavedGenTorchRLEnv` names them."""
OBSERVED_IMAGES = ("images", "image_positions")
"""Entries that it also reads where images are read."""


class ActorPolicy(TensorDictModuleBase):
    """Reads the entries of `InterleavedGenTorchRLEnv`, and writes its action.

    It begins with fresh noise whenever `episode` or `seed` of a row changes, and reads everything
    anew when the weights have changed in place, as an optimiser changes them. Under
    `set_exploration_type(ExplorationType.DETERMINISTIC)` it takes the likeliest token and the step
    of the ODE.

    It writes `token` `[N]` int64, `next_latent` `[N, L, C]` float32, `active` `[N, 1]` bool, and
    for training `log_prob` `[N]` float32 of the token, `mean` `[N, L, C]` float32 of the next
    latent, and `window_start` `[N]` int64, the first stochastic step. `token`, `log_prob` and
    `mean` are 0 where a row waits or is in the other phase; `next_latent` is the latent there.

    Args:
        actor: chooses tokens and latents.
        rules: of the episodes.
        group_size: consecutive rows of one prompt, which share the place of the window.

    Attributes:
        iteration: where a sliding window stands; set it before each rollout.

    Raises:
        ValueError: a window that could touch the last image step.
    """

    def __init__(self, actor: Actor, rules: Rules, group_size: int = 1) -> None:
        super().__init__()
        if actor.window is not None and rules.image_budget:
            actor.window.check(rules.image_steps)
        self.observed: tuple[str, ...] = OBSERVED
        if rules.stored_images:
            self.observed = OBSERVED + OBSERVED_IMAGES
        if rules.has_pixels:
            self.observed = (*self.observed, "pixels")
        self.in_keys = [*self.observed, "seed", "episode"]
        self.out_keys = ["token", "next_latent", "active", "log_prob", "mean", "window_start"]
        self.actor = actor
        actor.cache.prompt_budget = rules.prompt_budget
        # A part of this module, so that TorchRL finds the weights.
        self.model = actor.model
        self.group_size = group_size
        self.iteration = 0
        self._last: tuple[Tensor, Tensor] | None = None
        self._version = -1

    @torch.no_grad()
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Add an action to the observation.

        Args:
            tensordict: the env's entries, batch size [N]; it is changed in place.
        """
        observation = {name: tensordict[name] for name in self.observed}
        self._begin_episodes(tensordict["seed"], tensordict["episode"])
        phase = observation["phase"]
        if (phase == Phase.DONE).all():
            decision = Decision(torch.zeros_like(phase, dtype=torch.bool), phase, phase)
        else:
            decision = self._act(observation)
        return self._write(tensordict, observation, decision)

    def _act(self, observation: Observation) -> Decision:
        actor = self.actor
        if exploration_type() not in (ExplorationType.DETERMINISTIC, ExplorationType.MODE):
            return actor.act(observation)
        temperature = actor.temperature
        window = actor.window
        actor.temperature = 0
        actor.window = None
        try:
            return actor.act(observation)
        finally:
            actor.temperature = temperature
            actor.window = window

    def _begin_episodes(self, seed: Tensor, episode: Tensor) -> None:
        """See which rows have begun anew, or whether the weights have changed."""
        begun = torch.ones_like(seed, dtype=torch.bool)
        if self._last is not None and self._last[0].shape == seed.shape:
            begun = (seed != self._last[0]) | (episode != self._last[1])
        self._last = seed.clone(), episode.clone()
        # Each change in place raises a tensor's version by one.
        version = sum(weight._version for weight in self.model.parameters())
        if begun.any():
            self.actor.start(seed.tolist(), self._window_starts(seed, begun))
        elif version != self._version:
            self.actor.cache.clear()
        self._version = version

    def _window_starts(self, seed: Tensor, begun: Tensor) -> Tensor | None:
        """`[N]` int64; a group's window moves when all its rows begin anew."""
        window = self.actor.window
        if window is None:
            return None
        rows = len(seed)
        if rows % self.group_size:
            raise ValueError(
                f"expected a multiple of group_size={self.group_size} rows, got {rows}; "
                "give env and policy the same group_size"
            )
        groups = rows // self.group_size
        # Where all rows begin, this draws what the trainer's collector draws.
        first = int(seed[begun.nonzero()[0, 0]])
        generator = torch.Generator().manual_seed(first)
        starts = window.draw(groups, generator, self.iteration)
        starts = starts.repeat_interleave(self.group_size)
        before = self.actor.window_start
        if before is None or before.shape != starts.shape:
            return starts
        whole = begun.view(groups, -1).all(1).repeat_interleave(self.group_size).cpu()
        return torch.where(whole, starts, before)

    def _write(
        self, tensordict: TensorDictBase, observation: Observation, decision: Decision
    ) -> TensorDictBase:
        phase = observation["phase"]
        latent = observation["latent"]
        # Everything is a new tensor: records must not change when the env goes on.
        token = torch.zeros_like(phase)
        log_prob = torch.zeros_like(latent[:, 0, 0])
        mean = torch.zeros_like(latent)
        next_latent = latent.clone()
        # The actor decides on the CPU; the env's entries may be on a device.
        active = decision.active.to(phase.device)
        if decision.log_prob is not None:
            token = torch.where(active, decision.token.to(phase.device), 0)
            log_prob = torch.where(active, decision.log_prob, 0)
        if decision.mean is not None:
            draws = active[:, None, None]
            # Rows that wait have divided by t = 0.
            mean = torch.where(draws, decision.mean, 0)
            next_latent = torch.where(draws, decision.next_latent, latent)
        window_start = self.actor.window_start
        if window_start is None:
            window_start = torch.zeros_like(phase)
        tensordict["token"] = token
        tensordict["next_latent"] = next_latent
        tensordict["active"] = active[:, None]
        tensordict["log_prob"] = log_prob
        tensordict["mean"] = mean
        tensordict["window_start"] = window_start.to(phase.device, copy=True)
        return tensordict

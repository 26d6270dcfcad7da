"""The policy as a function of the observation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from agents.models.base import UnifiedModel
from agents.policy.chunks import predict_velocity
from agents.policy.context_cache import ContextCache
from agents.policy.guidance import Guidance, guided
from agents.policy.noise import EpisodeNoise
from agents.policy.sde import KERNELS, Window, ode_step
from agents.policy.tokens import token_log_probs
from unigrpo_env.mdp.rules import Phase

Observation = dict[str, Tensor]
ON_DEVICE = {"legal_tokens", "latent", "images", "pixels"}
"""Entries that the vector env keeps on its device; by all others the actor decides what to do."""


@dataclass
class Decision:
    """What the actor chose for each row, and what a trainer wants to keep of it.

    Attributes:
        active: `[N]` bool, the rows that it acted for; the others wait. On the CPU, like `token`.
        token: `[N]` int64.
        next_latent: `[N, L, C]` float32, on the device, like all that follows.
        log_prob: `[N]` float32, of the token; None in the image phase.
        mean: `[N, L, C]` float32, of the next latent; None in the text phase.
    """

    active: Tensor
    token: Tensor
    next_latent: Tensor
    log_prob: Tensor | None = None
    mean: Tensor | None = None

    @property
    def env_action(self) -> dict[str, Tensor]:
        """What `env.step` takes, beside `active`."""
        return {"token": self.token, "next_latent": self.next_latent}


class Actor:
    """Chooses tokens and latents.

    It reads whatever the observation holds beyond what it has read, and starts over when the two
    disagree, so a fresh actor in mid-episode gives the same distribution. Rows whose thought is
    finished wait until all active rows are: every call runs one phase.

    Args:
        model: see `agents.models.base.UnifiedModel`.
        temperature: of the tokens; 0 takes the likeliest.
        window: where image steps are stochastic; None for the ODE throughout.
        noise_level: a of the kernel, inside the window.
        kernel: one of `agents.policy.sde.KERNELS`, or "ode" for no noise even inside the window.
        guidance: classifier-free guidance; None for none.

    Attributes:
        window_start: `[N]` int64, the first stochastic step of each row, on the CPU; None before
            the first.

    Raises:
        ValueError: a negative temperature, or an unknown kernel.
    """

    def __init__(
        self,
        model: UnifiedModel[Any],
        *,
        temperature: float = 1.0,
        window: Window | None = None,
        noise_level: float = 0.8,
        kernel: str = "flow_sde",
        guidance: Guidance | None = None,
    ) -> None:
        if temperature < 0:
            raise ValueError(f"expected temperature >= 0, got {temperature}")
        if kernel not in (*KERNELS, "ode"):
            known = ", ".join(KERNELS)
            raise ValueError(f"expected kernel to be one of {known} or ode, got {kernel!r}")
        self.model = guided(model, guidance)
        self.temperature = temperature
        self.window = window
        self.noise_level = noise_level
        # None for "ode": the step is then deterministic even inside the window.
        self.kernel = KERNELS.get(kernel)
        self.window_start: Tensor | None = None
        self.cache = ContextCache(self.model)
        self.noise: EpisodeNoise | None = None
        self._seeds: list[int] | None = None
        self._progress: tuple[Tensor, Tensor] | None = None

    def start(self, seeds: Sequence[int], window_start: Tensor | None = None) -> None:
        """Fix the noise of the coming episodes: all that is drawn for row i is keyed by `seeds[i]`.

        Call it for each batch of episodes, and after every change of the weights. Without a call
        the actor draws fresh noise whenever it sees that an episode has begun anew.

        Args:
            seeds: one a row.
            window_start: `[N]` int64, the first stochastic step of each row; its window's `low` if
                left out.
        """
        self._seeds = list(seeds)
        self.noise = None
        self.window_start = window_start
        if window_start is not None:
            self.window_start = window_start.cpu()
        # New weights, or new episodes: what was read is worth nothing.
        self.cache.clear()

    @torch.no_grad()
    def act(self, observation: Observation) -> Decision:
        """Choose for every row that can act in this call.

        Args:
            observation: the vector env's, as tensors.

        Raises:
            ValueError: another number of seeds than rows.
        """
        observation = _with_numbers_on_cpu(observation)
        # Without seeds nobody has told the actor that episodes begin anew.
        if self._seeds is None:
            self._detect_reset(observation)
        if self.cache.sync(observation) or self.noise is None:
            self._draw_noise(observation)
        text = observation["phase"] == Phase.TEXT
        # Text goes first: rows that have an image to draw wait until all thoughts are finished.
        if text.any():
            return self._sample_token(observation, text)
        return self._denoise(observation, observation["phase"] == Phase.IMAGE)

    def _detect_reset(self, observation: Observation) -> None:
        """Forget everything if some row has gone back: fewer tokens, or fewer steps at as many."""
        tokens = observation["num_tokens"]
        step = observation["step"]
        if self._progress is not None and self._progress[0].shape == tokens.shape:
            tokens_before, step_before = self._progress
            # An episode only grows: fewer tokens, or fewer steps at as many, belong to another one.
            fewer_steps = (tokens == tokens_before) & (step < step_before)
            if ((tokens < tokens_before) | fewer_steps).any():
                self.cache.clear()
        self._progress = tokens.clone(), step.clone()

    def _draw_noise(self, observation: Observation) -> None:
        tokens = observation["tokens"]
        rows = len(tokens)
        seeds = self._seeds
        if seeds is None:
            # From the global generator, so that torch.manual_seed makes a user's loop repeatable.
            seeds = torch.randint(2**31, (rows,)).tolist()
        if len(seeds) != rows:
            raise ValueError(
                f"expected {rows} seeds, one a row, got {len(seeds)}; call start() with one a row"
            )
        self.noise = EpisodeNoise(seeds, tokens.shape[1], tokens.device)

    def _sample_token(self, observation: Observation, active: Tensor) -> Decision:
        assert self.noise is not None
        # A row that waits has padding for its only legal token, and nobody reads what it draws.
        legal = observation["legal_tokens"].bool()
        temperature = self.temperature or 1.0
        log_probs = token_log_probs(self.cache.logits[:, 0], legal, temperature)
        length = observation["num_tokens"]
        if self.temperature == 0:
            token = log_probs.argmax(-1, keepdim=True)
        else:
            last = observation["tokens"].shape[1] - 1
            # [N, 1] float64: a float32 sum over a large vocabulary would shift rare tokens.
            uniform = self.noise.token_uniform(length[:, None].clamp(max=last))
            mass = log_probs.double().exp_().cumsum_(-1)
            # The first token whose cumulative mass reaches the uniform number.
            share = _on_device(uniform, mass.device)
            token = (mass < share * mass[:, -1:]).sum(-1, keepdim=True)
        chosen = log_probs.gather(1, token)[:, 0]
        # The one place where a step waits for the device.
        token = token.cpu()
        self.cache.expect(token, active, length)
        return Decision(active, token[:, 0], observation["latent"], log_prob=chosen)

    def _denoise(self, observation: Observation, active: Tensor) -> Decision:
        x = observation["latent"]
        t = _on_device(observation["t"][:, 0], x.device)
        next_t = _on_device(observation["next_t"][:, 0], x.device)
        # [N, L, C]
        velocity = self._velocity(x, t, active)
        inside = self._inside_window(observation["step"])
        if self.kernel is not None and inside is not None and bool(inside.any()):
            # Rows outside their window get noise level 0, which is the step of the ODE.
            level = _on_device(self.noise_level * inside, x.device)
            step = self.kernel(x, velocity, t, next_t, level)
            mean = step.mean
            next_latent = step.sample(self._step_noise(observation))
        else:
            mean = ode_step(x, velocity, t, next_t)
            next_latent = mean
        # The env reads the token in the text phase alone; any legal integer will do here.
        no_token = torch.zeros_like(observation["phase"])
        return Decision(active, no_token, next_latent, mean=mean)

    def _velocity(self, x: Tensor, t: Tensor, active: Tensor) -> Tensor:
        """`[N, L, C]` of the `active` rows; 0 elsewhere."""
        assert self.cache.context is not None
        # The whole context can be used as it is, without a copy of its rows.
        if bool(active.all()):
            return predict_velocity(self.model, self.cache.context, x, t)
        rows, context = self.cache.rows(active)
        velocity = predict_velocity(self.model, context, x[rows], t[rows])
        return torch.zeros_like(x).index_copy(0, rows, velocity)

    def _inside_window(self, step: Tensor) -> Tensor | None:
        """Whether each row's step is stochastic, `[N]` bool; None without a window."""
        if self.window is None:
            return None
        if self.window_start is None or self.window_start.shape != step.shape:
            self.window_start = torch.full_like(step, self.window.low)
        start = self.window_start
        return (step >= start) & (step < start + self.window.size)

    def _step_noise(self, observation: Observation) -> Tensor:
        """Standard normal noise `[N, L, C]` for this step."""
        assert self.window is not None
        assert self.window_start is not None
        assert self.noise is not None
        x = observation["latent"]
        # The number of images in the stream tells the images of one episode apart.
        images_before = [0] * len(x)
        if "image_positions" in observation:
            images_before = (observation["image_positions"] >= 0).sum(1).tolist()
        size = self.window.size
        index = (observation["step"] - self.window_start).clamp(0, size - 1)
        return self.noise.step_noise(images_before, _on_device(index, x.device), size, x)


def _with_numbers_on_cpu(observation: Observation) -> Observation:
    """The observation as the vector env gives it: all but `ON_DEVICE` on the CPU."""
    if observation["phase"].device.type == "cpu":
        return observation
    moved = dict(observation)
    for name in observation.keys() - ON_DEVICE:
        moved[name] = observation[name].cpu()
    return moved


def _on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A small tensor on the device of the model, without waiting for it."""
    return tensor.to(device, non_blocking=True)

"""The policy as a function of the observation; its cache is a memo."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from agents.flow import KERNELS, Window, ode_step
from agents.guidance import Guidance, guided
from agents.models.seam import Context, UnifiedModel
from unigrpo_env.mdp import Phase, keyed_noise

TOKEN_NOISE, STEP_NOISE = 1_000_001, 1_000_002
"""Keys of an episode's noise for tokens and, one for each image, for SDE steps; the env's own keys are image numbers."""


@dataclass
class Decision:
    """What the actor chose for each row, and what a trainer wants to remember of it.

    Attributes:
        active: `[N]` bool, the rows it acted for; the others wait.
        token: `[N]` int64.
        latent: `[N, L, C]` float32.
        log_prob: `[N]` float32, of the token; None in the image phase.
        mean: `[N, L, C]` float32, of the latent; None in the text phase.
    """

    active: Tensor
    token: Tensor
    latent: Tensor
    log_prob: Tensor | None = None
    mean: Tensor | None = None

    @property
    def env_action(self) -> dict[str, Tensor]:
        """What `env.step` takes, beside `active`."""
        return {"token": self.token, "latent": self.latent}


def token_log_probs(logits: Tensor, legal: Tensor, temperature: float) -> Tensor:
    """Log-probabilities `[..., V]` float32 of the next token; used alike in rollout and in training.

    Args:
        logits: `[..., V]`.
        legal: bool, broadcastable to them; the rest gets -inf and the legal ones are renormalised.
        temperature: logits are divided by it.
    """
    logits = logits.float() if temperature == 1 else logits.float() / temperature
    return logits.masked_fill(~legal, -torch.inf).log_softmax(-1)


def read_prompts(
    model: UnifiedModel[Any], ids: Tensor, lengths: Tensor, sources: Tensor | None = None, *, learn: bool = True
) -> tuple[Tensor, Context]:
    """Read each different prompt once, pictures and words, and hand it to all rows that share it.

    Args:
        model: the model.
        ids: `[N, P]` int64, equal beyond `lengths` for equal prompts; one token for each source stands first.
        lengths: `[N]` int64.
        sources: `[N, S, L, C]`, clean latents that the words follow; none if left out.
        learn: whether gradients reach their reading.

    Returns:
        Logits after the prompt, `[N, 1, V]`, and a context of N rows.
    """
    count = 0 if sources is None else sources.shape[1]
    if sources is not None and count:
        _, look = torch.unique(sources.flatten(1), dim=0, return_inverse=True)
        ids = torch.cat([look[:, None], ids], 1)  # which sources a prompt has is a part of what it is
    unique, inverse = torch.unique(torch.cat([lengths[:, None], ids], 1), dim=0, return_inverse=True)
    context = model.start(len(unique))
    if sources is not None and count:
        rows = torch.arange(len(ids), device=ids.device)
        member = torch.zeros(len(unique), dtype=torch.int64, device=ids.device).scatter(0, inverse, rows)
        for number in range(count):
            context = model.read_image(context, sources[member, number], learn=learn)
        unique = torch.cat([unique[:, :1] - count, unique[:, 2 + count :]], 1)
    lengths, ids = unique[:, 0], unique[:, 1:]
    longest = int(lengths.max())
    mask = torch.arange(longest, device=ids.device) < lengths[:, None]
    logits, context = model.read_text(context, ids[:, :longest], mask, last_only=True)
    return logits[inverse], context.select(inverse)


class Actor:
    """Chooses tokens and latents.

    It reads whatever the observation holds beyond what it has read, and starts over when the two disagree, so a fresh actor in mid-episode gives the same
    distribution. Rows whose thought is finished wait until all active rows do: every call runs one phase.

    Args:
        model: see `agents.models.seam.UnifiedModel`.
        temperature: of the tokens; 0 takes the likeliest.
        window: where image steps are stochastic; None for the ODE throughout.
        noise_level: a of the kernel, inside the window.
        kernel: one of `agents.flow.KERNELS`, or "ode" for no noise even inside the window.
        guidance: classifier-free guidance; None for none.

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
            raise ValueError(f"expected kernel to be one of {', '.join(KERNELS)} or ode, got {kernel!r}")
        self.model, self.temperature, self.window, self.noise_level = guided(model, guidance), temperature, window, noise_level
        self.kernel = None if kernel == "ode" else KERNELS[kernel]
        self.window_start: Tensor | None = None
        self._context: Context | None = None
        self._few: tuple[Tensor, Tensor, Context] | None = None
        self._seeds: list[int] | None = None
        self._last: tuple[Tensor, Tensor] | None = None

    def start(self, seeds: Sequence[int], window_start: Tensor | None = None) -> None:
        """Fix the noise of the coming episodes: all an actor draws for row i is keyed by `seeds[i]`.

        Call it for each batch of episodes, and after every change of the weights. Without a call the actor draws fresh noise whenever it sees that an episode has begun anew.

        Args:
            seeds: one a row.
            window_start: `[N]` int64, the first stochastic step of each row; its window's `low` if left out.
        """
        self._seeds, self.window_start, self._context = list(seeds), window_start, None

    @torch.no_grad()
    def act(self, observation: dict[str, Tensor]) -> Decision:
        """Choose for every row that can act in this call; `observation` is the vector env's."""
        if self._seeds is None:
            self._notice_new_episodes(observation)
        self._catch_up(observation)
        text = observation["phase"] == Phase.TEXT
        if text.any():
            return self._write(observation, text)
        return self._draw(observation, observation["phase"] == Phase.IMAGE)

    def _notice_new_episodes(self, observation: dict[str, Tensor]) -> None:
        """Forget everything if some row has gone back: fewer tokens, or fewer steps without a token more."""
        words, step = observation["num_tokens"], observation["step"]
        if self._last is not None and self._last[0].shape == words.shape:
            fewer = (words < self._last[0]) | ((words == self._last[0]) & (step < self._last[1]))
            if fewer.any():
                self._context = None
        self._last = words.clone(), step.clone()

    def _begin(self, observation: dict[str, Tensor]) -> None:
        rows, device = len(observation["phase"]), observation["tokens"].device
        lengths = observation["prompt_length"]
        longest = int(lengths.max())
        beyond = torch.arange(longest, device=device) >= lengths[:, None]
        prompts = observation["tokens"][:, :longest].masked_fill(beyond, 0)
        self._pictures = observation.get("images", prompts[:, :0]).clone()
        sources = None
        if "images" in observation:
            within = (observation["image_places"] >= 0) & (observation["image_places"] < lengths[:, None])
            sources = observation["images"][:, : int(within.sum(1).max())]
        self._logits, self._context = read_prompts(self.model, prompts, lengths, sources)
        self._few = None
        # What the context holds: `_read` tokens of `_seen`. What the next observation should add to it: `_written`, up to `_foreseen` tokens.
        self._seen, self._read = observation["tokens"].clone(), lengths.clone()
        self._foreseen, self._written = self._read, (self._seen[:, :0], beyond[:, :0])
        self._places = torch.arange(observation["tokens"].shape[1], device=device)
        seeds = self._seeds if self._seeds is not None else torch.randint(2**31, (rows,)).tolist()
        if len(seeds) != rows:
            raise ValueError(f"expected {rows} seeds, one a row, got {len(seeds)}; call start() with one a row")
        self._seeds_used = seeds
        # One uniform number a token, in (0, 1], inverts the cumulative distribution, whatever the vocabulary.
        normal = keyed_noise([(seed, TOKEN_NOISE) for seed in seeds], (len(self._places),))
        self._uniform = torch.special.ndtr(normal.double()).clamp_(min=1e-300).to(device)
        self._noise: Tensor | None = None
        self._noise_of: list[int] = []

    def _catch_up(self, observation: dict[str, Tensor]) -> None:
        """Bring the context to what the observation says."""
        tokens, count = observation["tokens"], observation["num_tokens"]
        if self._context is None or self._context.batch_size != len(tokens) or self._seen.shape != tokens.shape:
            self._begin(observation)
        if torch.equal(self._seen, tokens) and torch.equal(self._foreseen, count):
            # What was written last, and nothing else, is new.
            ids, mask, self._read = *self._written, self._foreseen
            self._read_text(ids, mask)
        else:
            if self._changed(observation):
                self._begin(observation)
            self._read_on(observation)
            self._seen.copy_(tokens)
            self._foreseen = self._read
        self._written = tokens[:, :0], tokens[:, :0].bool()

    def _changed(self, observation: dict[str, Tensor]) -> bool:
        """Is what was read no longer what the observation says?"""
        before = self._places < self._read[:, None]
        if ((self._seen != observation["tokens"]) & before).any() or (observation["num_tokens"] < self._read).any():
            return True
        if "images" not in observation:
            return False
        looked_at = (observation["image_places"] >= 0) & (observation["image_places"] < self._read[:, None])
        return bool((observation["images"] != self._pictures)[looked_at].any())

    def _read_on(self, observation: dict[str, Tensor]) -> None:
        """Read all that is new: words up to the next picture, the picture, and on."""
        tokens, count, places = observation["tokens"], observation["num_tokens"], observation.get("image_places")
        self._read = self._read.clone()
        while True:
            stop = count if places is None else places.masked_fill(places < self._read[:, None], tokens.shape[1]).amin(1).minimum(count)
            slots = self._places[: int((stop - self._read).max())]
            mask = slots < (stop - self._read)[:, None]
            self._read_text(tokens.gather(1, (self._read[:, None] + slots).clamp_(max=tokens.shape[1] - 1)), mask)
            self._read.copy_(stop)
            looks = stop < count
            if places is None or not looks.any():
                return
            number = (places == stop[:, None]).int().argmax(1)
            self._pictures.copy_(observation["images"])
            self._few = None
            assert self._context is not None
            latent = observation["images"][torch.arange(len(tokens), device=tokens.device), number]
            self._context = self.model.read_image(self._context, latent, mask=looks)
            self._read += looks

    def _read_text(self, ids: Tensor, mask: Tensor) -> None:
        if ids.shape[1] == 0:
            return
        self._few = None
        assert self._context is not None
        logits, self._context = self.model.read_text(self._context, ids, mask, last_only=True)
        self._logits = torch.where(mask[:, :1, None], logits, self._logits)

    def _write(self, observation: dict[str, Tensor], active: Tensor) -> Decision:
        # A waiting row has no legal token; it gets a harmless distribution, and nobody reads its draw.
        legal = observation["legal_tokens"].bool() | ~active[:, None]
        log_probs = token_log_probs(self._logits[:, 0], legal, self.temperature or 1.0)
        place = observation["num_tokens"][:, None].clamp(max=len(self._places) - 1)
        if self.temperature == 0:
            token = log_probs.argmax(-1, keepdim=True)
        else:
            mass = log_probs.double().exp().cumsum(-1)
            token = (mass < self._uniform.gather(1, place) * mass[:, -1:]).sum(-1, keepdim=True)
        self._written = token, active[:, None]
        self._seen.scatter_(1, place, torch.where(active[:, None], token, self._seen.gather(1, place)))
        self._foreseen = observation["num_tokens"] + active
        return Decision(active, token[:, 0], observation["latent"], log_prob=log_probs.gather(1, token)[:, 0])

    def _draw(self, observation: dict[str, Tensor], active: Tensor) -> Decision:
        x, t, next_t = observation["latent"], observation["t"], observation["next_t"]
        velocity = self._velocity(x, t, active)
        inside = self._inside_window(observation["step"])
        stochastic = inside is not None and bool(inside.any())
        if stochastic and self.kernel is not None:
            step = self.kernel(x, velocity, t, next_t, self.noise_level * inside)  # type: ignore[operator]
            mean, latent = step.mean, step.sample(self._step_noise(observation))
        else:
            mean = latent = ode_step(x, velocity, t, next_t)
        return Decision(active, torch.zeros_like(observation["phase"]), latent, mean=mean)

    def _velocity(self, x: Tensor, t: Tensor, active: Tensor) -> Tensor:
        """Of the `active` rows; 0 elsewhere. A few rows get a context of their own for as long as they draw."""
        assert self._context is not None
        if bool(active.all()):
            return self.model.velocity(self._context, x, t)
        if self._few is None or not torch.equal(self._few[0], active):
            rows = active.nonzero()[:, 0]
            self._few = active.clone(), rows, self._context.select(rows)
        _, rows, context = self._few
        return torch.zeros_like(x).index_copy(0, rows, self.model.velocity(context, x[rows], t[rows]))

    def _inside_window(self, step: Tensor) -> Tensor | None:
        """`[N]` bool, is each row's step stochastic; None without a window."""
        if self.window is None:
            return None
        if self.window_start is None or self.window_start.shape != step.shape:
            self.window_start = torch.full_like(step, self.window.low)
        return (step >= self.window_start) & (step < self.window_start + self.window.size)

    def _step_noise(self, observation: dict[str, Tensor]) -> Tensor:
        """Standard normal noise `[N, L, C]` for this step, one keyed draw a window."""
        assert self.window is not None
        assert self.window_start is not None
        latent, size = observation["latent"], self.window.size
        drawn = (observation["image_places"] >= 0).sum(1).tolist() if "image_places" in observation else [0] * len(latent)
        if self._noise is None or drawn != self._noise_of:
            self._noise_of = drawn
            keys = [(seed, STEP_NOISE + number) for seed, number in zip(self._seeds_used, drawn, strict=True)]
            self._noise = keyed_noise(keys, (size, *latent.shape[1:])).flatten(0, 1).to(latent.device)
        index = (observation["step"] - self.window_start).clamp(0, size - 1)
        return self._noise.index_select(0, torch.arange(len(latent), device=latent.device) * size + index)

"""An iteration of UniGRPO written by hand: what the library's own loop is measured against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from agents.models.base import Context, UnifiedModel
from agents.training.trainer import Trainer
from rewards import REWARDS, EpisodeBatch

W = 3
NOISE_LEVEL = 0.8
OPEN_IMAGE = 2
"""The token that opens an image in the shapes world."""


@dataclass
class BareEpisodes:
    """What the bare loop keeps of N episodes; shapes as in `examples/unigrpo_loop.py`."""

    tokens: Tensor
    text_mask: Tensor
    log_prob: Tensor
    latents: Tensor
    means: Tensor
    times: Tensor
    reward: Tensor


class Bare:
    """The same model calls written by hand: no env, no actor, no collector, no trainer."""

    def __init__(self, trainer: Trainer, seed: int) -> None:
        self.model = trainer.model
        self.reference = trainer.reference
        self.groups = trainer.config.trainer.groups
        self.size = trainer.config.trainer.group_size
        self.rows = self.groups * self.size
        self.group = torch.arange(self.groups).repeat_interleave(self.size)
        self.processor = trainer.processor
        rules = trainer.variant.rules
        self.legal = rules.legal_tokens()
        self.times = rules.time_tensor()
        self.budget = rules.text_budget
        self.prompts = trainer.variant.task.prompts("train", self.groups, seed)
        self._encode_prompts(trainer)
        self._take_noise(trainer, seed)
        groups = [
            {"params": parameters, "lr": 1e-9}
            for parameters in self.model.parameters_by_expert().values()
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), eps=1e-12, weight_decay=0)

    def _encode_prompts(self, trainer: Trainer) -> None:
        encoded = [trainer.env.episodes.encode(prompt).tokens for prompt in self.prompts]
        longest = max(map(len, encoded))
        padded = [row + [0] * (longest - len(row)) for row in encoded]
        lengths = torch.tensor([[len(row)] for row in encoded])
        self.ids = torch.tensor(padded)
        self.mask = torch.arange(longest) < lengths

    def _take_noise(self, trainer: Trainer, seed: int) -> None:
        """The draws that the actor made for these episodes, so that both write the same words."""
        trainer.collector.collect(self.prompts, seed)
        actor = trainer.collector.actor
        length = trainer.env.episodes.state.prompt_length[:, None]
        assert actor.noise is not None
        assert actor.window_start is not None
        self.uniform = actor.noise.token_uniform(length + torch.arange(self.budget))
        self.starts = actor.window_start

    @torch.no_grad()
    def collect(self) -> BareEpisodes:
        n = self.rows
        tokens = torch.zeros(n, self.budget + 1, dtype=torch.long)
        log_prob = torch.zeros(n, self.budget + 1)
        text_mask = torch.zeros(n, self.budget + 1, dtype=torch.bool)
        context = self._write(tokens, log_prob, text_mask)
        latents = torch.zeros(n, W + 1, 36, 48)
        means = torch.zeros(n, W, 36, 48)
        times = torch.zeros(n, W + 1)
        x = self._draw(context, latents, means, times)
        reward = self._score(tokens, x)
        return BareEpisodes(tokens, text_mask, log_prob, latents, means, times, reward)

    def _write(self, tokens: Tensor, log_prob: Tensor, text_mask: Tensor) -> Context:
        model = self.model
        n = self.rows
        logits, context = self._read_prompts(model)
        open_rows = torch.ones(n, dtype=torch.bool)
        for k in range(self.budget + 1):
            log_probs = logits[:, 0].masked_fill(~self.legal, -torch.inf).log_softmax(-1)
            if k == self.budget:
                token = torch.full((n,), OPEN_IMAGE)
            else:
                mass = log_probs.double().exp().cumsum(-1)
                token = (mass < self.uniform[:, k : k + 1] * mass[:, -1:]).sum(-1)
            tokens[:, k] = torch.where(open_rows, token, 0)
            text_mask[:, k] = open_rows
            log_prob[:, k] = log_probs.gather(1, token[:, None])[:, 0]
            still = open_rows & (token != OPEN_IMAGE)
            if not still.any():
                break
            # As the actor: a token is read when the next is wanted, and the opening token when the
            # image begins.
            logits, context = model.append_text(context, token[:, None], still[:, None])
            open_rows = still
        opening = torch.full((n, 1), OPEN_IMAGE)
        every = torch.ones(n, 1, dtype=torch.bool)
        _, context = model.append_text(context, opening, every)
        return context

    def _read_prompts(self, model: UnifiedModel[Any]) -> tuple[Tensor, Context]:
        """Logits of the first token of each episode `[N, 1, V]`, and the context before it."""
        empty = model.empty_context(self.groups)
        hidden, context = model.append_hidden(empty, self.ids, self.mask)
        last = self.mask.sum(1) - 1
        logits = model.compute_logits(hidden[torch.arange(self.groups), last, None])
        return logits[self.group], context.select(self.group)

    def _draw(self, context: Context, latents: Tensor, means: Tensor, times: Tensor) -> Tensor:
        n = self.rows
        every = torch.arange(n)
        x = torch.randn(n, 36, 48)
        noise = torch.randn(n, W, 36, 48)
        for i in range(len(self.times) - 1):
            t = self.times[i]
            next_t = self.times[i + 1]
            velocity = self.model.predict_velocity(context, x, t.expand(n))
            w = i - self.starts
            inside = (w >= 0) & (w < W)
            if not inside.any():
                x = x + velocity * (next_t - t)
                continue
            clamped = next_t if t == 1 else t
            variance = (NOISE_LEVEL * inside) ** 2 * clamped / (1 - clamped)
            dt = next_t - t
            keep = (1 + variance / (2 * t) * dt)[:, None, None]
            push = ((1 + variance * (1 - t) / (2 * t)) * dt)[:, None, None]
            mean = keep * x + push * velocity
            rows = inside.nonzero()[:, 0]
            latents[rows, w[rows]] = x[rows]
            means[rows, w[rows]] = mean[rows]
            times[rows, w[rows]] = t
            std = (variance * -dt).sqrt()[:, None, None]
            x = mean + std * noise[every, w.clamp(0, W - 1)]
            last = (w == W - 1).nonzero()[:, 0]
            latents[last, W] = x[last]
            times[last, W] = next_t
        return x

    def _score(self, tokens: Tensor, x: Tensor) -> Tensor:
        texts = [self.processor.decode_text(row) for row in tokens.tolist()]
        prompts = [prompt for prompt in self.prompts for _ in range(self.size)]
        batch = EpisodeBatch(
            [prompt.text for prompt in prompts],
            texts,
            self.processor.decode_latents(x),
            [prompt.metadata for prompt in prompts],
        )
        return REWARDS["shapes"](batch)["reward"]

    def forward(self, model: UnifiedModel[Any], episodes: BareEpisodes) -> tuple[Tensor, Tensor]:
        longest = int(episodes.text_mask.sum(1).max())
        logits, context = self._read_prompts(model)
        tokens = episodes.tokens[:, :longest]
        later, context = model.append_text(context, tokens, episodes.text_mask[:, :longest])
        logits = torch.cat([logits, later[:, :-1]], 1)
        log_probs = logits.masked_fill(~self.legal, -torch.inf).log_softmax(-1)
        chosen = log_probs.gather(2, tokens[..., None])[..., 0]
        log_prob = F.pad(chosen, (0, self.budget + 1 - longest))
        x = episodes.latents[:, :W].flatten(0, 1)
        t = episodes.times[:, :W].flatten()
        velocity = model.predict_velocity(context.repeat_interleave(W), x, t)
        return log_prob, velocity.unflatten(0, (self.rows, W))

    def iterate(self) -> None:
        episodes = self.collect()
        advantage = self._advantage(episodes.reward)
        log_prob, velocity = self.forward(self.model, episodes)
        loss = text_loss(episodes, log_prob, advantage) + image_loss(episodes, velocity, advantage)
        if self.reference is not None:
            with torch.no_grad():
                _, reference = self.forward(self.reference, episodes)
            loss = loss + 1e-9 * ((velocity - reference) ** 2).mean((1, 2, 3))
        self.optimizer.zero_grad()
        loss.mean().backward()
        for parameters in self.model.parameters_by_expert().values():
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        self.optimizer.step()

    def _advantage(self, reward: Tensor) -> Tensor:
        groups = reward.view(self.groups, self.size)
        std = groups.std(1, keepdim=True, correction=0).clamp(min=1e-6)
        return ((groups - groups.mean(1, keepdim=True)) / std).flatten()[:, None]


def text_loss(episodes: BareEpisodes, log_prob: Tensor, advantage: Tensor) -> Tensor:
    likelihood = (log_prob - episodes.log_prob).exp()
    clipped = likelihood.clamp(0.8, 1.2)
    surrogate = torch.minimum(likelihood * advantage, clipped * advantage)
    return -(surrogate * episodes.text_mask).sum(1) / episodes.text_mask.sum(1)


def image_loss(episodes: BareEpisodes, velocity: Tensor, advantage: Tensor) -> Tensor:
    t = episodes.times[:, :W]
    next_t = episodes.times[:, 1:]
    clamped = torch.where(t < 1, t, next_t)
    variance = NOISE_LEVEL**2 * clamped / (1 - clamped)
    dt = next_t - t
    keep = (1 + variance / (2 * t) * dt)[..., None, None]
    push = ((1 + variance * (1 - t) / (2 * t)) * dt)[..., None, None]
    mean = keep * episodes.latents[:, :W] + push * velocity
    product = (episodes.means - mean) * (episodes.latents[:, 1:] - episodes.means)
    likelihood = (-product.mean((2, 3)) / (variance * -dt).sqrt()).exp()
    clipped = likelihood.clamp(1 - 1e-4, 1 + 1e-4)
    return -torch.minimum(likelihood * advantage, clipped * advantage).mean(1)

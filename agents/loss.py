"""Trajectories in, losses out: the training pass and the TorchRL module around the objectives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn
from torchrl.objectives import LossModule

from agents.actor import read_prompts, token_log_probs
from agents.flow import sde_step
from agents.models.seam import Context, UnifiedModel
from agents.objectives import clip_fraction, image_loss, plain_log_ratio, ratio_norm, text_loss, velocity_mse


@dataclass
class Replay:
    """What a model says of recorded episodes. Shapes as in `Collector`, with N episodes.

    Attributes:
        log_prob: `[N, K]` float32, of each token.
        entropy: `[N, K]` float32, of the distribution it was drawn from, in nats; carries no gradient.
        velocity: `[N, W, L, C]` float32, at the stochastic steps; None if it was not asked for.
    """

    log_prob: Tensor
    entropy: Tensor
    velocity: Tensor | None


def replay(
    model: UnifiedModel[Any],
    episodes: TensorDictBase,
    legal_tokens: Tensor,
    *,
    temperature: float = 1.0,
    through_context: bool = True,
    look: bool = True,
) -> Replay:
    """Read recorded episodes once, teacher-forced: all tokens' log-probabilities and all stochastic steps' velocities from one context.

    Args:
        model: the four verbs.
        episodes: N trajectories.
        legal_tokens: `[V]` bool, as in the rollout.
        temperature: as in the rollout.
        through_context: False cuts the velocities' gradient into the text that they were drawn after.
        look: False leaves the velocities out, where text alone is learnt.
    """
    logits, context = read_episodes(model, episodes)
    tokens, longest = episodes["tokens"], logits.shape[1]
    log_probs = token_log_probs(logits, legal_tokens, temperature)
    # A forced opening token was never a choice, and any token may be padding: those log-probs are read by nobody.
    log_prob = log_probs.gather(2, tokens[:, :longest, None])[..., 0]
    with torch.no_grad():
        entropy = -(log_probs.exp() * log_probs.masked_fill(~legal_tokens, 0)).sum(-1)
    unused = (0, tokens.shape[1] - longest)
    found = Replay(nn.functional.pad(log_prob, unused), nn.functional.pad(entropy, unused), None)
    if look:
        found.velocity = window_velocities(model, context if through_context else context.detach(), episodes)
    return found


def read_episodes(model: UnifiedModel[Any], episodes: TensorDictBase) -> tuple[Tensor, Context]:
    """Logits `[N, T, V]` of the first T tokens said, T the longest thought, and the context at which each image opened."""
    logits, context = read_prompts(model, episodes["prompt_tokens"], episodes["prompt_length"])
    mask = episodes["text_mask"]
    longest = int(mask.sum(1).max())
    if longest == 0:
        return logits[:, :0], context
    later, context = model.read_text(context, episodes["tokens"][:, :longest], mask[:, :longest])
    return torch.cat([logits, later[:, :-1]], 1), context


def window_velocities(model: UnifiedModel[Any], context: Context, episodes: TensorDictBase) -> Tensor:
    """Velocities `[N, W, L, C]` at the stochastic steps."""
    latents, times = episodes["window_latents"][:, :-1], episodes["window_times"][:, :-1]
    return model.velocity(context.repeat(times.shape[1]), latents.flatten(0, 1), times.flatten()).unflatten(0, times.shape)


def window_means(episodes: TensorDictBase, velocity: Tensor, noise_level: float) -> tuple[Tensor, Tensor]:
    """Means `[N, W, L, C]` and stds `[N, W]` of the stochastic steps under a velocity."""
    times, shape = episodes["window_times"], velocity.shape[:2]
    step = sde_step(
        episodes["window_latents"][:, :-1].flatten(0, 1),
        velocity.flatten(0, 1),
        times[:, :-1].flatten(),
        times[:, 1:].flatten(),
        noise_level,
    )
    return step.mean.unflatten(0, shape), step.std.unflatten(0, shape)


class UniGRPOLoss(LossModule):
    """Equation (7): text loss + image_weight * image loss + velocity_weight * velocity penalty.

    Reads the keys of `Collector`'s layout and two more, `[N]` each: `advantage`, and `weight`, an episode's share in the mean (1 / episodes of the update, 0 for one without
    a score). The losses are sums under these weights, so an update does not depend on how it is split into micro-batches.

    Of TorchRL's own GRPO parts this uses the frame alone: its `GRPOLoss` knows token log-probs of one sequence model, and has no room for latents.

    Args:
        model: the policy.
        reference: the frozen model of equation (8); None for no penalty.
        legal_tokens: `[V]` bool.
        temperature: of the rollout.
        noise_level: a of equation (3), of the rollout.
        text_weight, image_weight, velocity_weight: of the three terms; lambda and the MSE weight of the paper are the last two.
        text_clip, image_clip: eps of (2) and of (6).
        ratio: `norm` for equation (5), `plain` for (4).
        through_context: whether the image terms reach the text that the image was drawn after.
    """

    in_keys = (
        "prompt_tokens", "prompt_length", "tokens", "text_mask", "chosen_mask", "log_prob",
        "window_latents", "window_means", "window_times", "has_image", "advantage", "weight",
    )  # fmt: skip
    out_keys = (
        "loss_text", "loss_image", "loss_velocity",
        "entropy", "text_clip_fraction", "image_clip_fraction", "text_log_ratio", "image_log_ratio",
    )  # fmt: skip

    def __init__(
        self,
        model: UnifiedModel[Any],
        reference: UnifiedModel[Any] | None,
        legal_tokens: Tensor,
        *,
        temperature: float = 1.0,
        noise_level: float = 0.8,
        text_weight: float = 1.0,
        image_weight: float = 1.0,
        velocity_weight: float = 0.0,
        text_clip: float = 0.2,
        image_clip: float = 1e-4,
        ratio: Literal["norm", "plain"] = "norm",
        through_context: bool = True,
    ) -> None:
        super().__init__()
        if velocity_weight and reference is None:
            raise ValueError(f"expected a reference model for {velocity_weight=}, got None; give one or set the weight to 0")
        self.model = model
        self.__dict__["reference"] = reference  # not a part of this module: it must not be trained, moved or saved with it
        self.register_buffer("legal_tokens", legal_tokens)
        self.temperature, self.noise_level = temperature, noise_level
        self.text_weight, self.image_weight, self.velocity_weight = text_weight, image_weight, velocity_weight
        self.text_clip, self.image_clip = text_clip, image_clip
        self.log_ratio = {"norm": ratio_norm, "plain": plain_log_ratio}[ratio]
        self.through_context = through_context

    def forward(self, tensordict: TensorDictBase) -> TensorDict:
        """Losses (to be summed and minimised) and detached metrics, all scalars.

        Metrics: `entropy`, mean over chosen tokens, nats. `*_clip_fraction`, the share of ratios whose gradient the clip cuts off. `*_log_ratio`,
        the largest |log ratio|: rounding error alone before the first update on a batch.
        """
        now = replay(
            self.model,
            tensordict,
            self.legal_tokens,
            temperature=self.temperature,
            through_context=self.through_context,
            look=bool(self.image_weight or self.velocity_weight),
        )
        advantage, weight, chosen = tensordict["advantage"], tensordict["weight"], tensordict["chosen_mask"]
        text = text_loss(now.log_prob, tensordict["log_prob"], advantage, chosen, self.text_clip)
        log_ratio = torch.zeros_like(tensordict["window_times"][:, 1:])
        if now.velocity is not None:
            mean, std = window_means(tensordict, now.velocity, self.noise_level)
            log_ratio = self.log_ratio(tensordict["window_latents"][:, 1:], mean, tensordict["window_means"], std)
            log_ratio = torch.where(tensordict["has_image"][:, None], log_ratio, 0)
        image = image_loss(log_ratio, advantage, self.image_clip)
        penalty = torch.zeros_like(image)
        if self.velocity_weight and now.velocity is not None:
            with torch.no_grad():
                _, context = read_episodes(self.reference, tensordict)
                anchor = window_velocities(self.reference, context, tensordict)
            penalty = torch.where(tensordict["has_image"], velocity_mse(now.velocity, anchor), 0)
        text_log_ratio = torch.where(chosen, now.log_prob - tensordict["log_prob"], 0).detach()
        everywhere = torch.ones_like(log_ratio, dtype=torch.bool)
        image_log_ratio = log_ratio.detach()
        return TensorDict(
            {
                "loss_text": self.text_weight * (weight * text).sum(),
                "loss_image": self.image_weight * (weight * image).sum(),
                "loss_velocity": self.velocity_weight * (weight * penalty).sum(),
                "entropy": (now.entropy * chosen).sum() / chosen.sum().clamp(min=1),
                "text_clip_fraction": clip_fraction(text_log_ratio, advantage[:, None], chosen, self.text_clip),
                "image_clip_fraction": clip_fraction(image_log_ratio, advantage[:, None], everywhere, self.image_clip),
                "text_log_ratio": text_log_ratio.abs().max(),
                "image_log_ratio": image_log_ratio.abs().max(),
            }
        )

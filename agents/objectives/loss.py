"""Trajectories in, losses out: the TorchRL module around the objectives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self, cast

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.objectives import LossModule

from agents.config.schema import AlgorithmSettings
from agents.models.base import UnifiedModel
from agents.objectives.equations import (
    clip_fraction,
    flow_matching_loss,
    image_loss,
    latent_kl,
    plain_log_ratio,
    ratio_norm,
    refl_loss,
    text_kl,
    text_loss,
    velocity_mse,
)
from agents.objectives.refl import LatentScore
from agents.policy.evaluate import ActionEvaluation, evaluate_actions, window_means
from agents.policy.guidance import Guidance
from agents.trajectory import Trajectory
from unigrpo_env.flow_time import shift_time
from unigrpo_env.variants.variant import Variant

Score = Callable[[Tensor, Tensor], Tensor]
"""Latents `[N, L, C]` with a gradient and groups `[N]` to rewards `[N]` with one."""


def forward_points(episodes: Trajectory, shift: float, generator: torch.Generator) -> None:
    """Put points of the forward process in place of the rollout's, for FPO.

    `window_latents` become x_t = (1 - t) x_0 + t noise of the finished `latent` x_0.

    Args:
        episodes: trajectories of one image an episode, changed in place.
        shift: t is uniform, then shifted as in `time_grid`.
        generator: of t and noise, on the CPU.
    """
    shape = episodes.window_times.shape
    t = torch.rand(shape, generator=generator).clamp_(min=1e-3)
    t = shift_time(t, shift).to(episodes.latent.device)
    # Drawn on the CPU, so that the numbers do not depend on the device.
    noise = torch.randn(episodes.window_latents.shape, generator=generator)
    noise = noise.to(episodes.latent.device)
    level = t[..., None, None]
    latent = episodes.latent.unsqueeze(-3).unsqueeze(-3)
    episodes.window_latents = (1 - level) * latent + level * noise
    episodes.window_times = t


def window_flow_loss(episodes: Trajectory, velocity: Tensor) -> Tensor:
    """The flow-matching loss at `forward_points`, `[N, R, W]` with R = 1.

    Args:
        episodes: N trajectories.
        velocity: `[N, R, W, L, C]`.
    """
    # [N, W, L, C] and [N, W]: such episodes have one image.
    noisy = episodes.window_latents[:, :, :-1].flatten(1, 2)
    t = episodes.window_times[:, :, :-1].flatten(1, 2)
    loss = flow_matching_loss(velocity.flatten(1, 2), noisy, episodes.latent, t)
    return loss.unflatten(1, velocity.shape[1:3])


class UniGRPOLoss(LossModule):
    """Equation (7): text loss + image_weight * image loss + penalties.

    The losses of the methods that UniGRPO is compared with are here too. It reads the fields of a
    `Trajectory` of N episodes (`episodes.flatten(0, 1)`, or the TensorDict of a replay buffer).
    The losses are sums under `episode_weight` (1 / episodes of the update, 0 for one without a
    score) and `token_weight` (the same for the text terms, or an episode's share of all chosen
    tokens), so an update does not depend on how it is split into micro-batches.

    FPO and ReFL are for episodes of one image. FPO reads `forward_points` in the window's place,
    and `flow_loss`, the `window_flow_loss` there before the first update.

    Of TorchRL's own GRPO parts this uses the frame alone: its `GRPOLoss` knows token log-probs of
    one sequence model, and has no room for latents.

    Args:
        model: the policy.
        reference: the frozen model of the penalties; None for none.
        legal_tokens: `[V]` bool, or `[rounds, V]`: of each round's text.
        settings: weights, clip ranges and choices.
        guidance: of the rollout; None for none, as in the paper.
        score: the differentiable reward, for ReFL alone.

    Attributes:
        uses_forward_points: whether the image expert learns at `forward_points`.

    Raises:
        ValueError: penalties without a reference, or refl without `score`.
    """

    in_keys = (
        "prompt_tokens", "prompt_roles", "prompt_length", "tokens", "roles", "text_mask",
        "chosen_mask", "log_prob", "latent", "images", "pixels", "image_positions", "group",
        "window_latents", "window_means", "window_times", "images_drawn", "text_advantage",
        "image_advantage", "step_mask", "episode_weight", "token_weight",
    )  # fmt: skip
    out_keys = (
        "loss_text", "loss_image", "loss_velocity", "loss_kl", "entropy", "text_clip_fraction",
        "image_clip_fraction", "text_log_ratio", "image_log_ratio",
    )  # fmt: skip

    def __init__(
        self,
        model: UnifiedModel[Any],
        reference: UnifiedModel[Any] | None,
        legal_tokens: Tensor,
        settings: AlgorithmSettings | None = None,
        *,
        guidance: Guidance | None = None,
        score: Score | None = None,
    ) -> None:
        super().__init__()
        self.settings = settings or AlgorithmSettings()
        if self.settings.needs_reference and reference is None:
            raise ValueError(
                "expected a reference model for the penalties, got None; "
                "give one or set their weights to 0"
            )
        if self.settings.image_objective == "refl" and score is None:
            raise ValueError(
                "expected a differentiable reward for the image objective 'refl', got none; "
                "give `score`"
            )
        self.model = model
        # Not a part of this module: it must not be trained, moved or saved with it.
        self.__dict__["reference"] = reference
        self.register_buffer("legal_tokens", legal_tokens.view(-1, legal_tokens.shape[-1]))
        self.guidance = guidance
        self.score = score
        objective = self.settings.image_objective
        self.uses_forward_points = bool(self.settings.image_weight) and objective == "fpo"
        self.log_ratio = ratio_norm
        if self.settings.ratio == "plain":
            self.log_ratio = plain_log_ratio

    @classmethod
    def for_variant(
        cls,
        model: UnifiedModel[Any],
        variant: Variant,
        settings: AlgorithmSettings | None = None,
        *,
        guidance: Guidance | None = None,
    ) -> Self:
        """The loss of a model that plays a variant, with all that it needs.

        Args:
            model: the policy; `model.reference()` is the reference, where one is needed.
            variant: gives the legal tokens, and the reward for ReFL.
            settings: weights, clip ranges and choices.
            guidance: of the rollout.
        """
        settings = settings or AlgorithmSettings()
        reference = None
        if settings.needs_reference:
            reference = model.reference()
        device = model.device
        legal = variant.rules.legal_by_round().to(device)
        score = None
        if settings.image_objective == "refl":
            score = LatentScore(variant, settings.refl_reward, max_unscored=0.25)
        return cls(model, reference, legal, settings, guidance=guidance, score=score)

    def evaluate(self, model: UnifiedModel[Any], episodes: Trajectory) -> ActionEvaluation:
        """What the policy, or the reference, says of episodes, as far as the terms need it.

        Args:
            model: the policy or the reference.
            episodes: N trajectories.
        """
        settings = self.settings
        is_reference = model is self.reference and model is not self.model
        # The reference is asked only for what a penalty compares.
        penalised = bool(settings.velocity_weight or settings.latent_kl_weight)
        learns_images = not is_reference and bool(settings.image_weight)
        return evaluate_actions(
            model,
            episodes,
            self.legal_tokens,
            temperature=settings.temperature,
            image_grad_to_text=settings.image_grad_to_text,
            grad_through_read_images=settings.grad_through_read_images,
            with_log_probs=not is_reference or bool(settings.text_kl_weight),
            with_velocity=penalised or learns_images,
            guidance=self.guidance,
        )

    @torch.no_grad()
    def recompute(self, episodes: Trajectory, *, log_probs: bool) -> None:
        """Compute what the policy said before the first update, on the batches of the update.

        Needed in bfloat16, where results depend on the batch shape, and for FPO, whose points are
        not in the rollout.

        Args:
            episodes: N trajectories, changed in place.
            log_probs: False leaves the log-probs of the rollout.
        """
        old = self.evaluate(self.model, episodes)
        if log_probs:
            episodes.log_prob = torch.where(episodes.chosen_mask, old.log_prob, 0)
        if old.velocity is None:
            return
        if self.uses_forward_points:
            episodes.flow_loss = window_flow_loss(episodes, old.velocity)
        elif self.settings.kernel != "ode":
            episodes.window_means, _ = self._means(episodes, old.velocity)

    def forward(self, tensordict: TensorDictBase | Trajectory) -> TensorDict:
        """Losses (to be summed and minimised) and detached metrics, all scalars.

        The metrics are means over an episode and then under the same weights: `entropy` of the
        chosen tokens' distributions, in nats; `*_clip_fraction`, the share of ratios whose gradient
        the clip cuts off; and `*_log_ratio`, the largest |log ratio|, which is rounding error alone
        before the first update on a batch.

        Args:
            tensordict: a `Trajectory` of N episodes, or a TensorDict with its fields.
        """
        episodes = Trajectory.of(tensordict)
        policy = self.evaluate(self.model, episodes)
        text = self._text_loss(episodes, policy)
        image, image_log_ratio = self._image_loss(episodes, policy)
        velocity, text_kl_loss, latent_kl_loss = self._penalties(episodes, policy)
        settings = self.settings
        weight = episodes.episode_weight
        token_weight = episodes.token_weight
        # Text terms are weighted by token_weight, image terms by episode_weight.
        kl_of_text = (token_weight * (settings.text_kl_weight * text_kl_loss)).sum()
        kl_of_latents = (weight * (settings.latent_kl_weight * latent_kl_loss)).sum()
        losses = {
            "loss_text": settings.text_weight * (token_weight * text).sum(),
            "loss_image": settings.image_weight * (weight * image).sum(),
            "loss_velocity": settings.velocity_weight * (weight * velocity).sum(),
            "loss_kl": kl_of_text + kl_of_latents,
        }
        with torch.no_grad():
            metrics = self._metrics(episodes, policy, image_log_ratio)
        return TensorDict({**losses, **metrics})

    def _text_loss(self, episodes: Trajectory, policy: ActionEvaluation) -> Tensor:
        """`[N]`."""
        return text_loss(
            policy.log_prob,
            episodes.log_prob,
            episodes.text_advantage,
            episodes.chosen_mask,
            self.settings.text_clip,
            self.settings.text_clip_high,
        )

    def _image_loss(self, episodes: Trajectory, policy: ActionEvaluation) -> tuple[Tensor, Tensor]:
        """The image term `[N]`, and the log ratios `[N, R W]` that it is made of."""
        step_mask = episodes.step_mask.flatten(1)
        log_ratio = torch.zeros(step_mask.shape, device=step_mask.device)
        nothing = torch.zeros(len(step_mask), device=step_mask.device)
        settings = self.settings
        if policy.velocity is None or not settings.image_weight:
            return nothing, log_ratio
        if settings.image_objective == "refl":
            return self._refl(episodes, policy.velocity), log_ratio
        found = self._image_log_ratio(episodes, policy.velocity).flatten(1)
        # Steps of images that were not drawn have ratio 1.
        log_ratio = torch.where(step_mask, found, 0)
        advantage = episodes.image_advantage.flatten(1)
        taken = _several_images(episodes)
        return image_loss(log_ratio, advantage, settings.image_clip, taken), log_ratio

    def _image_log_ratio(self, episodes: Trajectory, velocity: Tensor) -> Tensor:
        """`[N, R, W]`."""
        if self.settings.image_objective == "fpo":
            return cast(Tensor, episodes.flow_loss) - window_flow_loss(episodes, velocity)
        mean, std = self._means(episodes, velocity)
        after = episodes.window_latents[:, :, 1:]
        return self.log_ratio(after, mean, episodes.window_means, std)

    def _means(self, episodes: Trajectory, velocity: Tensor) -> tuple[Tensor, Tensor]:
        settings = self.settings
        return window_means(episodes, velocity, settings.noise_level, settings.kernel)

    def _refl(self, episodes: Trajectory, velocity: Tensor) -> Tensor:
        """The reward of x_0 as seen from the recorded step, negated, `[N]`."""
        assert self.score is not None
        t = episodes.window_times[:, 0, :1, None]
        # x_0 = x_t - t v, [N, L, C]
        seen = episodes.window_latents[:, 0, 0] - t * velocity[:, 0, 0]
        loss = refl_loss(self.score(seen, episodes.group))
        return torch.where(episodes.images_drawn > 0, loss, 0)

    def _penalties(
        self, episodes: Trajectory, policy: ActionEvaluation
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Velocity MSE, KL of the tokens, KL of the latents; `[N]` each, 0 where not asked for."""
        settings = self.settings
        nothing = torch.zeros(len(episodes.tokens), device=episodes.tokens.device)
        if not settings.needs_reference:
            return nothing, nothing, nothing
        with torch.no_grad():
            reference = self.evaluate(cast(UnifiedModel[Any], self.reference), episodes)
        velocity_loss = text_kl_loss = latent_kl_loss = nothing
        taken = _several_images(episodes)
        has_image = episodes.images_drawn > 0
        if settings.velocity_weight:
            # 0 before the first update, where policy and reference are the same.
            distance = velocity_mse(
                cast(Tensor, policy.velocity).flatten(1, 2),
                cast(Tensor, reference.velocity).flatten(1, 2),
                taken,
            )
            velocity_loss = torch.where(has_image, distance, 0)
        if settings.latent_kl_weight:
            mean, std = self._means(episodes, cast(Tensor, policy.velocity))
            reference_mean, _ = self._means(episodes, cast(Tensor, reference.velocity))
            distance = latent_kl(
                mean.flatten(1, 2), reference_mean.flatten(1, 2), std.flatten(1), taken
            )
            latent_kl_loss = torch.where(has_image, distance, 0)
        if settings.text_kl_weight:
            text_kl_loss = text_kl(policy.log_prob, reference.log_prob, episodes.chosen_mask)
        return velocity_loss, text_kl_loss, latent_kl_loss

    def _metrics(
        self, episodes: Trajectory, policy: ActionEvaluation, image_log_ratio: Tensor
    ) -> dict[str, Tensor]:
        settings = self.settings
        weight = episodes.episode_weight
        chosen = episodes.chosen_mask
        # [N, K]
        text_log_ratio = torch.where(chosen, policy.log_prob - episodes.log_prob, 0)
        entropy = (policy.entropy * chosen).sum(1) / chosen.sum(1).clamp(min=1)
        text_clipped = clip_fraction(
            text_log_ratio,
            episodes.text_advantage,
            chosen,
            settings.text_clip,
            settings.text_clip_high,
        )
        image_clipped = clip_fraction(
            image_log_ratio,
            episodes.image_advantage.flatten(1),
            episodes.step_mask.flatten(1),
            settings.image_clip,
        )
        return {
            "entropy": (weight * entropy).sum(),
            "text_clip_fraction": (weight * text_clipped).sum(),
            "image_clip_fraction": (weight * image_clipped).sum(),
            "text_log_ratio": _largest(text_log_ratio),
            "image_log_ratio": _largest(image_log_ratio),
        }


def _several_images(episodes: Trajectory) -> Tensor | None:
    """The steps taken, `[N, R W]`; None for one image: the mean over its steps needs no mask."""
    step_mask = cast(Tensor, episodes.step_mask)
    if step_mask.shape[1] == 1:
        return None
    return step_mask.flatten(1)


def _largest(values: Tensor) -> Tensor:
    if values.numel() == 0:
        return values.new_zeros(())
    return values.abs().max()

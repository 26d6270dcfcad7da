"""Trajectories in, losses out: the training pass and the TorchRL module around the objectives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.objectives import LossModule

from agents.actor import read_prompts, token_log_probs
from agents.config import AlgorithmSettings
from agents.flow import KERNELS
from agents.guidance import Guidance, guided
from agents.models.seam import Context, UnifiedModel
from agents.objectives import (
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
from unigrpo_env.flow_time import shift_time


@dataclass
class Replay:
    """What a model says of recorded episodes. Shapes as in `Collector`, with N episodes.

    Attributes:
        log_prob: `[N, K]` float32, of each token; zeros if they were not asked for.
        entropy: `[N, K]` float32, of the distribution it was drawn from, in nats; carries no gradient; likewise.
        velocity: `[N, R W, L, C]` float32, at the stochastic steps; None if it was not asked for.
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
    through_pictures: bool = False,
    speak: bool = True,
    look: bool = True,
    guidance: Guidance | None = None,
) -> Replay:
    """Read recorded episodes once, teacher-forced: all tokens' log-probabilities and all stochastic steps' velocities from one context.

    Args:
        model: see `agents.models.seam.UnifiedModel`.
        episodes: N trajectories.
        legal_tokens: `[2, V]` bool, as in the rollout: before the first picture, and after one.
        temperature: as in the rollout.
        through_context: False cuts the velocities' gradient into the text that they were drawn after.
        through_pictures: False cuts all gradients into the reading of pictures.
        speak: False leaves log-probabilities and entropy out.
        look: False leaves the velocities out, where text alone is learnt.
        guidance: as in the rollout.
    """
    model = guided(model, guidance)
    said, tokens, rounds = episodes["text_mask"], episodes["tokens"], _rounds(episodes)
    count, drawn, (sources, images, places) = said.sum(1), episodes["images_drawn"], _pictures(episodes)
    log_prob, entropy = (torch.zeros(said.shape, device=said.device) for _ in range(2))
    velocity = torch.zeros_like(episodes["window_means"]).unflatten(1, (rounds, -1)) if look else None
    last, context = read_prompts(model, episodes["prompt_tokens"], episodes["prompt_length"], images[:, :sources], learn=through_pictures)
    rows = torch.arange(len(said), device=said.device)  # the episodes that go on
    read = torch.zeros_like(count)  # how much of the stream of each the context holds
    for number in range(rounds):
        place = places[rows, number] if number < rounds - 1 else torch.full_like(read, -1)
        stop = torch.where(place >= 0, place, count[rows])
        slots = torch.arange(int((stop - read).max()), device=said.device)
        if len(slots):
            mask = slots < (stop - read)[:, None]
            at = (read[:, None] + slots).clamp(max=said.shape[1] - 1)
            logits, context = model.read_text(context, tokens[rows[:, None], at], mask)
            if speak:
                legal = legal_tokens[int(number > 0)]
                log_probs = token_log_probs(torch.cat([last, logits[:, :-1]], 1), legal, temperature)
                # What stands first after a picture is the env's, and a forced token was never a choice: those log-probs are read by nobody.
                who, where = mask.nonzero(as_tuple=True)
                slot = rows[who], at[who, where]
                log_prob = log_prob.index_put(slot, log_probs[who, where, tokens[slot]])
                entropy[slot] = _entropy(log_probs, legal)[who, where]
            last = logits[:, -1:]
        if velocity is not None:  # now: without gradient the context grows in place
            opened, draws = context if through_context else context.detach(), drawn[rows] > number
            if len(draws) == len(said) and draws.all():
                velocity[:, number] = window_velocities(model, opened, episodes, number)
            elif draws.any():
                some = draws.nonzero()[:, 0]
                windows = episodes.select("window_latents", "window_means", "window_times")[rows[some]]
                velocity[rows[some], number] = window_velocities(model, opened.select(some), windows, number)
        looks = (place >= 0).nonzero()[:, 0]
        if len(looks) == 0:
            break
        if len(looks) < len(rows):
            context, rows, last, place = context.select(looks), rows[looks], last[looks], place[looks]
        context = model.read_image(context, images[rows, sources + number], learn=through_pictures)
        read = place + 1
    return Replay(log_prob, entropy, None if velocity is None else velocity.flatten(1, 2))


def _pictures(episodes: TensorDictBase) -> tuple[int, Tensor, Tensor]:
    """How many sources there are, the pictures to be read `[N, M, L, C]`, and where in `tokens` each drawn one stands `[N, R - 1]`; -1: nowhere."""
    if "images" not in episodes.keys():  # noqa: SIM118 (a TensorDict is no dict)
        return 0, episodes["latent"][:, None][:, :0], episodes["tokens"][:, :0]
    images, places = episodes["images"], episodes["image_places"]
    sources = images.shape[1] - (_rounds(episodes) - 1)
    return sources, images, torch.where(places >= 0, places - episodes["prompt_length"][:, None], -1)[:, sources:]


@torch.no_grad()
def _entropy(log_probs: Tensor, legal: Tensor) -> Tensor:
    return -(log_probs.exp() * log_probs.masked_fill(~legal, 0)).sum(-1)


def _rounds(episodes: TensorDictBase) -> int:
    """R: there is one latent more than there are means in each picture's window."""
    return episodes["window_latents"].shape[1] - episodes["window_means"].shape[1]


def window_ends(episodes: TensorDictBase, name: str) -> tuple[Tensor, Tensor]:
    """`window_latents` or `window_times` before and after each recorded step, `[N, R W, ...]`."""
    values, rounds = episodes[name], _rounds(episodes)
    if rounds == 1:
        return values[:, :-1], values[:, 1:]
    by_picture = values.unflatten(1, (rounds, -1))
    return by_picture[:, :, :-1].flatten(1, 2), by_picture[:, :, 1:].flatten(1, 2)


def stage_advantages(episodes: TensorDictBase) -> tuple[Tensor, Tensor]:
    """The advantage of each token and of each recorded step, `[N, 1]` or `[N, K]` and `[N, R W]`, from one an episode `[N]` or one a stage `[N, 2 R]`."""
    advantage = episodes["advantage"]
    if advantage.ndim == 1:
        return advantage[:, None], advantage[:, None]
    rounds, slots = _rounds(episodes), torch.arange(episodes["tokens"].shape[1], device=advantage.device)
    number = torch.zeros_like(episodes["tokens"])
    if rounds > 1:
        drawn = (episodes["image_places"] - episodes["prompt_length"][:, None])[:, 1 - rounds :, None]
        number = ((drawn >= 0) & (drawn <= slots)).sum(1)
    return advantage[:, 0::2].gather(1, number), advantage[:, 1::2].repeat_interleave(episodes["window_means"].shape[1] // rounds, 1)


def steps_taken(episodes: TensorDictBase) -> Tensor:
    """`[N, R W]` bool: which of the recorded steps there were."""
    rounds = _rounds(episodes)
    drawn = torch.arange(rounds, device=episodes["images_drawn"].device) < episodes["images_drawn"][:, None]
    return drawn.repeat_interleave(episodes["window_means"].shape[1] // rounds, 1)


def window_velocities(model: UnifiedModel[Any], context: Context, episodes: TensorDictBase, picture: int = 0) -> Tensor:
    """Velocities `[N, W, L, C]` at the recorded steps of a picture, `context` being that at which it opened."""
    rounds = _rounds(episodes)
    x, t = (window_ends(episodes, name)[0].chunk(rounds, 1)[picture] for name in ("window_latents", "window_times"))
    return model.velocity(context.repeat(t.shape[1]), x.flatten(0, 1), t.flatten()).unflatten(0, t.shape)


def window_means(episodes: TensorDictBase, velocity: Tensor, noise_level: float, kernel: str = "flow_sde") -> tuple[Tensor, Tensor]:
    """Means `[N, R W, L, C]` and stds `[N, R W]` of the stochastic steps under a velocity."""
    (latents, _), (t, next_t), shape = window_ends(episodes, "window_latents"), window_ends(episodes, "window_times"), velocity.shape[:2]
    step = KERNELS[kernel](latents.flatten(0, 1), velocity.flatten(0, 1), t.flatten(), next_t.flatten(), noise_level)
    return step.mean.unflatten(0, shape), step.std.unflatten(0, shape)


def forward_points(episodes: TensorDictBase, shift: float, generator: torch.Generator) -> None:
    """Put points of the forward process in place of the rollout's: `window_latents` become x_t = (1 - t) x_0 + t noise of the finished `latent` x_0.

    Args:
        episodes: trajectories, changed in place.
        shift: t is uniform, shifted as in `time_grid`.
        generator: of t and noise, on the CPU.
    """
    latent, times = episodes["latent"], episodes["window_times"]
    t = torch.rand(times.shape, generator=generator).clamp_(min=1e-3)
    t = shift_time(t, shift).to(latent.device)
    noise = torch.randn(episodes["window_latents"].shape, generator=generator).to(latent.device)
    level = t[..., None, None]
    episodes["window_latents"], episodes["window_times"] = (1 - level) * latent.unsqueeze(-3) + level * noise, t


def window_flow_loss(episodes: TensorDictBase, velocity: Tensor) -> Tensor:
    """`[N, W]`, the flow-matching loss at `forward_points`."""
    return flow_matching_loss(velocity, episodes["window_latents"][:, :-1], episodes["latent"], episodes["window_times"][:, :-1])


Score = Callable[[Tensor, Tensor], Tensor]
"""Latents `[N, L, C]` with a gradient, groups `[N]` -> rewards `[N]` with one."""


class UniGRPOLoss(LossModule):
    """Equation (7): text loss + image_weight * image loss + penalties, and the losses of the methods it is compared with.

    Reads the keys of `Collector`'s layout, flattened to N episodes (`episodes.flatten(0, 1)`), where pictures are read also `images` and `image_places`, and three more, `[N]` each: `advantage` (or `[N, 2 R]`, one for each thought and picture in turn); `weight`, an episode's share in the mean (1 / episodes of the update, 0 for one without
    a score); `text_share`, the same for the text terms (equal to `weight`, or an episode's share of all chosen tokens). The losses are sums under these weights, so an update does
    not depend on how it is split into micro-batches.

    FPO and ReFL are for episodes of one picture. FPO reads `forward_points` in the window's place, and `flow_loss` `[N, W]`, `window_flow_loss` there before the first update.

    Of TorchRL's own GRPO parts this uses the frame alone: its `GRPOLoss` knows token log-probs of one sequence model, and has no room for latents.

    Args:
        model: the policy.
        reference: the frozen model of the penalties; None for none.
        legal_tokens: `[V]` bool, or `[2, V]`: before the first picture, and after one.
        settings: weights, clip ranges and choices; see `agents.config.AlgorithmSettings`.
        guidance: of the rollout; None for none, as in the paper.
        score: the differentiable reward, for ReFL alone.

    Raises:
        ValueError: penalties without a reference, or refl without `score`.
    """

    in_keys = (
        "prompt_tokens", "prompt_length", "tokens", "text_mask", "chosen_mask", "log_prob", "latent", "group",
        "window_latents", "window_means", "window_times", "images_drawn", "advantage", "weight", "text_share",
    )  # fmt: skip
    out_keys = (
        "loss_text", "loss_image", "loss_velocity", "loss_kl",
        "entropy", "text_clip_fraction", "image_clip_fraction", "text_log_ratio", "image_log_ratio",
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
        self.settings = settings = settings or AlgorithmSettings()
        if settings.needs_reference and reference is None:
            raise ValueError("expected a reference model for the penalties, got None; give one or set their weights to 0")
        if settings.image_objective == "refl" and score is None:
            raise ValueError("expected a differentiable reward for the image objective 'refl', got none; give `score`")
        self.model = model
        self.__dict__["reference"] = reference  # not a part of this module: it must not be trained, moved or saved with it
        self.register_buffer("legal_tokens", legal_tokens.expand(2, -1) if legal_tokens.ndim == 1 else legal_tokens)
        self.guidance, self.score = guidance, score
        self.log_ratio = {"norm": ratio_norm, "plain": plain_log_ratio}[settings.ratio]

    def replay(self, model: UnifiedModel[Any], episodes: TensorDictBase) -> Replay:
        """What the policy, or the reference, says of the episodes, as far as the terms need it."""
        settings = self.settings
        penalised = bool(settings.velocity_weight or settings.latent_kl_weight)
        reference = model is self.reference and model is not self.model
        return replay(
            model,
            episodes,
            self.legal_tokens,
            temperature=settings.temperature,
            through_context=settings.through_context,
            through_pictures=settings.through_pictures,
            speak=not reference or bool(settings.text_kl_weight),
            look=penalised or (not reference and bool(settings.image_weight)),
            guidance=self.guidance,
        )

    def forward(self, tensordict: TensorDictBase) -> TensorDict:
        """Losses (to be summed and minimised) and detached metrics, all scalars.

        Metrics, means over an episode and then under the same weights: `entropy` of the chosen tokens' distributions, nats; `*_clip_fraction`, the
        share of ratios whose gradient the clip cuts off. And `*_log_ratio`, the largest |log ratio|: rounding error alone before the first update on a batch.
        """
        settings, now = self.settings, self.replay(self.model, tensordict)
        (text_advantage, image_advantage), chosen = stage_advantages(tensordict), tensordict["chosen_mask"]
        weight, share = tensordict["weight"], tensordict["text_share"]
        taken = steps_taken(tensordict)
        # Where every episode has at most one picture the mean over its steps needs no mask.
        some = taken if _rounds(tensordict) > 1 else None
        has_image = taken[:, 0]
        clips = settings.text_clip, settings.text_clip_high
        text = text_loss(now.log_prob, tensordict["log_prob"], text_advantage, chosen, *clips)
        log_ratio = torch.zeros_like(taken, dtype=torch.float32)
        image = penalty = text_pull = image_pull = torch.zeros_like(text)
        if now.velocity is not None and settings.image_weight:
            if settings.image_objective == "refl":
                image = self._refl(tensordict, now.velocity)
            else:
                log_ratio = torch.where(taken, self._image_log_ratio(tensordict, now.velocity), 0)
                image = image_loss(log_ratio, image_advantage, settings.image_clip, some)
        if settings.needs_reference:
            with torch.no_grad():
                anchor = self.replay(cast(UnifiedModel[Any], self.reference), tensordict)
            if settings.text_kl_weight:
                text_pull = settings.text_kl_weight * text_kl(now.log_prob, anchor.log_prob, chosen)
            if now.velocity is not None and anchor.velocity is not None:
                penalty = torch.where(has_image, velocity_mse(now.velocity, anchor.velocity, some), 0)
                if settings.latent_kl_weight:
                    (mean, std), (anchored, _) = (self._means(tensordict, velocity) for velocity in (now.velocity, anchor.velocity))
                    image_pull = settings.latent_kl_weight * torch.where(has_image, latent_kl(mean, anchored, std, some), 0)
        text_log_ratio = torch.where(chosen, now.log_prob - tensordict["log_prob"], 0).detach()
        image_log_ratio = log_ratio.detach()
        return TensorDict(
            {
                "loss_text": settings.text_weight * (share * text).sum(),
                "loss_image": settings.image_weight * (weight * image).sum(),
                "loss_velocity": settings.velocity_weight * (weight * penalty).sum(),
                "loss_kl": (share * text_pull).sum() + (weight * image_pull).sum(),
                "entropy": (weight * (now.entropy * chosen).sum(1) / chosen.sum(1).clamp(min=1)).sum(),
                "text_clip_fraction": (weight * clip_fraction(text_log_ratio, text_advantage, chosen, *clips)).sum(),
                "image_clip_fraction": (weight * clip_fraction(image_log_ratio, image_advantage, taken, settings.image_clip)).sum(),
                "text_log_ratio": text_log_ratio.abs().max(),
                "image_log_ratio": image_log_ratio.abs().max(),
            }
        )

    def _means(self, episodes: TensorDictBase, velocity: Tensor) -> tuple[Tensor, Tensor]:
        return window_means(episodes, velocity, self.settings.noise_level, self.settings.kernel)

    def _image_log_ratio(self, episodes: TensorDictBase, velocity: Tensor) -> Tensor:
        """`[N, W]`."""
        if self.settings.image_objective == "fpo":
            return episodes["flow_loss"] - window_flow_loss(episodes, velocity)
        mean, std = self._means(episodes, velocity)
        return self.log_ratio(window_ends(episodes, "window_latents")[1], mean, episodes["window_means"], std)

    def _refl(self, episodes: TensorDictBase, velocity: Tensor) -> Tensor:
        """`[N]`: x_0 as seen from the recorded step, scored."""
        assert self.score is not None
        seen = episodes["window_latents"][:, 0] - episodes["window_times"][:, :1, None] * velocity[:, 0]
        return torch.where(episodes["images_drawn"] > 0, refl_loss(self.score(seen, episodes["group"])), 0)

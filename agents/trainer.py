"""The loop: collect, compare inside groups, update. Nothing here that `examples/unigrpo_loop.py` could not say in a page."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import logging
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.data.replay_buffers.samplers import SamplerWithoutReplacement

from agents.actor import Actor
from agents.checkpoint import latest_checkpoint, load_checkpoint, read_state, save_checkpoint
from agents.collector import Collector
from agents.config import Config, EnvSettings, GuidanceSettings
from agents.evaluation import Evaluation, evaluate
from agents.flow import Window
from agents.guidance import Guidance
from agents.loss import UniGRPOLoss, forward_points, window_flow_loss, window_means
from agents.models import UnifiedModel, load_model
from agents.objectives import group_advantage, groups_with_signal, stage_returns
from agents.refl import LatentScore
from agents.supervised import teach, teacher
from rewards import UnscoredError
from unigrpo_env.episodes import Variant
from unigrpo_env.tasks import Prompt, PromptFile, episodes_of
from unigrpo_env.variants import make_variant
from unigrpo_env.vector import InterleavedGenVectorEnv

logging.getLogger("torchrl").setLevel(logging.WARNING)

METRICS = {
    "reward": "mean reward of the iteration's episodes, at their end",
    "thought_reward": "mean of what an episode was paid for its thoughts",
    "round_reward": "mean of what it was paid for its pictures on the way",
    "signal": "share of groups whose rewards differ; the others have advantage 0",
    "unscored": "share of episodes that the reward could not score",
    "thought_length": "mean number of tokens the policy chose, an episode",
    "entropy": "mean entropy of the token distribution, nats; falling fast means the text stops exploring",
    "text_clip_fraction": "share of tokens whose gradient the clip cut off; 0 in an iteration's first update",
    "image_clip_fraction": "the same for stochastic image steps",
    "text_log_ratio": "largest |log ratio| of a token before the iteration's first update: rounding error alone",
    "image_log_ratio": "the same for image steps",
    "loss_text": "text term of the loss; its gradient matters, not its value",
    "loss_image": "image term of the loss; likewise",
    "loss_velocity": "velocity penalty, weighted: how far the velocity has moved from the reference",
    "loss_kl": "KL of tokens and of stochastic steps to the reference, weighted",
    "text_grad_norm": "gradient norm of the text expert before clipping",
    "image_grad_norm": "gradient norm of the image expert before clipping",
    "episodes_per_second": "episodes collected and learnt from, a second",
    "seconds": "of the clock, for the iteration",
    "cpu_seconds": "of all processors together",
}
"""What each number of an iteration means."""

CLOCKED = ("episodes_per_second", "seconds", "cpu_seconds")
"""Those of `METRICS` that no seed fixes."""


def build_variant(settings: EnvSettings, reward: str = "") -> Variant:
    """The scenario that the settings name, with `reward` in place of theirs if given."""
    rules = {
        name: getattr(settings, name)
        for name in ("prompt_budget", "text_budget", "image_steps", "time_shift")
        if getattr(settings, name) is not None
    }
    rewards = {"reward": reward or settings.reward, "thought_reward": settings.thought_reward, "round_reward": settings.round_reward}
    variant = make_variant(settings.variant, **{name: value or None for name, value in rewards.items()}, **rules)
    return variant if settings.prompts is None else dataclasses.replace(variant, task=PromptFile(settings.prompts))


def build_guidance(settings: GuidanceSettings, scale: float) -> Guidance | None:
    """The guidance that the settings describe; None at scale 1."""
    if scale == 1:
        return None
    return Guidance(scale, settings.image, low=settings.low, high=settings.high, renorm=settings.renorm, renorm_min=settings.renorm_min)


class Trainer:
    """One run. All that is random is drawn from (seed, iteration), so a run that is stopped and resumed is the run that was not.

    Args:
        config: the settings.
        model: what to train, in place of the one that the settings name.

    Attributes:
        iteration: iterations done.
        model, reference, variant, env, collector, loss, optimizer: the parts, each usable alone.
    """

    def __init__(self, config: Config, model: UnifiedModel[Any] | None = None) -> None:
        self.config, self.iteration = config, 0
        import_modules(config.output.imports)
        if config.trainer.threads:
            torch.set_num_threads(config.trainer.threads)
        algorithm, trainer, optimizer = config.algorithm, config.trainer, config.optimizer
        self.model = (model if model is not None else load_model(config.model.name)).to(config.model.device)
        # Weights stay in float32: at a learning rate of 1e-6 an update would be lost in bfloat16's rounding.
        self.model.compute_dtype = getattr(torch, config.model.dtype)
        self.reference = copy.deepcopy(self.model).requires_grad_(False) if algorithm.needs_reference else None
        self.variant = build_variant(config.env)
        for reader in (self.model, self.reference):
            if reader is not None:
                reader.look_with(self.variant.decode)
        self.env = InterleavedGenVectorEnv(self.variant, trainer.groups * trainer.group_size, copy=False, device=config.model.device)
        window = Window(algorithm.window_size, algorithm.window_low, algorithm.window_high, algorithm.window_slide_every)
        guidance = build_guidance(config.guidance, config.guidance.train)
        actor = Actor(
            self.model,
            temperature=algorithm.temperature,
            window=window,
            noise_level=algorithm.noise_level,
            kernel=algorithm.kernel,
            guidance=guidance,
        )
        self.collector = Collector(self.env, actor, trainer.group_size, shared_noise=algorithm.shared_noise)
        rules = self.variant.rules
        if rules.stored_images and algorithm.method == "rl" and algorithm.image_weight and algorithm.image_objective != "flow_grpo":
            raise ValueError(
                f"expected a variant of one picture and no sources for {algorithm.image_objective!r}, got {config.env.variant!r}; "
                "those learn by flow_grpo, or from lessons"
            )
        legal = torch.stack([rules.legal_tokens(), rules.legal_tokens(after_image=True)]).to(config.model.device)
        self.score = LatentScore(self.variant, algorithm.refl_reward, trainer.max_unscored)
        self.loss = UniGRPOLoss(self.model, self.reference, legal, algorithm, guidance=guidance, score=self.score)
        self.experts = self.model.parameter_lists()
        weights = {"text": algorithm.text_weight, "image": algorithm.image_weight}
        for expert, parameters in self.experts.items():
            for parameter in parameters:
                parameter.requires_grad_(bool(weights[expert]))
        self.rates = {"text": optimizer.text_lr, "image": optimizer.image_lr}
        self.optimizer = torch.optim.AdamW(
            [{"params": self.experts[expert], "lr": rate} for expert, rate in self.rates.items()],
            betas=(optimizer.beta1, optimizer.beta2),
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
        )
        self.buffer = TensorDictReplayBuffer(
            storage=LazyTensorStorage(trainer.groups),
            sampler=SamplerWithoutReplacement(),
            batch_size=trainer.groups // (trainer.minibatches * trainer.micro_batches),
        )
        below_float32 = config.model.dtype != "float32"
        self.recompute = (algorithm.old_log_prob or ("recompute" if below_float32 else "rollout")) == "recompute"

    def iterate(self) -> dict[str, float]:
        """One round of collecting and updating; returns `METRICS`.

        Raises:
            UnscoredError: more than the allowed share of episodes had no score.
        """
        began, cpu_began = time.perf_counter(), time.process_time()
        seed = derived_seed(self.config.trainer.seed, self.iteration)
        metrics = self._learn_lessons(seed) if self.config.algorithm.method == "sft" else self._learn_episodes(seed)
        self.iteration += 1
        seconds = time.perf_counter() - began
        metrics |= {"seconds": seconds, "cpu_seconds": time.process_time() - cpu_began, "episodes_per_second": self.env.num_envs / seconds}
        return {name: metrics.get(name, math.nan) for name in METRICS}

    def _learn_episodes(self, seed: int) -> dict[str, float]:
        trainer = self.config.trainer
        episodes, metrics = self._gather(seed)
        if self._forward:
            forward_points(episodes, self.variant.rules.time_shift, torch.Generator().manual_seed(seed))
        self.buffer.empty()
        self.buffer.set_rng(torch.Generator().manual_seed(seed))
        self.buffer.extend(episodes)
        parts = [part.flatten(0, 1).to(self.config.model.device) for part in self.buffer]
        self._recompute(parts)
        size = trainer.micro_batches
        updates = [self._update(parts[start : start + size]) for _ in range(trainer.epochs) for start in range(0, len(parts), size)]
        updates = [update for update in updates if update]
        for name in updates[0] if updates else ():
            # Ratios are rounding error before an iteration's first update alone, so that update is the one to show.
            shown = updates[:1] if name.endswith("log_ratio") else updates
            metrics[name] = sum(update[name] for update in shown) / len(shown)
        return metrics

    def _learn_lessons(self, seed: int) -> dict[str, float]:
        """Supervised: as many lessons as there would be episodes, in as many updates."""
        settings, trainer = self.config.algorithm, self.config.trainer
        lessons = teacher(self.variant).lessons(self.env.num_envs, seed, clean=settings.clean_lessons)
        if self.variant.rules.text_budget == 0:
            lessons = [lesson.silent() for lesson in lessons]
        generator, size = torch.Generator().manual_seed(seed), len(lessons) // trainer.minibatches
        metrics: dict[str, float] = {}
        for start in range(0, len(lessons), size):
            part = lessons[start : start + size]
            text, image = teach(self.model, self.variant, part, generator, self.variant.rules.time_shift)
            self.optimizer.zero_grad()
            losses = {"loss_text": settings.text_weight * text, "loss_image": settings.image_weight * image}
            (losses["loss_text"] + losses["loss_image"]).backward()
            for name, value in ({name: float(loss.detach()) for name, loss in losses.items()} | self._step()).items():
                metrics[name] = metrics.get(name, 0.0) + value / trainer.minibatches
        return metrics | {"reward": float(self.env.episodes.reward(episodes_of(lessons)).reward.nanmean())}

    def _gather(self, seed: int) -> tuple[TensorDict, dict[str, float]]:
        """Collect and compare; with dynamic sampling "replace", collect again for the groups without signal."""
        trainer = self.config.trainer
        self.score.prompts = self.variant.task.prompts("train", trainer.groups, seed)
        episodes = self.collector.collect(self.score.prompts, seed, self.iteration)
        signal, metrics = self._compare(episodes)
        for attempt in range(1, trainer.max_collects if trainer.dynamic_sampling == "replace" else 1):
            if signal.all():
                break
            again = derived_seed(seed, attempt)
            prompts = self.variant.task.prompts("train", trainer.groups, again)
            more = self.collector.collect(prompts, again, self.iteration)
            found, _ = self._compare(more)
            for group, other in zip((~signal).nonzero()[:, 0].tolist(), found.nonzero()[:, 0].tolist(), strict=False):
                more["group"][other] = group
                episodes[group], self.score.prompts[group], signal[group] = more[other], prompts[other], True
        if trainer.dynamic_sampling == "drop":
            episodes["counts"] &= signal[:, None]
        return episodes, metrics

    def _compare(self, episodes: TensorDict) -> tuple[Tensor, dict[str, float]]:
        """Give every episode its advantage, equation (1), and say whether it counts; returns which groups have signal, `[groups]` bool, and metrics.

        `returns`, kept beside it, is what the advantage was taken from: one number an episode, or one a stage; see `algorithm.credit`.
        """
        reward, group = episodes["reward"], episodes["group"].flatten()
        paid = {name: episodes[name].sum(-1) for name in ("thought_reward", "round_reward")}
        total = reward + sum(paid.values())
        unscored = float(total.isnan().float().mean())
        if unscored > self.config.trainer.max_unscored or unscored == 1:
            raise UnscoredError(
                f"{round(unscored * total.numel())} of {total.numel()} episodes could not be scored: the reward returned NaN or infinity for them. "
                "Mend the reward, or raise trainer.max_unscored if so many failures are to be expected"
            )
        episodes["returns"] = total if self.config.algorithm.credit == "episode" else self._stage_returns(episodes)
        stages = episodes["returns"].flatten(0, 1).view(len(group), -1).unbind(1)
        episodes["advantage"] = torch.stack([group_advantage(stage, group) for stage in stages], 1).view_as(episodes["returns"])
        episodes["counts"] = ~total.isnan()
        signal = torch.stack([groups_with_signal(stage, group) for stage in stages]).any(0)
        return signal, {name: float(value.nanmean()) for name, value in paid.items()} | {
            "reward": float(reward.nanmean()),
            "signal": float(signal.float().mean()),
            "unscored": unscored,
            "thought_length": float(episodes["chosen_mask"].sum(-1).float().mean()),
        }

    def _stage_returns(self, episodes: TensorDict) -> Tensor:
        """`stage_returns` of groups of episodes, `[groups, group_size, 2 R]`."""
        flat, rounds = episodes.flatten(0, 1), self.variant.rules.image_budget
        begun = torch.ones_like(flat["images_drawn"])
        if rounds > 1:
            begun = 1 + (flat["image_places"][:, 1 - rounds :] >= 0).sum(1)
        found = stage_returns(flat["reward"], flat["thought_reward"], flat["round_reward"], flat["images_drawn"], begun)
        return found.view(*episodes.batch_size, -1)

    @torch.no_grad()
    def _recompute(self, parts: list[TensorDict]) -> None:
        """What the policy says before the first update, by the training forward on the batches of the update.

        In low precision another batch shape is another number; and the points of FPO are none of the rollout's.
        """
        settings = self.config.algorithm
        if not (self.recompute or self._forward):
            return
        for part in parts:
            old = self.loss.replay(self.model, part)
            if self.recompute:
                part["log_prob"] = torch.where(part["chosen_mask"], old.log_prob, 0)
            if old.velocity is None:
                continue
            if self._forward:
                part["flow_loss"] = window_flow_loss(part, old.velocity)
            elif settings.kernel != "ode":
                part["window_means"], _ = window_means(part, old.velocity, settings.noise_level, settings.kernel)

    @property
    def _forward(self) -> bool:
        """Does the image expert learn at points of the forward process?"""
        return bool(self.config.algorithm.image_weight) and self.config.algorithm.image_objective == "fpo"

    def _update(self, parts: list[TensorDict]) -> dict[str, float]:
        """One optimiser step on one mini-batch, its gradient summed over micro-batches."""
        episodes = sum(int(part["counts"].sum()) for part in parts)
        if episodes == 0:
            return {}  # nothing to learn from; a step would follow Adam's momentum alone
        words = max(sum(int(part["chosen_mask"][part["counts"]].sum()) for part in parts), 1)
        metrics: dict[str, float] = {}
        self.optimizer.zero_grad()
        for part in parts:
            part["weight"] = part["counts"].float() / episodes
            alike = self.config.algorithm.text_aggregation == "token"
            part["text_share"] = part["chosen_mask"].sum(1) * part["counts"] / words if alike else part["weight"]
            out = self.loss(part)
            torch.stack([value for name, value in out.items() if name.startswith("loss_")]).sum().backward()
            for name, tensor in out.items():
                value, known = float(tensor.detach()), metrics.get(name, 0.0)
                metrics[name] = max(known, value) if name.endswith("log_ratio") else known + value
        return metrics | self._step()

    def _step(self) -> dict[str, float]:
        """One step along the gradient that has gathered; returns the experts' gradient norms.

        Raises:
            FloatingPointError: the gradient is not finite; the weights have not changed.
        """
        norms: dict[str, float] = {}
        for group, (expert, parameters) in zip(self.optimizer.param_groups, self.experts.items(), strict=True):
            norm = float(nn.utils.clip_grad_norm_(parameters, self.config.optimizer.max_grad_norm))
            if not math.isfinite(norm):
                raise FloatingPointError(
                    f"the gradient of the {expert} expert is {norm} in iteration {self.iteration + 1}; the weights are as before it. "
                    "Lower the learning rates, or look at the reward and the noise level"
                )
            norms[f"{expert}_grad_norm"] = norm
            group["lr"] = self.rates[expert] * self._schedule()
        self.optimizer.step()
        return norms

    def _schedule(self) -> float:
        """Linear rise over `warmup`, then a linear fall to `decay` at the last iteration."""
        optimizer, total = self.config.optimizer, max(self.config.trainer.iterations, 1)
        rise = min(1.0, (self.iteration + 1) / max(optimizer.warmup, 1))
        return rise * (1 - (1 - optimizer.decay) * self.iteration / total)

    def evaluate(self, *, greedy: bool = False, attempt: int = 0, prompts: int | None = None) -> Evaluation:
        """The model on the held-out split, or on the first `prompts` of it; every `attempt` draws other noise."""
        settings, guidance = self.config.evaluation, self.config.guidance
        variant = build_variant(self.config.env, reward=settings.reward) if settings.reward else self.variant
        return evaluate(
            self.model,
            variant,
            self.held_out()[:prompts],
            temperature=0.0 if greedy else self.config.algorithm.temperature,
            image_steps=settings.image_steps,
            seed=settings.seed + attempt * settings.prompts,
            guidance=build_guidance(guidance, guidance.evaluate),
            device=self.config.model.device,
        )

    def held_out(self) -> list[Prompt]:
        return self.variant.task.prompts("test", self.config.evaluation.prompts, self.config.evaluation.seed)

    def train(self, after_iteration: Callable[[dict[str, float]], None] = lambda metrics: None) -> None:
        """Iterate until `trainer.iterations`, calling `after_iteration` after each."""
        while self.iteration < self.config.trainer.iterations:
            after_iteration(self.iterate())

    def save(self) -> Path:
        """A checkpoint in the run's folder; see `agents.checkpoint`."""
        state = {"iteration": self.iteration, "config": self.config.to_dict()}
        folder = Path(self.config.output.folder) / "checkpoints"
        return save_checkpoint(folder, self.model, self.optimizer, self.reference, state, self.config.output.keep_checkpoints)

    @classmethod
    def resume(cls, run: str | Path, overrides: Callable[[Config], Config] = lambda config: config) -> Trainer:
        """The trainer of a run's last checkpoint.

        Args:
            run: the run's folder, or one checkpoint's.
            overrides: changes the saved settings, to run for longer, say.

        Raises:
            ValueError: no checkpoint, or a damaged or foreign one.
        """
        checkpoint = latest_checkpoint(Path(run))
        config = overrides(Config.from_dict(read_state(checkpoint)["config"]))
        config.output.folder = str(checkpoint.parents[1])
        import_modules(config.output.imports)
        model = load_model(str(checkpoint / "model"))
        trainer = cls(config, model)
        trainer.iteration = load_checkpoint(checkpoint, trainer.model, trainer.optimizer, trainer.reference)["iteration"]
        return trainer


def derived_seed(*key: int) -> int:
    """One 31-bit seed from several numbers."""
    return int(np.random.SeedSequence(key).generate_state(1)[0] >> 1)


def import_modules(names: list[str]) -> None:
    """Import user modules, from the working directory too, for what they register."""
    if names and "" not in sys.path:
        sys.path.insert(0, "")
    for name in names:
        importlib.import_module(name)

"""The loop: collect, compare inside groups, update.

Nothing here that `examples/unigrpo_loop.py` could not say in a page.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchrl.data import LazyTensorStorage, ReplayBuffer
from torchrl.data.replay_buffers.samplers import SamplerWithoutReplacement

from agents.config.schema import Config
from agents.models.base import UnifiedModel
from agents.objectives.loss import UniGRPOLoss, forward_points
from agents.objectives.refl import LatentScore
from agents.reporting.metrics import METRICS, mean_of_updates
from agents.rollout.collector import Collector
from agents.training import build
from agents.training.checkpoint import (
    MODEL,
    latest_checkpoint,
    load_checkpoint,
    read_state,
    save_checkpoint,
)
from agents.training.comparison import add_advantages
from agents.training.evaluator import Evaluator
from agents.training.optimization import Optimization
from agents.training.preparation import prepare_rewards, training_rewards
from agents.training.supervised import require_demonstrations, sample_losses
from agents.trajectory import Trajectory
from unigrpo_env.tasks.task import demonstration_batch
from unigrpo_env.vector_env import InterleavedGenVectorEnv

Metrics = dict[str, float]


class Trainer(Evaluator):
    """One run.

    All that is random is drawn from (seed, iteration), so a run that is stopped and resumed is the
    run that was not.

    Args:
        config: the settings.
        model: what to train, in place of the one that the settings name.

    Attributes:
        iteration: iterations done.
        reference: the frozen model of the penalties, or None. Where adapters are trained, it is the
            model without them.
        env: what is stepped.
        collector: plays groups of episodes.
        loss: the objective.
        optimization: makes new weights.

    Raises:
        ValueError: settings that do not fit each other, the model or the scenario.
    """

    def __init__(self, config: Config, model: UnifiedModel[Any] | None = None) -> None:
        super().__init__(config, model)
        self.iteration = 0
        build.check_objective(config, self.variant.rules)
        prepare_rewards(training_rewards(config, self.variant), self.variant)
        # Made before the first update: the model that training started from.
        self.reference = self.model.reference() if config.algorithm.needs_reference else None
        self._build_rollout()
        self._build_update()

    def _build_rollout(self) -> None:
        config = self.config
        trainer = config.trainer
        self.env = InterleavedGenVectorEnv(
            self.variant,
            trainer.groups * trainer.group_size,
            copy=False,
            device=config.model.device,
        )
        self.guidance = build.build_guidance(config.guidance, config.guidance.train)
        actor = build.build_actor(config, self.model, self.guidance)
        self.collector = Collector(
            self.env, actor, trainer.group_size, shared_noise=config.algorithm.shared_noise
        )

    def _build_update(self) -> None:
        config = self.config
        algorithm = config.algorithm
        trainer = config.trainer
        self.score = LatentScore(self.variant, algorithm.refl_reward, trainer.max_unscored)
        self.loss = UniGRPOLoss(
            self.model,
            self.reference,
            self.variant.rules.legal_by_round().to(config.model.device),
            algorithm,
            guidance=self.guidance,
            score=self.score,
        )
        self.optimization = Optimization(
            self.model, config.optimizer, algorithm, trainer.iterations
        )
        # Its one line about the storage of the buffer says nothing to the user of a run.
        logging.getLogger("torchrl").setLevel(logging.WARNING)
        self.buffer = ReplayBuffer(
            storage=LazyTensorStorage(trainer.groups),
            sampler=SamplerWithoutReplacement(),
            batch_size=trainer.groups // trainer.minibatches,
        )
        # In low precision another batch shape gives other numbers.
        default = "rollout" if config.model.dtype == "float32" else "recompute"
        self.recompute = (algorithm.old_log_prob or default) == "recompute"

    def iterate(self) -> Metrics:
        """One round of collecting and updating; returns `METRICS`.

        Raises:
            UnscoredError: more than the allowed share of episodes had no score.
            FloatingPointError: the gradient is not finite.
        """
        began = time.perf_counter()
        cpu_began = time.process_time()
        seed = derived_seed(self.config.trainer.seed, self.iteration)
        if self.config.algorithm.method == "sft":
            metrics = self._supervised_iteration(seed)
        else:
            metrics = self._rl_iteration(seed)
        self.iteration += 1
        seconds = time.perf_counter() - began
        metrics["seconds"] = seconds
        metrics["cpu_seconds"] = time.process_time() - cpu_began
        metrics["episodes_per_second"] = self.env.num_envs / seconds
        return {name: metrics.get(name, math.nan) for name in METRICS}

    def _rl_iteration(self, seed: int) -> Metrics:
        trainer = self.config.trainer
        episodes, metrics = self._collect(seed)
        # FPO learns at noised final images; the rollout has no points for it.
        if self.loss.uses_forward_points:
            generator = torch.Generator().manual_seed(seed)
            forward_points(episodes, self.variant.rules.time_shift, generator)
        parts = self._shuffle(episodes, seed)
        if self.recompute or self.loss.uses_forward_points:
            for part in parts:
                self.loss.recompute(part, log_probs=self.recompute)
        size = trainer.micro_batches
        updates = []
        for _ in range(trainer.epochs):
            # `size` micro-batches make one update.
            for start in range(0, len(parts), size):
                update = self._update(parts[start : start + size])
                if update:
                    updates.append(update)
        return metrics | mean_of_updates(updates)

    def _shuffle(self, episodes: Trajectory, seed: int) -> list[Trajectory]:
        """Whole groups in random order, as the parts of which updates are made."""
        # Whole groups are shuffled, not episodes: an update holds them complete.
        self.buffer.empty()
        self.buffer.set_rng(torch.Generator().manual_seed(seed))
        self.buffer.extend(episodes)
        parts: list[Trajectory] = []
        for groups in self.buffer:
            minibatch = groups.flatten(0, 1).to(self.config.model.device)
            # A part may hold less than a group: only the advantages compared its episodes.
            parts += minibatch.split(len(minibatch) // self.config.trainer.micro_batches)
        return parts

    def _supervised_iteration(self, seed: int) -> Metrics:
        """Supervised: as many demonstrations as there would be episodes, in as many updates."""
        settings = self.config.algorithm
        minibatches = self.config.trainer.minibatches
        task = require_demonstrations(self.variant)
        batch = task.demonstrations(self.env.num_envs, seed, clean=settings.clean_demonstrations)
        if self.variant.rules.text_budget == 0:
            batch = [demonstration.without_text() for demonstration in batch]
        generator = torch.Generator().manual_seed(seed)
        size = len(batch) // minibatches
        metrics: Metrics = {}
        for start in range(0, len(batch), size):
            text, image = sample_losses(
                self.model,
                self.variant,
                batch[start : start + size],
                generator,
                self.variant.rules.time_shift,
            )
            self.optimization.zero_grad()
            # The two terms are weighted as in the objective of RL.
            loss_text = settings.text_weight * text
            loss_image = settings.image_weight * image
            (loss_text + loss_image).backward()
            found = {
                "loss_text": float(loss_text.detach()),
                "loss_image": float(loss_image.detach()),
                **self.optimization.step(self.iteration),
            }
            for name, value in found.items():
                metrics[name] = metrics.get(name, 0.0) + value / minibatches
        scores = self.env.episodes.scorer.final(demonstration_batch(batch))
        metrics["reward"] = float(scores.reward.nanmean())
        return metrics

    def _collect(self, seed: int) -> tuple[Trajectory, Metrics]:
        """Collect and compare.

        With dynamic sampling "replace", groups without signal are collected again.
        """
        trainer = self.config.trainer
        task = self.variant.task
        self.score.prompts = task.prompts("train", trainer.groups, seed)
        episodes = self.collector.collect(self.score.prompts, seed, self.iteration)
        signal, metrics = self._add_advantages(episodes)
        # "keep" and "drop" collect once.
        attempts = 1
        if trainer.dynamic_sampling == "replace":
            attempts = trainer.max_collects
        for attempt in range(1, attempts):
            if signal.all():
                break
            again = derived_seed(seed, attempt)
            prompts = task.prompts("train", trainer.groups, again)
            more = self.collector.collect(prompts, again, self.iteration)
            found, _ = self._add_advantages(more)
            wanting = (~signal).nonzero()[:, 0].tolist()
            for group, other in zip(wanting, found.nonzero()[:, 0].tolist(), strict=False):
                more.group[other] = group
                # A group with signal takes the place of one without.
                episodes[group] = more[other]
                self.score.prompts[group] = prompts[other]
                signal[group] = True
        if trainer.dynamic_sampling == "drop":
            episodes.is_scored = episodes.is_scored & signal[:, None]
        return episodes, metrics

    def _add_advantages(self, episodes: Trajectory) -> tuple[Tensor, Metrics]:
        """Compare inside groups; see `agents.training.comparison.add_advantages`."""
        return add_advantages(
            episodes,
            self.config.algorithm.advantage,
            self.variant.rules.rounds,
            self.config.trainer.max_unscored,
            self.collector.failures,
        )

    def _update(self, parts: list[Trajectory]) -> Metrics:
        """One optimiser step on one mini-batch, its gradient summed over micro-batches."""
        episodes = sum(int(part.is_scored.sum()) for part in parts)
        if episodes == 0:
            # Nothing to learn from: a step would follow Adam's momentum alone.
            return {}
        # Counted over the whole update, so that its parts can be summed.
        tokens = sum(int(part.chosen_mask[part.is_scored].sum()) for part in parts)
        metrics: Metrics = {}
        self.score.begin(sum(len(part) for part in parts))
        self.optimization.zero_grad()
        for part in parts:
            part.episode_weight = part.is_scored.float() / episodes
            part.token_weight = part.episode_weight
            if self.config.algorithm.text_aggregation == "token":
                chosen = part.chosen_mask.sum(1) * part.is_scored
                part.token_weight = chosen / max(tokens, 1)
            out = self.loss(part)
            losses = [value for name, value in out.items() if name.startswith("loss_")]
            loss = torch.stack(losses).sum()
            # A part without an image has no gradient where the image expert alone learns.
            if loss.requires_grad:
                # Gradients add up over micro-batches; the weights make it the mean of the update.
                loss.backward()
            for name, tensor in out.items():
                value = float(tensor.detach())
                known = metrics.get(name, 0.0)
                if name.endswith("log_ratio"):
                    metrics[name] = max(known, value)
                else:
                    metrics[name] = known + value
        return metrics | self.optimization.step(self.iteration)

    def averaged(self) -> AbstractContextManager[None]:
        """For a `with` block: the averaged weights if `evaluation.ema`, else those of now."""
        average = self.optimization.average
        if average is None or not self.config.evaluation.ema:
            return nullcontext()
        return average.applied()

    def train(self, after_iteration: Callable[[Metrics], None] = lambda metrics: None) -> None:
        """Iterate until `trainer.iterations`.

        Args:
            after_iteration: called with the metrics of each.
        """
        while self.iteration < self.config.trainer.iterations:
            after_iteration(self.iterate())

    def save(self) -> Path:
        """Write a checkpoint in the run's folder; see `agents.training.checkpoint`."""
        output = self.config.output
        state = {"iteration": self.iteration, "config": self.config.to_dict()}
        return save_checkpoint(
            Path(output.folder) / "checkpoints",
            self.model,
            self.optimization,
            self.reference,
            state,
            output.keep_checkpoints,
        )

    @classmethod
    def resume(
        cls,
        run: str | Path,
        change: Callable[[Config], Config] = lambda config: config,
        model: UnifiedModel[Any] | None = None,
    ) -> Trainer:
        """The trainer of a run's last checkpoint.

        Args:
            run: the run's folder, or one checkpoint's.
            change: of the saved settings, to run for longer, say.
            model: what to go on with, where the checkpoint holds adapters alone and the trainer was
                given their model.

        Raises:
            ValueError: no checkpoint, or a damaged or foreign one.
        """
        checkpoint = latest_checkpoint(Path(run))
        config = change(Config.from_dict(read_state(checkpoint)["config"]))
        config.output.folder = str(checkpoint.parents[1])
        build.import_modules(config.output.imports)
        if model is None:
            model = build.read_saved_model(checkpoint / MODEL, config.model)
        trainer = cls(config, model)
        state = load_checkpoint(checkpoint, trainer.model, trainer.optimization, trainer.reference)
        trainer.iteration = state["iteration"]
        return trainer


def derived_seed(*key: int) -> int:
    """One 31-bit seed from several numbers."""
    return int(np.random.SeedSequence(key).generate_state(1)[0] >> 1)

"""A model in its scenario, to be measured on the held-out split."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from agents.config.schema import Config
from agents.evaluation.accuracy import Evaluation, evaluate
from agents.models.base import UnifiedModel
from agents.training import build
from agents.training.preparation import (
    check_reward_options,
    evaluation_rewards,
    prepare_rewards,
)
from unigrpo_env.tasks.task import Prompt


class Evaluator:
    """What the settings say of model, scenario and evaluation; `Trainer` adds the training.

    It holds the model alone: the optimiser and the reference of a trainer take several times its
    memory.

    Args:
        config: the settings.
        model: what to measure, in place of the one that the settings name.

    Attributes:
        model: the policy.
        processor: of the model.
        variant: the scenario.

    Raises:
        ValueError: settings that do not fit each other, or a model that does not fit the scenario.
        Exception: whatever keeps a reward from scoring, such as a package that is not installed.
    """

    def __init__(self, config: Config, model: UnifiedModel[Any] | None = None) -> None:
        self.config = config
        build.import_modules(config.output.imports)
        if config.trainer.threads:
            torch.set_num_threads(config.trainer.threads)
        if model is None:
            self.model = build.build_model(config)
        else:
            self.model = build.place_model(model, config)
        self.processor = build.build_processor(config.env, self.model)
        self.variant = build.build_variant(config.env, self.processor)
        build.check_model_fits(self.model, self.variant.rules)
        check_reward_options(config, self.variant)
        prepare_rewards(evaluation_rewards(config, self.variant), self.variant)

    def evaluate(
        self, *, greedy: bool = False, attempt: int = 0, prompts: int | None = None
    ) -> Evaluation:
        """The model on the held-out split.

        Args:
            greedy: take the likeliest token in place of a sampled one.
            attempt: every attempt draws other noise.
            prompts: so many of the split, from the first; all of it if left out.
        """
        settings = self.config.evaluation
        guidance = self.config.guidance
        variant = self.variant
        if settings.reward:
            variant = build.build_variant(self.config.env, self.processor, settings.reward)
        with self.averaged():
            return evaluate(
                self.model,
                variant,
                self.held_out()[:prompts],
                temperature=0.0 if greedy else self.config.algorithm.temperature,
                image_steps=settings.image_steps,
                seed=settings.seed + attempt * settings.prompts,
                guidance=build.build_guidance(guidance, guidance.evaluate),
                batch_size=settings.batch_size,
                device=self.config.model.device,
            )

    def averaged(self) -> AbstractContextManager[None]:
        """For a `with` block: the weights that are measured; a trainer may have averaged ones."""
        return nullcontext()

    def held_out(self) -> list[Prompt]:
        """The prompts of the held-out split."""
        settings = self.config.evaluation
        return self.variant.task.prompts("test", settings.prompts, settings.seed)

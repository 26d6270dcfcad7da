"""Supervised training in stages: how the shipped weights came about."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from agents.config.fields import setting
from agents.models.base import UnifiedModel
from agents.training.supervised import require_demonstrations, sample_losses
from unigrpo_env.tasks.task import Demonstration, DemonstrationTask
from unigrpo_env.variants.variant import Variant


@dataclass
class SupervisedSettings:
    """The recipe of supervised training."""

    steps: int = setting(1800, "updates")
    batch_size: int = setting(64, "examples an update")
    learning_rate: float = setting(2e-3, "highest learning rate; falls along a cosine")
    warmup: int = setting(100, "updates of warm-up")
    warmup_share: float = setting(
        0.4, "share of the updates, from the first, that are mostly warm-up demonstrations"
    )
    image_weight: float = setting(10.0, "weight of the flow-matching loss beside the token loss")
    time_shift: float = setting(3.0, "shift of the uniform flow time towards noise")
    text_dropout: float = setting(
        0.0, "share of the demonstrations whose image follows the prompt without a thought"
    )
    condition_dropout: float = setting(
        0.1, "share of the examples whose image follows nothing: what guidance steers away from"
    )
    clean: bool = setting(False, "demonstrations without errors")
    seed: int = setting(0, "of weights, demonstrations and noise")


@dataclass(frozen=True)
class PretrainingStage:
    """A part of the training of the shipped weights.

    Attributes:
        scenarios: registered variants, each with its share of an update's examples.
        settings: the recipe.
        first_demonstration: number of its first batch of demonstrations; stages share none.
    """

    scenarios: dict[str, float]
    settings: SupervisedSettings
    first_demonstration: int


STAGES = {
    "words": PretrainingStage({"text_to_image": 1.0}, SupervisedSettings(), 0),
    "reading": PretrainingStage(
        {"text_to_image": 0.3, "edit": 0.7},
        SupervisedSettings(steps=500, warmup_share=1.0),
        1_800,
    ),
    "rounds": PretrainingStage(
        {"text_to_image": 0.3, "edit": 0.2, "reflect": 0.2, "story": 0.15, "dialogue": 0.15},
        SupervisedSettings(steps=800, warmup_share=0.3, learning_rate=1.5e-3),
        2_300,
    ),
    "practice": PretrainingStage(
        {"text_to_image": 0.25, "edit": 0.2, "reflect": 0.3, "story": 0.2, "dialogue": 0.05},
        SupervisedSettings(steps=900, warmup_share=0.3, learning_rate=1.5e-3),
        3_100,
    ),
    "pair": PretrainingStage(
        {"text_to_image": 1.0},
        SupervisedSettings(steps=1200, batch_size=32, learning_rate=3e-3, warmup_share=0.15),
        0,
    ),
}
"""Recipes by name: those of `SHIPPED`, and `pair` for a thinker and a painter of its own."""
SHIPPED = ("words", "reading", "rounds", "practice")
"""To think and draw, then to read images, then all scenarios, then more of what is hard."""

AfterStep = Callable[[int, dict[str, float]], None]
"""Called with the step (from 1) and the losses."""


def train_supervised(
    model: UnifiedModel[Any],
    scenarios: Sequence[tuple[Variant, float]],
    settings: SupervisedSettings,
    after_step: AfterStep = lambda step, losses: None,
    *,
    first_demonstration: int = 0,
) -> None:
    """Train `model` on tasks with demonstrations, in place.

    Args:
        model: see `agents.models.base.UnifiedModel`.
        scenarios: variants with such tasks, each with its share of an update's examples. They stand
            in one batch, so they must share their processor; the first one's is used.
        settings: the recipe.
        after_step: called after each update.
        first_demonstration: number of the first batch, so that further training sees new ones.

    Raises:
        ValueError: a task without demonstrations.
    """
    shares = []
    for variant, share in scenarios:
        shares.append((require_demonstrations(variant), share))
    generator = torch.Generator().manual_seed(settings.seed)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(
        weights, lr=settings.learning_rate, betas=(0.9, 0.99), weight_decay=0.01
    )

    def _rate(step: int) -> float:
        rise = min(1.0, (step + 1) / max(settings.warmup, 1))
        return rise * (0.05 + 0.475 * (1 + math.cos(math.pi * step / settings.steps)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _rate)
    for step in range(settings.steps):
        # Every update sees demonstrations of its own number.
        number = settings.seed * 1_000_000 + first_demonstration + step
        batch: list[Demonstration] = []
        for task, share in shares:
            size = max(1, round(share * settings.batch_size))
            batch += _draw(task, size, number, step, settings, generator)
        text, image = sample_losses(model, scenarios[0][0], batch, generator, settings.time_shift)
        optimizer.zero_grad()
        (text + settings.image_weight * image).backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        losses = {"text_loss": float(text.detach()), "image_loss": float(image.detach())}
        after_step(step + 1, losses)


def _draw(
    task: DemonstrationTask,
    size: int,
    number: int,
    step: int,
    settings: SupervisedSettings,
    generator: torch.Generator,
) -> list[Demonstration]:
    """One task's part of a batch, some of it without text or without a prompt."""
    easy = 0
    if step < settings.warmup_share * settings.steps:
        # Warm-up demonstrations are easy to follow: they teach images to follow the text.
        easy = size * 3 // 4
    found = task.demonstrations(size - easy, number, clean=settings.clean)
    if easy:
        found = found + task.warmup_demonstrations(easy, number)
    # One number a demonstration, drawn whatever the shares are, so that seeds stay comparable.
    chances = torch.rand(size, generator=generator).tolist()
    for row, chance in enumerate(chances):
        without_text = settings.condition_dropout + settings.text_dropout
        if chance < settings.condition_dropout:
            found[row] = found[row].unconditional()
        elif chance < without_text and row < size - easy:
            found[row] = found[row].without_text()
    return found

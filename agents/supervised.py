"""Supervised training: next-token loss on the thought, flow matching on the picture. It makes the shipped weights, and the comparisons."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agents.config import setting
from agents.models.seam import UnifiedModel
from unigrpo_env.decoders import PixelDecoder
from unigrpo_env.episodes import Variant
from unigrpo_env.flow_time import shift_time
from unigrpo_env.tasks import Prompt


class Teacher(Protocol):
    """A task that can also show how it is done; see `unigrpo_env.shapes_world.ShapesTask`."""

    def lessons(self, count: int, seed: int, *, clean: bool = False) -> tuple[list[Prompt], list[str], Tensor]: ...
    def drills(self, count: int, seed: int) -> tuple[list[Prompt], list[str], Tensor]: ...


@dataclass
class SupervisedSettings:
    """The recipe of the shipped weights."""

    steps: int = setting(1800, "updates")
    batch_size: int = setting(64, "examples an update")
    learning_rate: float = setting(2e-3, "highest learning rate; it warms up and falls along a cosine")
    warmup: int = setting(100, "updates of warm-up")
    drills: float = setting(0.4, "share of the updates, from the first, that are mostly free layouts")
    image_weight: float = setting(10.0, "weight of the flow-matching loss beside the token loss")
    time_shift: float = setting(3.0, "shift of the uniform flow time towards noise")
    silent: float = setting(0.0, "share of the lessons whose picture follows the prompt without a thought")
    unprompted: float = setting(0.1, "share of the examples whose picture follows nothing: what guidance steers away from")
    clean: bool = setting(False, "lessons without habits and slips")
    seed: int = setting(0, "of weights, lessons and noise")


def pad(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Token lists as `[N, T]` int64, padded with 0, and the mask of what counts."""
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], dtype=torch.int64).view(len(rows), longest)
    return ids, torch.arange(longest) < torch.tensor([[len(row)] for row in rows])


def supervised_losses(
    model: UnifiedModel[Any],
    variant: Variant,
    prompts: Sequence[Prompt | None],
    thoughts: Sequence[str | None],
    latents: Tensor,
    t: Tensor,
    noise: Tensor,
) -> tuple[Tensor, Tensor]:
    """The two losses of a batch, in nats a token (0 without a thought) and mean squared velocity error.

    Args:
        model: the four verbs.
        variant: its tokenizer and its system prompt.
        prompts, thoughts: N of each; what is None is not read.
        latents, noise: `[N, L, C]`; x_t = (1 - t) latents + t noise, and the velocity to learn is noise - latents.
        t: `[N]` in [0, 1], 1 is noise.
    """
    tokenizer = variant.tokenizer

    def segments(rows: Iterable[Sequence[str]]) -> tuple[Tensor, Tensor]:
        encode, bos, eos = tokenizer.encode, tokenizer.bos_token_id, tokenizer.eos_token_id
        ids, mask = pad([[token for text in texts for token in (bos, *encode(text, add_special_tokens=False), eos)] for texts in rows])
        return ids.to(latents.device), mask.to(latents.device)

    system = [variant.system_prompt] if variant.system_prompt else []
    asked, asked_mask = segments([] if prompt is None else [*system, prompt.text] for prompt in prompts)
    said, said_mask = segments([] if thought is None else [thought] for thought in thoughts)
    _, context = model.read_text(model.start(len(prompts)), asked, asked_mask, last_only=True)
    text = torch.zeros((), device=latents.device)
    if said.shape[1]:
        logits, context = model.read_text(context, said, said_mask)
        targets = said[:, 1:].masked_fill(~said_mask[:, 1:], -100)
        text = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), ignore_index=-100)
    level = t[:, None, None]
    velocity = model.velocity(context, (1 - level) * latents + level * noise, t)
    return text, F.mse_loss(velocity, noise - latents)


def lessons(variant: Variant, count: int, seed: int, *, clean: bool = False) -> tuple[list[Prompt], list[str], Tensor, Tensor]:
    """Prompts, thoughts, pictures and their latents from a task that teaches.

    Raises:
        ValueError: the task has no lessons, or its latents are not pixels.
    """
    task, decoder = cast(Teacher, variant.task), variant.decode
    if not hasattr(task, "lessons") or not isinstance(decoder, PixelDecoder):
        raise ValueError(f"expected a task with lessons and pixel latents, got {type(task).__name__} and {type(decoder).__name__}")
    prompts, thoughts, pictures = task.lessons(count, seed, clean=clean)
    return prompts, thoughts, pictures, decoder.encode(pictures)


def train_supervised(
    model: UnifiedModel[Any],
    variant: Variant,
    settings: SupervisedSettings,
    after_step: Callable[[int, dict[str, float]], None] = lambda step, losses: None,
    *,
    first_lesson: int = 0,
) -> None:
    """Train `model` on a task that teaches, in place.

    Args:
        model: the four verbs.
        variant: its task must be a `Teacher`, its decoder a `PixelDecoder`.
        settings: the recipe.
        after_step: called with the step (from 1) and the losses.
        first_lesson: number of the first lesson, so that further training sees new ones.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=settings.learning_rate, betas=(0.9, 0.99), weight_decay=0.01)

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / max(settings.warmup, 1)) * (0.05 + 0.475 * (1 + math.cos(math.pi * step / settings.steps)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    for step in range(settings.steps):
        lesson = settings.seed * 1_000_000 + first_lesson + step
        drilled = settings.batch_size * 3 // 4 if step < settings.drills * settings.steps else 0
        prompts, thoughts, _, latents = lessons(variant, settings.batch_size - drilled, lesson, clean=settings.clean)
        if drilled:
            more = cast(Teacher, variant.task).drills(drilled, lesson)
            prompts, thoughts = prompts + more[0], thoughts + more[1]
            latents = torch.cat([latents, cast(PixelDecoder, variant.decode).encode(more[2])])
        chance = torch.rand(len(prompts), generator=generator).tolist()
        unprompted = [p < settings.unprompted for p in chance]
        silent = [p < settings.unprompted + settings.silent for p in chance[: settings.batch_size - drilled]] + [False] * drilled
        t = torch.rand(len(prompts), generator=generator)
        t = shift_time(t, settings.time_shift)
        noise = torch.randn(latents.shape, generator=generator)
        text, image = supervised_losses(
            model,
            variant,
            [None if left else prompt for prompt, left in zip(prompts, unprompted, strict=True)],
            [None if left or quiet else thought for thought, left, quiet in zip(thoughts, unprompted, silent, strict=True)],
            latents,
            t,
            noise,
        )
        optimizer.zero_grad()
        (text + settings.image_weight * image).backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        after_step(step + 1, {"text_loss": float(text.detach()), "image_loss": float(image.detach())})

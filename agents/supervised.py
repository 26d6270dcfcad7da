"""Supervised training: next-token loss on the thought, flow matching on the picture. It makes the shipped weights, and the comparisons."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agents.config import setting
from agents.models.seam import UnifiedModel
from unigrpo_env.decoders import PixelDecoder
from unigrpo_env.episodes import Variant
from unigrpo_env.flow_time import shift_time
from unigrpo_env.tasks import Lesson, Teacher


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


@dataclass(frozen=True)
class Course:
    """A part of the shipped weights' schooling.

    Attributes:
        scenarios: registered variants, each with its share of an update's examples.
        settings: the recipe.
        first_lesson: number of its first lesson; courses share none.
    """

    scenarios: dict[str, float]
    settings: SupervisedSettings
    first_lesson: int


COURSES = {
    "words": Course({"text_to_image": 1.0}, SupervisedSettings(), 0),
    "reading": Course({"text_to_image": 0.3, "edit": 0.7}, SupervisedSettings(steps=500, drills=1.0), 1_800),
    "rounds": Course(
        {"text_to_image": 0.3, "edit": 0.2, "reflect": 0.2, "story": 0.15, "dialogue": 0.15},
        SupervisedSettings(steps=800, drills=0.3, learning_rate=1.5e-3),
        2_300,
    ),
    "practice": Course(
        {"text_to_image": 0.25, "edit": 0.2, "reflect": 0.3, "story": 0.2, "dialogue": 0.05},
        SupervisedSettings(steps=900, drills=0.3, learning_rate=1.5e-3),
        3_100,
    ),
}
"""How the shipped weights came about: to think and draw, then to look at pictures, then everything that takes several, then more of what is hard."""


def pad(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Token lists as `[N, T]` int64, padded with 0, and the mask of what counts."""
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], dtype=torch.int64).view(len(rows), longest)
    return ids, torch.arange(longest) < torch.tensor([[len(row)] for row in rows])


def supervised_losses(
    model: UnifiedModel[Any], variant: Variant, lessons: Sequence[Lesson], latents: Tensor, t: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """The two losses of a batch, in nats a token (0 without a thought) and mean squared velocity error.

    One walk along the lessons, as the env would lay out their episodes: words, the noisy picture that they open, the picture, and on.

    Args:
        model: see `agents.models.seam.UnifiedModel`.
        variant: its tokenizer, its system prompt, how it encodes sources.
        lessons: N episodes, of whatever scenarios that share these.
        latents, noise: `[P, L, C]`, of the P pictures of all lessons, lesson by lesson; x_t = (1 - t) latents + t noise, and the velocity to learn is
            noise - latents.
        t: `[P]` in [0, 1], 1 is noise.
    """
    device = latents.device

    def batch(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        ids, mask = pad(rows)
        return ids.to(device), mask.to(device)

    scripts = [_script(variant, lesson) for lesson in lessons]
    context = _read_sources(model, variant, lessons, device)
    if any(script[0] for script in scripts):
        _, context = model.read_text(context, *batch([script[0] for script in scripts]), last_only=True)
    counts = torch.tensor([len(lesson.pictures) for lesson in lessons])
    first = counts.cumsum(0) - counts
    rows = torch.arange(len(lessons))  # the lessons that the context still holds
    logits, targets, velocities, pictures = list[Tensor](), list[Tensor](), list[Tensor](), list[Tensor]()
    for number in range(max(len(lesson.thoughts) for lesson in lessons)):
        left = torch.tensor([number < len(lessons[row].thoughts) for row in rows.tolist()])
        if not left.all():
            context, rows = context.select(left.nonzero()[:, 0].to(device)), rows[left]
        if number:
            context = model.read_image(context, latents[(first[rows] + number - 1).to(device)])
        user, own = ([scripts[row][1][number][part] for row in rows.tolist()] for part in (0, 1))
        ids, mask = batch([heard + said for heard, said in zip(user, own, strict=True)])
        if ids.shape[1]:
            found, context = model.read_text(context, ids, mask)
            # What the model says begins after the <bos> of its own segment.
            begin = torch.tensor([len(heard) + 1 for heard in user], device=device)[:, None]
            chosen = mask & (torch.arange(ids.shape[1], device=device) >= begin)
            if chosen.any():
                logits.append(found[:, :-1].flatten(0, 1))
                targets.append(ids.masked_fill(~chosen, -100)[:, 1:].flatten())
        draws = number < counts[rows]
        if draws.any():
            at = (first[rows] + number)[draws].to(device)
            opened = context if draws.all() else context.select(draws.nonzero()[:, 0].to(device))
            level = t[at][:, None, None]
            velocities.append(model.velocity(opened, (1 - level) * latents[at] + level * noise[at], t[at]))
            pictures.append(at)
    text = F.cross_entropy(torch.cat(logits), torch.cat(targets), ignore_index=-100) if logits else torch.zeros((), device=device)
    order = torch.cat(pictures)
    return text, F.mse_loss(torch.cat(velocities), noise[order] - latents[order])


Script = tuple[list[int], list[tuple[list[int], list[int]]]]
"""A lesson's tokens: the prompt, and for each round what the user says and what the model says."""


def _script(variant: Variant, lesson: Lesson) -> Script:
    tokenizer, prompt = variant.tokenizer, lesson.prompt

    def segment(text: str, end: tuple[int, ...] = (tokenizer.eos_token_id,)) -> list[int]:
        return [tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False), *end]

    asked = [token for text in (variant.system_prompt, prompt.text) if text for token in segment(text)] if prompt else []
    turns, rounds = prompt.turns if prompt else (), list[tuple[list[int], list[int]]]()
    for number, thought in enumerate(lesson.thoughts):
        user = segment(turns[number - 1]) if 0 < number <= len(turns) else []
        opens = number < len(lesson.pictures)  # words after the last picture end the episode themselves
        own = [] if thought is None else segment(thought) if opens else segment(thought, ())
        rounds.append((user, own))
    return asked, rounds


def _read_sources(model: UnifiedModel[Any], variant: Variant, lessons: Sequence[Lesson], device: torch.device) -> Any:
    """A context of the pictures that came with each prompt."""
    context = model.start(len(lessons))
    sources = [_encode(variant, lesson.prompt.sources if lesson.prompt else ()).to(device) for lesson in lessons]
    for number in range(max(map(len, sources))):
        there = torch.tensor([number < len(source) for source in sources], device=device)
        seen = [source[number] if number < len(source) else torch.zeros(variant.rules.latent_shape, device=device) for source in sources]
        context = model.read_image(context, torch.stack(seen), mask=there)
    return context


def _encode(variant: Variant, pictures: Sequence[Tensor]) -> Tensor:
    """Pictures as latents, `[P, L, C]`; ValueError if these are not pixels."""
    if not isinstance(variant.decode, PixelDecoder):
        raise ValueError(f"expected pixel latents to teach, got {type(variant.decode).__name__}")
    return variant.decode.encode(torch.stack(list(pictures))) if pictures else torch.zeros(0, *variant.rules.latent_shape)


def teach(
    model: UnifiedModel[Any], variant: Variant, lessons: Sequence[Lesson], generator: torch.Generator, time_shift: float
) -> tuple[Tensor, Tensor]:
    """`supervised_losses` at random points: t uniform, then shifted; noise standard normal; both from `generator`, on the CPU."""
    device = next(model.parameters()).device
    latents = _encode(variant, [picture for lesson in lessons for picture in lesson.pictures])
    t = shift_time(torch.rand(len(latents), generator=generator), time_shift)
    noise = torch.randn(latents.shape, generator=generator)
    return supervised_losses(model, variant, lessons, latents.to(device), t.to(device), noise.to(device))


def teacher(variant: Variant) -> Teacher:
    """The variant's task.

    Raises:
        ValueError: it has no lessons.
    """
    if not hasattr(variant.task, "lessons"):
        raise ValueError(f"expected a task with lessons, got {type(variant.task).__name__}")
    return cast(Teacher, variant.task)


def train_supervised(
    model: UnifiedModel[Any],
    scenarios: Sequence[tuple[Variant, float]],
    settings: SupervisedSettings,
    after_step: Callable[[int, dict[str, float]], None] = lambda step, losses: None,
    *,
    first_lesson: int = 0,
) -> None:
    """Train `model` on tasks that teach, in place.

    Args:
        model: see `agents.models.seam.UnifiedModel`.
        scenarios: variants whose tasks are `Teacher`s, each with its share of an update's examples. They stand in one batch, so they must share tokenizer
            and latents; the first one's are used.
        settings: the recipe.
        after_step: called with the step (from 1) and the losses.
        first_lesson: number of the first lesson, so that further training sees new ones.
    """
    model.look_with(scenarios[0][0].decode)
    shares = [(teacher(variant), share) for variant, share in scenarios]
    generator = torch.Generator().manual_seed(settings.seed)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=settings.learning_rate, betas=(0.9, 0.99), weight_decay=0.01)

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / max(settings.warmup, 1)) * (0.05 + 0.475 * (1 + math.cos(math.pi * step / settings.steps)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    for step in range(settings.steps):
        number = settings.seed * 1_000_000 + first_lesson + step
        lessons = list[Lesson]()
        for task, share in shares:
            size = max(1, round(share * settings.batch_size))
            drilled = size * 3 // 4 if step < settings.drills * settings.steps else 0
            found = task.lessons(size - drilled, number, clean=settings.clean) + (task.drills(drilled, number) if drilled else [])
            for row, chance in enumerate(torch.rand(size, generator=generator).tolist()):
                if chance < settings.unprompted:
                    found[row] = found[row].unprompted()
                elif chance < settings.unprompted + settings.silent and row < size - drilled:
                    found[row] = found[row].silent()
            lessons += found
        text, image = teach(model, scenarios[0][0], lessons, generator, settings.time_shift)
        optimizer.zero_grad()
        (text + settings.image_weight * image).backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        after_step(step + 1, {"text_loss": float(text.detach()), "image_loss": float(image.detach())})

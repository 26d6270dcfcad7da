"""Held-out accuracy: fixed prompts, noise that depends on the episode alone, and the ODE."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from agents.models.base import UnifiedModel
from agents.policy.actor import Actor
from agents.policy.guidance import Guidance
from agents.rollout.collector import rollout
from unigrpo_env.tasks.task import Prompt, join_thoughts
from unigrpo_env.variants.variant import Variant
from unigrpo_env.vector_env import InterleavedGenVectorEnv


@dataclass(frozen=True)
class Evaluation:
    """What a model wrote and drew for a list of N prompts, and its rewards.

    Attributes:
        prompts: the prompts.
        thoughts: for each episode the text before each image, and after the last if there is one.
        all_images: for each episode all images in order, `[drawn, 3, height, width]`
            float32 in [0, 1].
        reward: `[N]` float32; NaN where an episode could not be scored.
        components: the named parts of the reward, each `[N]` float32.
    """

    prompts: list[Prompt]
    thoughts: list[list[str]]
    all_images: list[Tensor]
    reward: Tensor
    components: dict[str, Tensor]

    @property
    def texts(self) -> list[str]:
        """All that the model wrote in each episode."""
        return [join_thoughts(thoughts) for thoughts in self.thoughts]

    @property
    def images(self) -> Tensor:
        """The last image of each episode, `[N, 3, height, width]`; black where there is none."""
        # [1, 3, height, width]; an empty stack of images still has the right size.
        blank = torch.zeros(1, *self.all_images[0].shape[1:])
        last = []
        for images in self.all_images:
            # [1, 3, height, width]
            last.append(images[-1:] if len(images) else blank)
        return torch.cat(last)

    @property
    def accuracy(self) -> float:
        """The mean of the rewards of the episodes that were scored."""
        return float(self.reward.nanmean())

    @property
    def means(self) -> dict[str, float]:
        """The mean of each named part of the reward; empty if there is only one part."""
        if len(self.components) < 2:
            return {}
        return {name: float(values.nanmean()) for name, values in self.components.items()}

    def by(self, key: str) -> dict[str, float]:
        """Compute the accuracy for each value of a prompt's metadata.

        Args:
            key: the name of the entry in the metadata.

        Returns:
            The accuracy by value, sorted by value; empty if no prompt has such an entry.
        """
        values = [prompt.metadata.get(key) for prompt in self.prompts]
        kinds = sorted({str(value) for value in values if value is not None})
        found = {}
        for kind in kinds:
            # A mask over the N episodes.
            rows = [str(value) == kind for value in values]
            found[kind] = float(self.reward[rows].nanmean())
        return found


def evaluate(
    model: UnifiedModel[Any],
    variant: Variant,
    prompts: Sequence[Prompt],
    *,
    temperature: float = 1.0,
    image_steps: int | None = None,
    seed: int = 1_000_000,
    guidance: Guidance | None = None,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
) -> Evaluation:
    """Run one episode for each prompt; the episode of prompt i has the seed `seed + i`.

    Args:
        model: the model; see `agents.models.base.UnifiedModel`.
        variant: the scenario; its reward is the measure.
        prompts: the prompts, at least one.
        temperature: sampling temperature of the tokens; 0 for greedy text.
        image_steps: denoising steps of an image; the variant's own if it is left out.
        seed: the seed of the first episode.
        guidance: classifier-free guidance; none if it is left out.
        batch_size: episodes at a time; it changes no result beyond rounding.
        device: the device of the env's tensors.

    Raises:
        ValueError: if there is no prompt, or one that the variant does not take.
    """
    if not prompts:
        raise ValueError("expected at least one prompt to evaluate on, got none; give some prompts")
    variant = variant.with_image_steps(image_steps)

    actor = Actor(model, temperature=temperature, guidance=guidance)
    parts = []
    for start in range(0, len(prompts), batch_size):
        batch = list(prompts[start : start + batch_size])
        parts.append(_evaluate_batch(actor, variant, batch, seed + start, device))
    return _concatenate(parts)


def _evaluate_batch(
    actor: Actor,
    variant: Variant,
    prompts: list[Prompt],
    first_seed: int,
    device: torch.device | str,
) -> Evaluation:
    """Evaluate some prompts; nothing of them stays on the device."""
    env = InterleavedGenVectorEnv(variant, len(prompts), copy=False, device=device)
    # The seed belongs to the prompt, so the split into batches changes no episode.
    seeds = list(range(first_seed, first_seed + len(prompts)))
    observation, _ = env.reset(seed=seeds, options={"prompts": prompts})
    # The actor draws tokens and noise from these seeds, row by row.
    actor.start(seeds)
    result = rollout(env, actor, observation)
    # What was read takes memory that decoding needs.
    actor.cache.clear()
    rows = range(len(prompts))
    return Evaluation(
        prompts=prompts,
        thoughts=env.episodes.thoughts(rows),
        # Images go to the CPU: those of all batches may not fit on the device.
        all_images=[images.cpu() for images in env.episodes.all_images(rows)],
        reward=result.reward,
        components=result.components,
    )


def _concatenate(parts: Sequence[Evaluation]) -> Evaluation:
    # [episodes of all parts]
    whole = Evaluation([], [], [], torch.cat([part.reward for part in parts]), {})
    for part in parts:
        whole.prompts.extend(part.prompts)
        whole.thoughts.extend(part.thoughts)
        whole.all_images.extend(part.all_images)
    for name in parts[0].components:
        whole.components[name] = torch.cat([part.components[name] for part in parts])
    return whole

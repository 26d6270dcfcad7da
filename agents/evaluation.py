"""Held-out accuracy: fixed prompts, noise keyed by episode, the ODE, any number of denoising steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from agents.actor import Actor
from agents.collector import play
from agents.guidance import Guidance
from agents.models.seam import UnifiedModel
from unigrpo_env.episodes import Variant
from unigrpo_env.tasks import Prompt
from unigrpo_env.vector import InterleavedGenVectorEnv


@dataclass(frozen=True)
class Evaluation:
    """What a model made of a list of prompts.

    Attributes:
        prompts: the prompts.
        texts: its thoughts.
        images: its pictures, `[N, 3, height, width]` float32 in [0, 1].
        reward: `[N]` float32; NaN where it could not be scored.
        components: named parts of the reward, `[N]` float32.
    """

    prompts: list[Prompt]
    texts: list[str]
    images: Tensor
    reward: Tensor
    components: dict[str, Tensor]

    @property
    def accuracy(self) -> float:
        """Mean of the scored rewards."""
        return float(self.reward.nanmean())

    def by(self, key: str) -> dict[str, float]:
        """Accuracy for each value of a prompt's metadata entry `key`; empty if prompts have none."""
        values = [prompt.metadata.get(key) for prompt in self.prompts]
        kinds = sorted({str(value) for value in values if value is not None})
        return {kind: float(self.reward[[str(value) == kind for value in values]].nanmean()) for kind in kinds}


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
    """Play one episode a prompt, prompt i from `seed + i`.

    Args:
        model: the four verbs.
        variant: the scenario; its reward is the measure.
        prompts: what to ask for.
        temperature: of the tokens; 0 for greedy text.
        image_steps: denoising steps; the variant's own if left out.
        seed: of the first episode.
        guidance: classifier-free guidance; none if left out.
        batch_size: episodes at a time; changes no result beyond rounding.
        device: where the env lives.
    """
    if not prompts:
        raise ValueError("expected at least one prompt to evaluate on, got none")
    if image_steps is not None:
        variant = dataclasses.replace(variant, rules=dataclasses.replace(variant.rules, image_steps=image_steps))
    actor = Actor(model, temperature=temperature, guidance=guidance)
    parts: list[dict[str, Any]] = []
    for start in range(0, len(prompts), batch_size):
        batch = list(prompts[start : start + batch_size])
        env = InterleavedGenVectorEnv(variant, len(batch), copy=False, device=device)
        seeds = [seed + start + row for row in range(len(batch))]
        observation, _ = env.reset(seed=seeds, options={"prompts": batch})
        actor.start(seeds)
        _, reward, components = play(env, actor, observation)
        parts.append({"texts": env.texts(), "images": env.images().cpu(), "reward": reward, "components": components})
    names = parts[0]["components"]
    return Evaluation(
        prompts=list(prompts),
        texts=[text for part in parts for text in part["texts"]],
        images=torch.cat([part["images"] for part in parts]),
        reward=torch.cat([part["reward"] for part in parts]),
        components={name: torch.cat([part["components"][name] for part in parts]) for name in names},
    )

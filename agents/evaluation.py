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
from unigrpo_env.tasks import Prompt, join_rounds
from unigrpo_env.vector import InterleavedGenVectorEnv


@dataclass(frozen=True)
class Evaluation:
    """What a model made of a list of prompts.

    Attributes:
        prompts: the prompts.
        rounds: its words before each picture, and after the last if it went on.
        pictures: all that it drew, in order, `[drawn, 3, height, width]` float32 in [0, 1].
        reward: `[N]` float32; NaN where it could not be scored.
        components: named parts of the reward, `[N]` float32.
    """

    prompts: list[Prompt]
    rounds: list[list[str]]
    pictures: list[Tensor]
    reward: Tensor
    components: dict[str, Tensor]

    @property
    def texts(self) -> list[str]:
        """All that it wrote, an episode."""
        return [join_rounds(said) for said in self.rounds]

    @property
    def images(self) -> Tensor:
        """The last picture of each episode, `[N, 3, height, width]`; black where there is none."""
        blank = torch.zeros(1, *self.pictures[0].shape[1:])
        return torch.cat([drawn[-1:] if len(drawn) else blank for drawn in self.pictures])

    @property
    def accuracy(self) -> float:
        """Mean of the scored rewards."""
        return float(self.reward.nanmean())

    @property
    def means(self) -> dict[str, float]:
        """Mean of each named part of the reward, where there are several."""
        return {name: float(values.nanmean()) for name, values in self.components.items()} if len(self.components) > 1 else {}

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
        model: see `agents.models.seam.UnifiedModel`.
        variant: the scenario; its reward is the measure.
        prompts: what to ask for.
        temperature: of the tokens; 0 for greedy text.
        image_steps: denoising steps; the variant's own if left out.
        seed: of the first episode.
        guidance: classifier-free guidance; none if left out.
        batch_size: episodes at a time; changes no result beyond rounding.
        device: where the env lives.

    Raises:
        ValueError: no prompts, or one that the variant does not take.
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
        played = play(env, actor, observation)
        rows, episodes = range(len(batch)), env.episodes
        pictures = [drawn.cpu() for drawn in episodes.pictures(rows)]
        parts.append({"rounds": episodes.rounds(rows), "pictures": pictures, "reward": played.reward, "components": played.components})
    names = parts[0]["components"]
    return Evaluation(
        prompts=list(prompts),
        rounds=[said for part in parts for said in part["rounds"]],
        pictures=[drawn for part in parts for drawn in part["pictures"]],
        reward=torch.cat([part["reward"] for part in parts]),
        components={name: torch.cat([part["components"][name] for part in parts]) for name in names},
    )

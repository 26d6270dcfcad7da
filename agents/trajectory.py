"""Every field of a trajectory: its shape and its meaning.

The collector writes it, `evaluate_actions` and the loss read it, the trainer adds advantages.
"""

from __future__ import annotations

from pathlib import Path
from typing import Self

import torch
from tensordict import TensorClass, TensorDict, TensorDictBase
from torch import Tensor

from agents.storage import read_tensors, write_tensors

BATCH_SIZE = "batch_size"
"""Name under which a file keeps the batch dimensions."""
COMPONENT = "components."
"""Prefix under which it keeps the components of the reward."""
RECORDED = (
    "prompt_tokens", "prompt_roles", "prompt_length", "tokens", "roles", "text_mask",
    "chosen_mask", "log_prob", "window_latents", "window_means", "window_times", "images_drawn",
    "latent", "images", "pixels", "image_positions", "reward", "thought_reward", "round_reward",
    "group", "seed",
)  # fmt: skip
"""The fields that every trajectory has; the others are the trainer's."""


class Trajectory(TensorClass):
    """Episodes as recorded; a typed TensorDict.

    Batch dimensions are [groups, group_size], or [N] after `flatten(0, 1)`. R is the number of
    images that an episode may draw, W the size of the stochastic window, K the number of tokens
    after the prompt, P that of the prompt, L x C the latent, M the number of images that may be
    read. Float fields are float32, masks are bool, the others int64.

    Attributes:
        prompt_tokens: `[P]`, what the model was given, padded with 0.
        prompt_roles: `[P]`, who wrote each of them, a `Role`.
        prompt_length: `[]`, how many of them count.
        tokens: `[K]`, the stream after the prompt: thoughts with their opening tokens and, between
            images, what the env wrote.
        roles: `[K]`, who wrote each of them, a `Role`.
        text_mask: `[K]`, which of `tokens` count.
        chosen_mask: `[K]`, which of them the policy chose. Forced ones and the env's are not.
        log_prob: `[K]`, of the chosen tokens by the policy that wrote them; 0 elsewhere.
        window_latents: `[R, W + 1, L, C]`, x before each stochastic step and after the last.
        window_means: `[R, W, L, C]`, mean of each step's Gaussian, by the policy that drew.
        window_times: `[R, W + 1]`, flow times of `window_latents`, falling within each image.
        images_drawn: `[]`, images of the episode; the entries of further ones hold nothing.
        latent: `[L, C]`, the last finished image.
        images: `[M, L, C]`, clean latents that were read, sources first; without latent tokens
            where the model read pixels alone.
        pixels: `[M, 3, height, width]` uint8, what the model's vision encoder saw of them; of size
            0 x 0 for a model without one.
        image_positions: `[M]`, where in prompt and tokens each of them stands; -1: nowhere.
        reward: `[]`, paid at the end; NaN where the episode could not be scored.
        thought_reward: `[R]`, what each thought was paid; 0 where nothing was.
        round_reward: `[R]`, what each image was paid; 0 where nothing was.
        group: `[]`, the group's id.
        seed: `[]`, what the actor's noise was drawn from, and x_1 unless the group shares its.
        components: named parts of the reward, float32.
        returns: `[]` or `[2 R]`, what the advantage was taken from: one number an episode, or one
            for each thought and image in turn. This and all that follows is the trainer's.
        text_advantage: `[K]`, the advantage of each token.
        image_advantage: `[R, W]`, the advantage of each stochastic step.
        step_mask: `[R, W]`, which of the stochastic steps there were.
        is_scored: `[]` bool, whether the episode counts.
        episode_weight: `[]`, its share in the mean of the update.
        token_weight: `[]`, its share in the text terms.
        flow_loss: `[R, W]`, the flow-matching loss before the first update, for FPO.
    """

    prompt_tokens: Tensor
    prompt_roles: Tensor
    prompt_length: Tensor
    tokens: Tensor
    roles: Tensor
    text_mask: Tensor
    chosen_mask: Tensor
    log_prob: Tensor
    window_latents: Tensor
    window_means: Tensor
    window_times: Tensor
    images_drawn: Tensor
    latent: Tensor
    images: Tensor
    pixels: Tensor
    image_positions: Tensor
    reward: Tensor
    thought_reward: Tensor
    round_reward: Tensor
    group: Tensor
    seed: Tensor
    components: TensorDict | None = None
    # Below are the fields of the trainer; until it fills them in they are None.
    returns: Tensor = None  # type: ignore[assignment]
    text_advantage: Tensor = None  # type: ignore[assignment]
    image_advantage: Tensor = None  # type: ignore[assignment]
    step_mask: Tensor = None  # type: ignore[assignment]
    is_scored: Tensor = None  # type: ignore[assignment]
    episode_weight: Tensor = None  # type: ignore[assignment]
    token_weight: Tensor = None  # type: ignore[assignment]
    flow_loss: Tensor = None  # type: ignore[assignment]

    def save(self, path: str | Path) -> Path:
        """Write all fields to one safetensors file; returns its path."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = dict(self.to_tensordict().exclude("components").items())
        # A file has no nested entries, so the components get a prefix.
        if self.components is not None:
            for name, values in self.components.items():
                tensors[COMPONENT + name] = values
        # Shapes alone do not say which of the first axes are batch dimensions.
        tensors[BATCH_SIZE] = torch.tensor(self.batch_size)
        write_tensors(tensors, path)
        return path

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote.

        Args:
            path: of the file.

        Raises:
            ValueError: no such file, a damaged one, or one that holds no trajectory.
        """
        tensors = read_tensors(Path(path))
        components = {}
        # A list, because the loop removes entries from `tensors`.
        for name in [name for name in tensors if name.startswith(COMPONENT)]:
            components[name.removeprefix(COMPONENT)] = tensors.pop(name)
        known = {BATCH_SIZE, *(field.name for field in cls.fields())}
        # The fields of the trainer may be missing.
        missing = sorted({BATCH_SIZE, *RECORDED} - tensors.keys())
        unknown = sorted(tensors.keys() - known)
        if missing or unknown:
            raise ValueError(
                f"expected a saved Trajectory in {path}, got a file without {missing[:4]} and with "
                f"unknown {unknown[:4]}; was it written by Trajectory.save?"
            )
        try:
            batch_size = torch.Size(tensors.pop(BATCH_SIZE).tolist())
            parts = TensorDict(components, batch_size)
            return cls(**tensors, components=parts, batch_size=batch_size)
        except (RuntimeError, TypeError) as error:
            raise ValueError(
                f"expected a saved Trajectory in {path}, got tensors that do not fit each other "
                f"({str(error).splitlines()[0]}); was it written by Trajectory.save?"
            ) from error

    @classmethod
    def of(cls, episodes: TensorDictBase | Trajectory) -> Trajectory:
        """Turn episodes that came out of a buffer as a TensorDict into a `Trajectory`."""
        if isinstance(episodes, cls):
            return episodes
        # A buffer adds entries of its own, such as `index` and priorities.
        names = [field.name for field in cls.fields()]
        return cls.from_tensordict(episodes.select(*names, strict=False))

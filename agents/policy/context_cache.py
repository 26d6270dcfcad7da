"""What the model has read of each row, kept from one observation to the next."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from agents.models.base import Context, UnifiedModel
from agents.policy.prefill import Sources, append_and_predict, partial_mask, read_prompts
from agents.policy.segments import (
    ImageSegment,
    image_contents,
    image_inputs,
    segments,
    stored_images,
)
from unigrpo_env.mdp.rules import Role


class ContextCache:
    """A memo of the observation: `sync` reads what is new, and starts over where the two disagree.

    The context holds the first `cached_length` tokens of `cached_tokens`. The token that was
    sampled last is pending: the next observation is expected to show it, and nothing else.

    Args:
        model: reads text and images.

    Attributes:
        prompt_budget: how much of the token buffer only a prompt can fill, where that is known; no
            room is made for it beyond the prompt.
    """

    def __init__(self, model: UnifiedModel[Any]) -> None:
        self.model = model
        self.prompt_budget = 0
        self.context: Context | None = None
        self.logits = torch.zeros(0)
        self._cached_tokens = torch.zeros(0)
        self._cached_length = torch.zeros(0)
        self._cached_images = torch.zeros(0)
        # The observation's own tensor of images, and its version when it was compared.
        self._compared: tuple[Tensor, int] | None = None
        self._expected_length = torch.zeros(0)
        self._pending: tuple[Tensor, Tensor] | None = None
        self._subset: tuple[Tensor, Tensor, Context] | None = None

    def clear(self) -> None:
        """Forget everything; call it after a change of the weights."""
        self.context = None
        self._subset = None
        self._compared = None

    def sync(self, observation: dict[str, Tensor]) -> bool:
        """Bring context and logits to what the observation says.

        Args:
            observation: the vector env's.

        Returns:
            Whether all had to be read anew.
        """
        # [N, max_tokens]
        tokens = observation["tokens"]
        restarted = False
        if self.context is None or self._cached_tokens.shape != tokens.shape:
            self._start(observation)
            restarted = True
        if self._only_pending_is_new(observation):
            if self._pending is not None:
                ids, active = self._pending
                self._append(ids, active, torch.full_like(ids, Role.MODEL))
            self._cached_length = self._expected_length
        else:
            if self._has_changed(observation):
                self._start(observation)
                restarted = True
            self._append_new_segments(observation)
            self._cached_tokens.copy_(tokens)
            # Nothing is pending any more: the next token will be expected anew.
            self._expected_length = self._cached_length
        self._pending = None
        return restarted

    def expect(self, token: Tensor, active: Tensor, length: Tensor) -> None:
        """Note the token that was sampled, so that the next `sync` needs no comparison.

        Args:
            token: `[N, 1]` int64.
            active: `[N]` bool, the rows that it is for.
            length: `[N]` int64, tokens of each row before it.
        """
        position = length[:, None].clamp(max=self._cached_tokens.shape[1] - 1)
        before = self._cached_tokens.gather(1, position)
        chosen = torch.where(active[:, None], token, before)
        self._cached_tokens.scatter_(1, position, chosen)
        self._pending = token, active[:, None]
        self._expected_length = length + active

    def rows(self, active: Tensor) -> tuple[Tensor, Context]:
        """The active rows, int64, and a context of theirs, kept for as long as they are the same.

        Args:
            active: `[N]` bool.
        """
        assert self.context is not None
        # A few rows that draw while others write keep a context of their own for all their steps.
        if self._subset is None or not torch.equal(self._subset[0], active):
            index = active.nonzero()[:, 0].to(self.model.device)
            self._subset = active.clone(), index, self.context.select(index)
        return self._subset[1], self._subset[2]

    def _start(self, observation: dict[str, Tensor]) -> None:
        lengths = observation["prompt_length"]
        tokens = observation["tokens"]
        longest = int(lengths.max())
        # Padding differs between observations of one prompt; zeros make equal prompts equal.
        beyond = torch.arange(longest, device=tokens.device) >= lengths[:, None]
        prompts = tokens[:, :longest].masked_fill(beyond, 0)
        roles = observation["roles"][:, :longest]
        sources = None
        # Images that may still have to be read.
        more_images = 0
        # Without images an empty tensor stands in their place: the walk needs no case for it.
        self._cached_images = tokens[:, :0]
        self._compared = None
        if "images" in observation:
            self._cached_images = _contents(observation).clone()
            images, pixels = stored_images(observation)
            sources = Sources.of(images, pixels, observation["image_positions"], lengths)
            more_images = images.shape[1] - sources.positions.shape[1]
        self.logits, self.context = read_prompts(self.model, prompts, lengths, roles, sources)
        # Room for the whole episode at once, so that no token makes the cache grow.
        filled = max(longest, self.prompt_budget)
        self.model.reserve(self.context, tokens.shape[1] - filled, more_images)
        self._subset = None
        self._cached_tokens = tokens.clone()
        self._cached_length = lengths.clone()
        self._expected_length = self._cached_length
        self._pending = None

    def _only_pending_is_new(self, observation: dict[str, Tensor]) -> bool:
        if not torch.equal(self._cached_tokens, observation["tokens"]):
            return False
        if not torch.equal(self._expected_length, observation["num_tokens"]):
            return False
        if "images" not in observation or self._pending is not None:
            # Between two tokens of a text no image can change.
            return True
        return self._has_same_images(_contents(observation))

    def _has_same_images(self, contents: Tensor) -> bool:
        compared = self._compared
        # An env that hands out its own tensor, unchanged, needs no second comparison. That would
        # make every denoising step wait for the device.
        if compared is not None and compared[0] is contents and compared[1] == contents._version:
            return True
        if not torch.equal(self._cached_images, contents):
            return False
        self._compared = contents, contents._version
        return True

    def _has_changed(self, observation: dict[str, Tensor]) -> bool:
        """Whether what was read is no longer what the observation says."""
        tokens = observation["tokens"]
        length = self._cached_length[:, None]
        was_read = torch.arange(tokens.shape[1], device=tokens.device) < length
        if ((self._cached_tokens != tokens) & was_read).any():
            return True
        if (observation["num_tokens"] < self._cached_length).any():
            return True
        if "images" not in observation:
            return False
        positions = observation["image_positions"]
        # [N, M]
        images_read = (positions >= 0) & (positions < length)
        return bool((_contents(observation) != self._cached_images)[images_read].any())

    def _append_new_segments(self, observation: dict[str, Tensor]) -> None:
        """Read all that is new: text up to the next image, the image, and on."""
        tokens = observation["tokens"]
        count = observation["num_tokens"]
        positions = observation.get("image_positions", tokens[:, :0])
        roles = observation["roles"]
        for part in segments(tokens, self._cached_length, count, positions, roles=roles):
            if not isinstance(part, ImageSegment):
                self._append(part.ids, part.mask, part.roles)
                continue
            assert self.context is not None
            # A copy, because the env overwrites its own buffer in the next episode.
            self._cached_images.copy_(_contents(observation))
            self._compared = None
            images, pixels = stored_images(observation)
            place = part.rows, part.numbers
            latent, seen = image_inputs(images[place], pixels[place])
            reads = partial_mask(part.reads, self.model.device)
            self.context = self.model.append_image(self.context, latent, seen, reads)
            self._subset = None
        self._cached_length = count.clone()

    def _append(self, ids: Tensor, mask: Tensor, roles: Tensor | None) -> None:
        if ids.shape[1] == 0:
            return
        assert self.context is not None
        self._subset = None
        self.logits, self.context = append_and_predict(
            self.model, self.context, ids, mask, roles, self.logits
        )


def _contents(observation: dict[str, Tensor]) -> Tensor:
    return image_contents(*stored_images(observation))

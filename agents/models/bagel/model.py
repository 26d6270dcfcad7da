"""BAGEL (Deng et al. 2025, arXiv 2505.14683) behind the methods of `UnifiedModel`.

`network` holds the architecture. The released model of 14 billion parameters and the tiny model of
this package are two configs of the same class, under the original weight names.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from agents.models.bagel.config import BagelConfig
from agents.models.bagel.embeddings import grid_positions
from agents.models.bagel.layers import GENERATION, UNDERSTANDING
from agents.models.bagel.network import TABLES, BagelNetwork, backward_values, forward_values
from agents.models.bagel.release_files import (
    find_weights,
    is_release,
    read_weights,
    write_release,
)
from agents.models.base import UnifiedModel
from agents.models.kv_cache import KeyValueContext
from agents.models.pixels import scale_pixels

IMAGE_PARTS = ("time_embedder.", "vae2llm.", "llm2vae.")
"""Parts outside the layers that belong to the image expert."""


class Bagel(BagelNetwork, UnifiedModel[KeyValueContext]):
    """The unified model: it reads text and images, writes text and predicts velocities.

    Args:
        config: the sizes. Weights are random until they are loaded, or set by `initialise`.
    """

    config_class = BagelConfig
    config: BagelConfig
    lora_targets = (r"^language_model\.model\.layers\.",)

    @classmethod
    def from_release(cls, folder: str | Path, **options: Any) -> Bagel:
        """Load the released weights; see `release.load_release`, also for the options."""
        # Imported here, because `release` needs this module.
        from agents.models.bagel.release import load_release

        return load_release(folder, **options)

    def write_weights(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        """See `UnifiedModel`. A model with the release's processor is written as the release is.

        Raises:
            ValueError: the folder of that release is no longer there, see `write_release`.
        """
        # Imported here, because it needs the environment, which a model alone does not.
        from agents.models.bagel.processor import BagelProcessor

        # Without the files of that processor the written model could not be used.
        if isinstance(self._find_processor(), BagelProcessor):
            write_release(self, folder, tensors)
        else:
            super().write_weights(folder, tensors)

    def read_weights(self, folder: Path) -> dict[str, Tensor]:
        """See `UnifiedModel`."""
        if not is_release(folder):
            return super().read_weights(folder)
        return read_weights(find_weights(folder, vision=self.config.vision is not None))

    @property
    def vocab_size(self) -> int:
        """See `UnifiedModel`."""
        return self.config.vocab_size

    @property
    def latent_shape(self) -> tuple[int, int]:
        """See `UnifiedModel`."""
        return self.config.latent_height * self.config.latent_width, self.config.latent_dim

    def set_image_size(self, height: int, width: int) -> None:
        """Draw images of this size from now on; the processor, if it can be resized, follows.

        Args:
            height: in pixels.
            width: in pixels.

        Raises:
            ValueError: there are no positions for an image of this size, or the processor is for
                another size and cannot be resized.
        """
        config = self.config.with_image_size(height, width)
        processor = self._find_processor()
        resized = getattr(processor, "resized", None)
        if resized is not None:
            self.processor = resized(height, width)
        elif processor is not None and processor.image_size != (height, width):
            expected = " x ".join(map(str, processor.image_size))
            raise ValueError(
                f"expected a size of {expected} pixels, because {type(processor).__name__} takes "
                f"no other, got {height} x {width}; set another `model.processor` first"
            )
        self.config = config
        positions = grid_positions(
            config.latent_height, config.latent_width, config.max_latent_size
        )
        self.latent_positions = positions.to(self.latent_positions.device)

    def parameters_by_expert(self) -> dict[str, list[nn.Parameter]]:
        """See `UnifiedModel`. The vision encoder and its connector belong to the text expert."""
        lists: dict[str, list[nn.Parameter]] = {"text": [], "image": []}
        for name, weight in self.named_parameters():
            if name in TABLES:
                continue
            is_image = GENERATION in name or name.startswith(IMAGE_PARTS)
            lists["image" if is_image else "text"].append(weight)
        return lists

    def empty_context(self, batch_size: int) -> KeyValueContext:
        """See `UnifiedModel`."""
        weight = self.vae2llm.weight
        # No slot yet: the axis of the slots has length 0.
        shape = (batch_size, self.config.num_key_value_heads, 0, self.config.head_dim)
        layers = range(self.config.num_hidden_layers)
        return KeyValueContext(
            keys=[weight.new_zeros(shape) for _ in layers],
            values=[weight.new_zeros(shape) for _ in layers],
            valid=torch.zeros(batch_size, 0, dtype=torch.bool, device=weight.device),
            position=torch.zeros(batch_size, dtype=torch.int64, device=weight.device),
            dense=True,
        )

    def reserve(self, context: KeyValueContext, tokens: int, images: int) -> None:
        """See `UnifiedModel`. An image takes slots for its latents and, if it is seen, its pixels.

        With gradient nothing is reserved, because each call makes new tensors then.
        """
        if not context.in_place:
            return
        # Each segment of an image has two markers.
        slots = 2 + self.latent_shape[0]
        processor = self._find_processor()
        if self.config.vision is not None and processor is not None and processor.pixel_size:
            height, width = processor.pixel_size
            patch = self.config.vision.patch_size
            slots += 2 + (height // patch) * (width // patch)
        context.reserve(tokens + images * slots, exact=True)

    def velocity_bytes(self, context: KeyValueContext) -> int:
        """See `UnifiedModel`. An estimate in the dtype of the weights.

        It counts the copy of the context that a part of the rows works on.

        Args:
            context: what was read.
        """
        length = 2 + self.latent_shape[0]
        config = self.config
        key_width = config.num_key_value_heads * config.head_dim
        values = 2 * config.num_hidden_layers * context.size * key_width
        values += forward_values(config, length, context.size + length)
        if torch.is_grad_enabled():
            values += backward_values(config, length, self.checkpointing)
        return values * self.vae2llm.weight.element_size()

    def append_text(
        self, context: KeyValueContext, ids: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, KeyValueContext]:
        """See `UnifiedModel`. Logits have the dtype of the weights."""
        hidden, grown = self.append_hidden(context, ids, mask)
        return self.compute_logits(hidden), grown

    def append_hidden(
        self,
        context: KeyValueContext,
        ids: Tensor,
        mask: Tensor | None = None,
        *,
        roles: Tensor | None = None,
    ) -> tuple[Tensor, KeyValueContext]:
        """See `UnifiedModel`. States `[N, T, hidden_size]`, before the last norm."""
        all_valid = mask is None
        if mask is None:
            mask = torch.ones_like(ids, dtype=torch.bool)
        # Unmasked tokens up to each token, [N, T]. Padding takes no rotary position.
        count = mask.cumsum(1)
        # [N, T]; a token after `n` unmasked tokens of this call stands `n` positions on.
        position = context.position[:, None] + (count - mask.long())
        streams, keys, values = self.run_text(context, ids, mask, position)
        after = context.position + count[:, -1]
        grown = context.advance(keys, values, mask, after, all_valid=all_valid)
        return streams[UNDERSTANDING], grown

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """See `UnifiedModel`."""
        return self.language_model.lm_head(self.language_model.model.norm(hidden))

    def predict_velocity(self, context: KeyValueContext, x: Tensor, t: Tensor) -> Tensor:
        """See `UnifiedModel`. The image's keys are dropped layer by layer."""
        tokens = self.embed_latents(x, t)
        streams, _, _ = self.run_image(context, tokens, GENERATION, keep=False)
        # [N, L, hidden_size]; the markers' states are not needed.
        hidden = self.language_model.model.norm_moe_gen(streams[GENERATION])
        return self.llm2vae(hidden).float()

    def append_image(
        self,
        context: KeyValueContext,
        latent: Tensor | None = None,
        pixels: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        with_grad: bool = True,
    ) -> KeyValueContext:
        """See `UnifiedModel`. Read the latents first, then, with a vision encoder, the pixels.

        `append_latents` and `append_pixels` read one of the two alone.
        """
        if pixels is not None:
            self._require_vision()
        if latent is None and pixels is None:
            raise ValueError("expected a latent, pixels, or both; got neither")
        if latent is not None and pixels is None and self.config.vision is not None:
            pixels = self._view_latents(latent)
        if latent is not None:
            context = self.append_latents(context, latent, mask, with_grad=with_grad)
        if pixels is not None:
            context = self.append_pixels(context, pixels, mask, with_grad=with_grad)
        return context

    def append_latents(
        self,
        context: KeyValueContext,
        latent: Tensor,
        mask: Tensor | None = None,
        *,
        with_grad: bool = True,
    ) -> KeyValueContext:
        """Read images as clean latents through the generation expert.

        The segment is `<start> tokens <end>` at one position, attends fully to itself, and moves
        the next position on by one.

        Args:
            context: what came before.
            latent: `[N, L, C]` float32, clean (t = 0).
            mask: `[N]` bool, the rows that read; all if left out.
            with_grad: see `UnifiedModel.append_image`.

        Returns:
            The grown context.
        """
        # Clean latents have flow time 0.
        clean = torch.zeros(len(latent), device=latent.device)
        tokens = self.embed_latents(latent, clean)
        return self._append_segment(context, tokens, GENERATION, mask, with_grad)

    def append_pixels(
        self,
        context: KeyValueContext,
        pixels: Tensor,
        mask: Tensor | None = None,
        *,
        with_grad: bool = True,
    ) -> KeyValueContext:
        """Read images as pixels, through the vision encoder and the understanding expert.

        The segment is laid out as in `append_latents`.

        Args:
            context: what came before.
            pixels: `[N, 3, height, width]` float32 in [-1, 1].
            mask: `[N]` bool, the rows that read; all if left out.
            with_grad: see `UnifiedModel.append_image`.

        Returns:
            The grown context.

        Raises:
            ValueError: the model has no vision encoder, or it takes no images of this size.
        """
        self._require_vision()
        with torch.set_grad_enabled(with_grad and torch.is_grad_enabled()):
            tokens = self.embed_pixels(pixels)
        return self._append_segment(context, tokens, UNDERSTANDING, mask, with_grad)

    def _require_vision(self) -> None:
        if self.config.vision is None:
            raise ValueError(
                "expected a model with a vision encoder, because `pixels` were given, but this one "
                "has none; leave `pixels` out"
            )

    @torch.no_grad()
    def _view_latents(self, latent: Tensor) -> Tensor:
        """What the vision encoder sees of latents `[N, L, C]`: pixels in [-1, 1].

        They are an input like any other: no gradient reaches the latents.
        """
        processor = self.processor
        if processor.pixel_size is None:
            raise ValueError(
                f"expected a processor with a pixel_size, because this {type(self).__name__} has a "
                f"vision encoder, got {type(processor).__name__} without; give `pixels`, or set "
                "`model.processor` to one that defines pixel_size and view_images"
            )
        seen = processor.view_images(processor.decode_latents(latent))
        return scale_pixels(seen.to(latent.device))

    def _append_segment(
        self,
        context: KeyValueContext,
        tokens: Tensor,
        expert: str,
        mask: Tensor | None,
        with_grad: bool,
    ) -> KeyValueContext:
        """Append one image segment in the rows of `mask` `[N]` bool (all if left out)."""
        length = 2 + tokens.shape[1]
        if torch.is_grad_enabled() and not with_grad:
            # The new slots are computed without gradient; the old slots keep their gradient.
            with torch.no_grad():
                copied = context.detach()
                copied.reserve(length, exact=True)
                grown = self._append_segment(copied, tokens, expert, mask, with_grad)
            return context.with_later_slots(grown)
        _, keys, values = self.run_image(context, tokens, expert)
        all_valid = mask is None
        if mask is None:
            mask = torch.ones(len(tokens), dtype=torch.bool, device=tokens.device)
        # Rows outside the mask get slots that are not valid, and their position stays.
        valid = mask[:, None].expand(-1, length)
        position = context.position + mask
        return context.advance(keys, values, valid, position, all_valid=all_valid)

"""A pipeline of diffusers that draws by flow matching: velocity, decoding and grid."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from agents.models.thinker_painter.asked import AskedPipeline, Source
from agents.models.thinker_painter.conditions import Conditions, find_layout, layout_of_one
from agents.models.thinker_painter.cut_off import watch_tokenizers
from agents.models.thinker_painter.latent_layout import (
    LatentLayout,
    from_tokens,
    to_tokens,
    token_shape,
)
from agents.models.thinker_painter.proofs import (
    check_pipeline,
    find_call,
    reads_texts_together,
    takes_a_time_per_row,
    takes_source,
)

DECODED_PIXELS = 2**20
"""Pixels of the images that are encoded or decoded at once: one of 1024 x 1024, four of 512."""

logger = logging.getLogger(__name__)


class Painter:
    """A flow-matching pipeline with one transformer, asked through its own `__call__`.

    What the pipeline relies on is tried out here, once: that one velocity is one call of the
    transformer, which parts of its conditions have a row for each text, and whether its rows may
    have different times.

    Args:
        pipeline: of diffusers; its parts other than the transformer are frozen.
        height: of the images, in pixels; the pipeline's own if left out.
        width: likewise.
        strict: refuse a text of which the pipeline would cut off the end; else warn.
        **call: further arguments of each call. Guidance is switched off by the pipeline's own
            arguments unless they are given here.

    Attributes:
        transformer: what is trained.
        given: the arguments of a call that the user gave.
        frozen: the auto-encoder and the text encoders.
        latent_shape: (latent tokens, values of each).
        image_size: (height, width) in pixels.
        edits: whether it takes a source image of the size that it draws.
        needs_source: whether it draws with one alone.
        reads_together: whether texts can be encoded together, and are then read as each alone.

    Raises:
        ValueError: a pipeline of another kind, guidance that stays on, or a size that it refuses.
    """

    def __init__(
        self,
        pipeline: Any,
        height: int | None = None,
        width: int | None = None,
        *,
        strict: bool = False,
        **call: Any,
    ) -> None:
        check_pipeline(pipeline)
        self.pipeline: Any = pipeline
        self.strict = strict
        self.given = call
        self._layout: LatentLayout | None = None
        pipeline.set_progress_bar_config(disable=True)
        for part in self.frozen:
            part.eval().requires_grad_(False)
        parameters = inspect.signature(type(pipeline).__call__).parameters
        self.edits = "image" in parameters and "strength" not in parameters
        sizes = {"height": height, "width": width}
        arguments = {name: size for name, size in sizes.items() if size is not None} | call
        with torch.no_grad():
            self.call, self._source = find_call(pipeline, arguments, self.edits)
            self.needs_source = self._source is not None
            self._asked = AskedPipeline(pipeline, self.call)
            self._probe()
        self._check_size(height, width)

    def _probe(self) -> None:
        """Learn the form of conditions and latents, and what the pipeline can do."""
        asked = self._asked
        one = asked.encode([""], self._source)
        self.reads_together = reads_texts_together(asked, one, self._source)
        if self.reads_together:
            two = asked.encode(["", ""], self._source)
            self._condition_layout = find_layout(one, two)
        else:
            self._condition_layout = layout_of_one(one)
        self._blank = Conditions(one, self._condition_layout, 1)
        weight = next(self.transformer.parameters())
        self._blank_kind = (weight.device, weight.dtype)
        _, sample = asked.velocity(one, None, torch.tensor([0.5]), self._source)
        if sample.ndim not in (3, 4):
            raise ValueError(
                f"expected a pipeline of images, got {type(self.pipeline).__name__} with latents "
                f"of {sample.ndim - 1} axes; choose one of a family that the docs list"
            )
        asked.learn_told_time(one, self._source)
        self._native_shape = tuple(sample.shape[1:])
        self.latent_shape = token_shape(self._native_shape)
        self._times_per_row = takes_a_time_per_row(asked, self._blank, sample, self._source)
        values = asked.decoder_input(one, sample, self._source)
        scale = self.pipeline.vae_scale_factor
        self.image_size = (values.shape[-2] * scale, values.shape[-1] * scale)
        if self.edits and not self.needs_source:
            self.edits = takes_source(asked, one, self.image_size)

    def _check_size(self, height: int | None, width: int | None) -> None:
        expected = (height or self.image_size[0], width or self.image_size[1])
        if self.image_size != expected:
            raise ValueError(
                f"expected a height and width that {type(self.pipeline).__name__} draws, got "
                f"{expected[0]} x {expected[1]}, of which it makes {self.image_size[0]} x "
                f"{self.image_size[1]}; use that, or see the pipeline's own documentation"
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A painter with a transformer of its own; what is frozen is shared."""
        for part in self.frozen:
            # A text encoder that is the thinker too was copied with the model.
            memo.setdefault(id(part), part)
        other = copy.copy(self)
        memo[id(self)] = other
        other.pipeline = copy.copy(self.pipeline)
        for name, part in self.pipeline.components.items():
            if isinstance(part, nn.Module):
                other.pipeline.__dict__[name] = copy.deepcopy(part, memo)
        other._asked = self._asked.moved_to(other.pipeline)
        return other

    @property
    def transformer(self) -> nn.Module:
        """The network that is called once for each velocity."""
        return self.pipeline.transformer

    @property
    def encoders(self) -> dict[str, nn.Module]:
        """The text encoders by name."""
        parts = self.pipeline.components.items()
        return {n: p for n, p in parts if n.startswith("text_encoder") and p is not None}

    @property
    def frozen(self) -> list[nn.Module]:
        """The parts that are never trained here; a text encoder may also be the thinker."""
        return [self.pipeline.vae, *self.encoders.values()]

    def reads_with(self, thinker: nn.Module) -> bool:
        """Whether a text encoder has weights of a language model."""
        own = {id(weight) for weight in thinker.parameters()}
        encoders = self.encoders.values()
        return any(id(weight) in own for part in encoders for weight in part.parameters())

    def encode(self, texts: Sequence[str], source: Source | None = None) -> Conditions:
        """Read texts for the transformer, with the gradient of the text encoder.

        Args:
            texts: one a row.
            source: what is edited, the same in all rows.

        Raises:
            ValueError: the painter is strict and does not read all of a text; or it reads one at a
                time, and these have other lengths.
        """
        if len(texts) > 1 and not self.reads_together:
            parts = [self.encode([text], source) for text in texts]
            if all(parts[0].fits(part) for part in parts):
                return Conditions.join(parts)
            raise ValueError(
                f"expected one text, because {type(self.pipeline).__name__} does not read texts of "
                f"several lengths together, got {len(texts)}; encode each alone"
            )
        with watch_tokenizers(self.pipeline, self.call) as cut:
            value = self._asked.encode(texts, source or self._source)
        if cut:
            message = f"the painter does not read all of {len(texts)} texts: {'; '.join(cut)}"
            if self.strict:
                raise ValueError(
                    f"{message}; shorten env.text_budget, or tell the painter less (model.tells)"
                )
            logger.warning(message)
        return Conditions(value, self._condition_layout, len(texts))

    def predict_velocity(
        self, conditions: Conditions, x: Tensor, t: Tensor, source: Source | None = None
    ) -> Tensor:
        """The velocity of N latents.

        Args:
            conditions: N rows.
            x: `[N, L, C]` float32.
            t: `[N]` float32 in [0, 1].
            source: what is edited.

        Returns:
            `[N, L, C]` float32.
        """
        if self._times_per_row or len(t) == 1:
            return self._velocity(conditions, x, t, source)
        velocity = torch.empty_like(x)
        # One forward for each time, in a pipeline that takes one time for all its rows.
        for time in t.unique():
            rows = (t == time).nonzero()[:, 0]
            part = self._velocity(conditions.select(rows), x[rows], time[None], source)
            velocity = velocity.index_copy(0, rows, part)
        return velocity

    def _velocity(
        self, conditions: Conditions, x: Tensor, t: Tensor, source: Source | None
    ) -> Tensor:
        latents = from_tokens(x, self._native_shape)
        source = source or self._source
        velocity, _ = self._asked.velocity(conditions.value, latents, t, source)
        return to_tokens(velocity).float()

    def decode(self, x: Tensor) -> Tensor:
        """Images `[N, 3, height, width]` float32 in [0, 1] of latents `[N, L, C]`."""
        parts = []
        for part in x.split(self._decoded_at_once()):
            rows = torch.zeros(len(part), dtype=torch.int64, device=x.device)
            latents = from_tokens(part, self._native_shape)
            blank = self._blank_conditions().select(rows)
            parts.append(self._asked.decode(blank.value, latents, self._source))
        return torch.cat(parts).float().clamp(0, 1)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Clean latents `[N, L, C]` float32 of images `[N, 3, height, width]` in [0, 1].

        It is the mode of the auto-encoder's distribution.

        Raises:
            ValueError: the pipeline does not show how its auto-encoder's values become latents.
        """
        vae = self.pipeline.vae
        blank = self._blank_conditions().value
        if self._layout is None:
            self._layout = LatentLayout(
                lambda latents: self._asked.decoder_input(blank, latents, self._source),
                self._native_shape,
                vae.device,
            )
        zero = torch.zeros(1, *self._native_shape, device=vae.device)
        # An auto-encoder of videos has an axis of frames.
        is_video = self._asked.decoder_input(blank, zero, self._source).ndim == 5
        latents = []
        for part in images.split(self._decoded_at_once()):
            pixels = (2 * part - 1).to(vae.device, vae.dtype)
            if is_video:
                pixels = pixels.unsqueeze(2)
            found = vae.encode(pixels)
            values = found.latent_dist.mode() if hasattr(found, "latent_dist") else found.latent
            latents.append(to_tokens(self._layout.latents(values)))
        return torch.cat(latents).to(images.device)

    def time_grid(self, steps: int) -> tuple[float, ...]:
        """`steps + 1` flow times from 1 to 0: the pipeline's own schedule.

        A schedule that begins a little below 1 begins at 1 here, where there is noise alone.

        Raises:
            ValueError: the schedule does not fall from noise to the image.
        """
        with torch.no_grad():
            value = self._blank_conditions().value
            times = self._asked.sigmas(value, steps, self._source).tolist()
        if len(times) != steps + 1 or not 0.99 < times[0] <= 1 or times[-1] != 0:
            raise ValueError(
                f"expected a schedule of {steps + 1} times from 1 to 0, got {times} of "
                f"{type(self.pipeline.scheduler).__name__}; give env.time_shift in its place"
            )
        return (1.0, *times[1:])

    def _blank_conditions(self) -> Conditions:
        """Those of an empty text, where only their form counts."""
        weight = next(self.transformer.parameters())
        if self._blank_kind != (weight.device, weight.dtype):
            self._blank = self.encode([""])
            self._blank_kind = (weight.device, weight.dtype)
        return self._blank

    def _decoded_at_once(self) -> int:
        height, width = self.image_size
        return max(1, DECODED_PIXELS // (height * width))

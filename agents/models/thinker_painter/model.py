"""A thinker and a painter as one model, on one context."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from agents.models.lora import lora_layers, switched_off
from agents.models.pixels import scale_pixels
from agents.models.thinker_painter.briefing import Brief, briefs
from agents.models.thinker_painter.cache import empty_cache
from agents.models.thinker_painter.config import INSIDE, ThinkerPainterConfig
from agents.models.thinker_painter.context import (
    Reading,
    ThinkerContext,
    Told,
    growable,
    longer,
)
from agents.models.thinker_painter.image_reading import check_sight, keep_sources, see
from agents.models.thinker_painter.painter import Painter
from agents.models.thinker_painter.precision import cast_parts
from agents.models.thinker_painter.processor import PainterProcessor
from agents.models.thinker_painter.saved import SavedParts
from agents.models.thinker_painter.telling import Telling, Tells
from agents.models.thinker_painter.thinker import Thinker
from agents.models.thinker_painter.vision import Vision
from unigrpo_env.mdp.rules import Role


class ThinkerPainter(SavedParts):
    """A causal language model that writes, and a flow-matching pipeline that draws.

    The painter reads the words that the thinker wrote, through its own text encoders. Where one of
    them is the thinker itself, the gradient of an image reaches the thinker too.

    Args:
        thinker: of transformers.
        painter: see `Painter`.
        tokenizer: of the thinker, with a chat template.
        config: see `ThinkerPainterConfig`.
        vision: how the thinker sees; None if it does not.
        budgets: of scenarios, see `Processor.scenario_defaults`.

    Attributes:
        thinker: the same.
        transformer: the painter's.
        painter: the same; what is frozen in it is no part of this model, but moves with it.
        shares_encoder: whether a text encoder of the painter has weights of the thinker.

    Raises:
        ValueError: the parts do not fit, see `Thinker`, `ChatLayout` and `PainterProcessor`.
    """

    vision: Vision | None
    _lm: Thinker
    _telling: Telling
    _checkpointing = False
    lora_targets = (
        # Not of a tower that sees.
        r"^thinker\.(?!.*(?:visual|vision)).*\.[qkvo]_proj$",
        r"^transformer\..*\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out|to_qkv_mlp_proj)$",
    )

    def __init__(
        self,
        thinker: nn.Module,
        painter: Painter,
        tokenizer: Any,
        config: ThinkerPainterConfig | None = None,
        *,
        vision: Vision | None = None,
        budgets: dict[str, int] | None = None,
    ) -> None:
        super().__init__()
        config = (config or ThinkerPainterConfig()).of_painter(painter)
        if budgets is not None:
            config = replace(config, budgets=dict(budgets))
        self.thinker = thinker.eval().requires_grad_(True)
        self.transformer = painter.transformer.eval().requires_grad_(True)
        # Outside the parts that nn.Module registers: it is not trained, saved or listed.
        self.__dict__["painter"] = painter
        self.__dict__["_lm"] = Thinker(thinker)
        if vision is not None:
            check_sight(self._lm, vision)
        self.vision = vision
        self.shares_encoder = painter.reads_with(thinker)
        if self.shares_encoder and not config.thinker:
            config = replace(config, thinker=INSIDE)
        self.config = config
        options = {} if config.thinking is None else {"enable_thinking": config.thinking}
        self.processor = PainterProcessor(
            tokenizer,
            painter,
            self._lm.vocab_size,
            reads_images=self.reads_images,
            chat_options=options,
            system=config.system,
            budgets=config.budgets or None,
        )
        self.tell(config.tells)

    def tell(self, tells: str | Tells) -> None:
        """Choose what the painter is told from now on, see `Telling`."""
        processor: Any = self.processor
        self.__dict__["_telling"] = Telling(processor.tokenizer, processor.layout, tells)

    @property
    def reads_images(self) -> bool:
        """See `UnifiedModel`."""
        return self.vision is not None or self.painter.edits

    @property
    def vocab_size(self) -> int:
        """See `UnifiedModel`."""
        return self._lm.vocab_size

    @property
    def latent_shape(self) -> tuple[int, int]:
        """See `UnifiedModel`."""
        return self.painter.latent_shape

    @property
    def checkpointing(self) -> bool:
        """See `UnifiedModel`."""
        return self._checkpointing

    @checkpointing.setter
    def checkpointing(self, value: bool) -> None:
        self._checkpointing = value
        switch = "enable_gradient_checkpointing" if value else "disable_gradient_checkpointing"
        getattr(self.transformer, switch)()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move what is frozen in the painter along, see `nn.Module`."""
        super()._apply(fn, recurse)
        for part in self.painter.frozen:
            part._apply(fn)
        return self

    def train(self, mode: bool = True) -> Self:
        """Set the mode, but of this module alone: dropout would change what the rollout said.

        Args:
            mode: see `nn.Module`.
        """
        super().train(mode)
        for part in (self.thinker, self.transformer, *self.painter.frozen):
            part.eval()
        return self

    def cast_weights(self, dtype: torch.dtype) -> Self:
        """See `UnifiedModel`. The painter's frozen parts are converted too."""
        adapters = [] if self.adapted_layers is None else self.trainable_by_expert().values()
        kept = [weight for weights in adapters for weight in weights]
        cast_parts([self.thinker, self.transformer, *self.painter.frozen], dtype, kept)
        return self

    def parameters_by_expert(self) -> dict[str, list[nn.Parameter]]:
        """See `UnifiedModel`. The thinker is the text expert, the transformer the image expert."""
        return {
            "text": list(self.thinker.parameters()),
            "image": list(self.transformer.parameters()),
        }

    def empty_context(self, batch_size: int) -> ThinkerContext:
        """See `UnifiedModel`."""
        nothing = torch.zeros(batch_size, 0, dtype=torch.int64, device=self.device)
        reading = Reading(
            cache=empty_cache(),
            ids=nothing,
            roles=nothing,
            valid=nothing.bool(),
            position=nothing.sum(1),
            dense=True,
            sources=[None] * batch_size if self.painter.edits else [],
            told=Told(),
        )
        return ThinkerContext(reading)

    def append_text(
        self, context: ThinkerContext, ids: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, ThinkerContext]:
        """See `UnifiedModel`. The text counts as the user's; `append_hidden` takes roles."""
        hidden, grown = self.append_hidden(context, ids, mask)
        return self.compute_logits(hidden), grown

    def append_hidden(
        self,
        context: ThinkerContext,
        ids: Tensor,
        mask: Tensor | None = None,
        *,
        roles: Tensor | None = None,
    ) -> tuple[Tensor, ThinkerContext]:
        """See `UnifiedModel`."""
        if roles is None:
            roles = torch.full_like(ids, Role.USER)
        is_dense = mask is None
        if mask is None:
            mask = torch.ones_like(ids, dtype=torch.bool)
        # Unmasked tokens up to each, [N, T]. Padding takes no position.
        count = mask.cumsum(1)
        before = growable(context, repeatable=self.checkpointing)
        positions = before.position[:, None] + count - mask.long()
        grown = longer(before, ids, roles, mask, before.position + count[:, -1], is_dense)
        valid = None if grown.dense else grown.valid
        hidden = self._lm.states(
            ids, valid, positions, grown.cache, checkpointing=self.checkpointing
        )
        return hidden, ThinkerContext(grown)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """See `UnifiedModel`."""
        return self._lm.logits(hidden)

    def append_image(
        self,
        context: ThinkerContext,
        latent: Tensor | None = None,
        pixels: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        with_grad: bool = True,
    ) -> ThinkerContext:
        """See `UnifiedModel`. A thinker that sees reads it; a painter that edits changes it.

        Raises:
            NotImplementedError: neither of the two takes images.
        """
        if not self.reads_images:
            return super().append_image(context, latent, pixels, mask, with_grad=with_grad)
        if pixels is None:
            if latent is None:
                raise ValueError("expected a latent, pixels, or both; got neither")
            pixels = self._view(latent)
        if mask is None:
            mask = torch.ones(len(pixels), dtype=torch.bool, device=self.device)
        if self.vision is not None:
            context = see(
                self._lm,
                self.vision,
                context,
                pixels,
                mask,
                with_grad=with_grad,
                checkpointing=self.checkpointing,
            )
        if self.painter.edits:
            context = keep_sources(context, pixels, mask)
        return context

    @torch.no_grad()
    def _view(self, latent: Tensor) -> Tensor:
        """Pixels in [-1, 1] of latents `[N, L, C]`."""
        seen = self.processor.view_images(self.processor.decode_latents(latent))
        return scale_pixels(seen.to(latent.device))

    def prepare_velocity(self, context: ThinkerContext) -> None:
        """See `UnifiedModel`. The painter reads what it is told."""
        self._briefs(context)

    def predict_velocity(self, context: ThinkerContext, x: Tensor, t: Tensor) -> Tensor:
        """See `UnifiedModel`."""
        found = self._briefs(context)
        if len(found) == 1:
            brief = found[0]
            return self.painter.predict_velocity(brief.conditions, x, t, brief.source)
        velocity = torch.zeros_like(x)
        for brief in found:
            rows = brief.rows
            part = self.painter.predict_velocity(brief.conditions, x[rows], t[rows], brief.source)
            velocity = velocity.index_copy(0, rows, part)
        return velocity

    def _briefs(self, context: ThinkerContext) -> list[Brief]:
        with_grad = torch.is_grad_enabled() and self.shares_encoder and not context.is_cut
        without_adapters = self.config.reads_base and self.adapted_layers is not None
        if without_adapters:
            with_grad = False
        # Asked for at each denoising step, and made at the first.
        if with_grad in context.briefs:
            return context.briefs[with_grad]
        reading: AbstractContextManager[None] = nullcontext()
        if without_adapters:
            reading = switched_off(lora_layers(self).values())
        with reading:
            return briefs(
                context,
                self.painter,
                self._telling,
                with_grad=with_grad,
                # What a forward of the transformer takes, the encoders' can take too.
                at_once=self.max_rows,
            )

"""A thinker and a painter as one model, on one context."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor, nn

from agents.models.base import UnifiedModel
from agents.models.config_files import read_model_config, write_model_config
from agents.models.lora import lora_layers, switched_off
from agents.models.pixels import scale_pixels
from agents.models.thinker_painter.asked import Source
from agents.models.thinker_painter.briefing import Brief, briefs
from agents.models.thinker_painter.cache import empty_cache, with_later_slots
from agents.models.thinker_painter.config import INSIDE, ThinkerPainterConfig
from agents.models.thinker_painter.context import (
    Reading,
    ThinkerContext,
    Told,
    growable,
    longer,
)
from agents.models.thinker_painter.files import (
    PAINTER,
    THINKER,
    has_adapters_in,
    read_adapters,
    read_parts,
    write_adapters,
    write_parts,
)
from agents.models.thinker_painter.painter import Painter
from agents.models.thinker_painter.processor import PainterProcessor
from agents.models.thinker_painter.telling import Telling, Tells
from agents.models.thinker_painter.thinker import Thinker
from agents.models.thinker_painter.vision import Vision
from agents.storage import load_weights
from unigrpo_env.mdp.rules import Role


class ThinkerPainter(UnifiedModel[ThinkerContext]):
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

    config_class = ThinkerPainterConfig
    config: ThinkerPainterConfig
    painter: Painter
    thinker: nn.Module
    transformer: nn.Module
    vision: Vision | None
    _lm: Thinker
    _telling: Telling
    _checkpointing = False
    lora_targets = (
        r"^thinker\..*\.[qkvo]_proj$",
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
        self.thinker = thinker.eval().requires_grad_(True)
        self.transformer = painter.transformer.eval().requires_grad_(True)
        # Outside the parts that nn.Module registers: it is not trained, saved or listed.
        self.__dict__["painter"] = painter
        self.__dict__["_lm"] = Thinker(thinker)
        self.vision = vision
        self.shares_encoder = painter.reads_with(thinker)
        if self.shares_encoder and not config.thinker:
            config = replace(config, thinker=INSIDE)
        self.config = config
        pixel_size = painter.image_size
        if vision is not None:
            pixel_size = vision.view_size(*painter.image_size)
        options = {} if config.thinking is None else {"enable_thinking": config.thinking}
        self.processor = PainterProcessor(
            tokenizer,
            painter,
            self._lm.vocab_size,
            pixel_size=pixel_size if self.reads_images else None,
            chat_options=options,
            system=config.system,
            budgets=budgets,
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

    def cast_weights(self, dtype: torch.dtype) -> Self:
        """See `UnifiedModel`. The painter's frozen parts are converted too."""
        super().cast_weights(dtype)
        for part in self.painter.frozen:
            for weight in part.parameters():
                # Weights of the thinker among them are converted already.
                if weight.is_floating_point() and weight.dtype != dtype:
                    weight.data = weight.data.to(dtype)
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
        before = self._growable(context)
        positions = before.position[:, None] + count - mask.long()
        grown = longer(before, ids, roles, mask, before.position + count[:, -1], is_dense)
        hidden = self._states(grown, ids, positions)
        return hidden, ThinkerContext(grown)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """See `UnifiedModel`."""
        return self._lm.logits(hidden)

    def _growable(self, context: ThinkerContext) -> Reading:
        return growable(context, repeatable=self.checkpointing)

    def _states(self, reading: Reading, ids: Tensor, positions: Tensor, **image: Any) -> Tensor:
        """Read what stands last in `reading`, whose cache grows."""
        valid = None if reading.dense else reading.valid
        return self._lm.states(
            ids, valid, positions, reading.cache, checkpointing=self.checkpointing, **image
        )

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
            context = self._see(context, pixels, mask, with_grad)
        if self.painter.edits:
            context = self._keep_sources(context, pixels, mask)
        return context

    @torch.no_grad()
    def _view(self, latent: Tensor) -> Tensor:
        """Pixels in [-1, 1] of latents `[N, L, C]`."""
        seen = self.processor.view_images(self.processor.decode_latents(latent))
        return scale_pixels(seen.to(latent.device))

    def _see(
        self, context: ThinkerContext, pixels: Tensor, mask: Tensor, with_grad: bool
    ) -> ThinkerContext:
        """Let the thinker read an image in the rows of `mask`."""
        if torch.is_grad_enabled() and not with_grad:
            with torch.no_grad():
                after = self._see(context.detach(), pixels, mask, with_grad).reading
            before = self._growable(context)
            cache = with_later_slots(before.cache, after.cache)
            return ThinkerContext(replace(after, cache=cache))
        assert self.vision is not None
        size = pixels.shape[-2:]
        before = self._growable(context)
        ids = self.vision.ids(*size).to(pixels.device).expand(len(pixels), -1)
        relative, length = self.vision.positions(*size)
        positions = before.position[None, :, None] + relative.to(pixels.device)[:, None]
        # No words of the conversation, so they are not told to the painter.
        roles = torch.full_like(ids, Role.SYSTEM)
        end = before.position + length * mask
        grown = longer(before, ids, roles, mask[:, None].expand_as(ids), end, dense=False)
        self._states(grown, ids, positions, **self.vision.inputs(pixels))
        return ThinkerContext(grown)

    def _keep_sources(
        self, context: ThinkerContext, pixels: Tensor, mask: Tensor
    ) -> ThinkerContext:
        """Remember the image as what is edited next, in the rows of `mask`."""
        reading = self._growable(context)
        sources = list(reading.sources)
        levels = ((pixels + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        for row in mask.nonzero()[:, 0].tolist():
            content = levels[row].tobytes()
            known = reading.told.sources
            if content not in known:
                known[content] = Source(Image.fromarray(levels[row]))
            sources[row] = known[content]
        return ThinkerContext(replace(reading, sources=sources))

    def save_pretrained(self, folder: str | Path) -> Path:
        """See `UnifiedModel` and `files`."""
        folder = Path(folder)
        if self.adapted_layers is None:
            return super().save_pretrained(folder)
        folder.mkdir(parents=True, exist_ok=True)
        base = self.config.thinker if not self.shares_encoder else self.config.painter
        write_adapters(self, self.painter.pipeline, folder, base)
        write_model_config(self, folder)
        return folder

    def write_weights(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        """See `UnifiedModel`. A painter that was made in memory is written whole."""
        if not self.config.painter:
            self.painter.pipeline.save_pretrained(folder / PAINTER)
        write_parts(self.thinker, self.transformer, folder, tensors)
        processor: Any = self.processor
        processor.tokenizer.save_pretrained(folder / THINKER)
        write_model_config(self, folder)

    def load_saved(self, folder: str | Path) -> None:
        """See `UnifiedModel`."""
        folder = Path(folder)
        if has_adapters_in(folder) != (self.adapted_layers is not None):
            raise ValueError(
                f"expected {folder} to hold adapters just as this model has them; were the "
                "settings of the adapters others when it was saved?"
            )
        if self.adapted_layers is None:
            load_weights(self, self.read_weights(folder), str(folder))
        else:
            read_adapters(self, folder)

    def read_weights(self, folder: Path) -> dict[str, Tensor]:
        """See `UnifiedModel`."""
        return read_parts(self.thinker, self.transformer, folder)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        height: int | None = None,
        width: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Self:
        """Load what `save_pretrained` wrote; the parts come from where its config says.

        Raises:
            ValueError: a part is not there any more, or a file is damaged or does not fit.
        """
        # Imported here, because `loading` needs this module.
        from agents.models.thinker_painter.loading import build

        folder = Path(folder)
        config = read_model_config(cls, folder)
        if height is not None or width is not None:
            config = replace(config, height=height, width=width)
        model: Any = build(config, folder, dtype=dtype, device=device)
        if has_adapters_in(folder):
            read_adapters(model, folder)
        else:
            model.load_saved(folder)
        return model

    def prepare_velocity(self, context: ThinkerContext) -> None:
        """See `UnifiedModel`. The painter reads what it is told."""
        self._briefs(context)

    def predict_velocity(self, context: ThinkerContext, x: Tensor, t: Tensor) -> Tensor:
        """See `UnifiedModel`."""
        found = self._briefs(context)
        velocity = torch.zeros_like(x)
        for brief in found:
            rows = brief.rows
            if rows is None:
                return self.painter.predict_velocity(brief.conditions, x, t, brief.source)
            part = self.painter.predict_velocity(brief.conditions, x[rows], t[rows], brief.source)
            velocity = velocity.index_copy(0, rows, part)
        return velocity

    def _briefs(self, context: ThinkerContext) -> list[Brief]:
        with_grad = torch.is_grad_enabled() and self.shares_encoder and not context.is_cut
        reading: AbstractContextManager[None] = nullcontext()
        if self.config.reads_base:
            with_grad = False
            reading = switched_off(lora_layers(self).values())
        with reading:
            return briefs(context, self.painter, self._telling, with_grad=with_grad)

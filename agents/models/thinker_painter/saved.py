"""How a thinker-painter is saved and loaded; the files themselves are those of `files`."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from agents.models.base import UnifiedModel
from agents.models.config_files import read_model_config, write_model_config
from agents.models.thinker_painter.asked import replaced
from agents.models.thinker_painter.config import ThinkerPainterConfig
from agents.models.thinker_painter.context import ThinkerContext
from agents.models.thinker_painter.files import (
    ONE_FILE,
    PAINTER,
    THINKER,
    has_adapters_in,
    part_of,
    read_adapters,
    read_parts,
    write_adapters,
    write_parts,
    write_transformer,
)
from agents.models.thinker_painter.painter import Painter
from agents.storage import load_weights


class SavedParts(UnifiedModel[ThinkerContext]):
    """What `ThinkerPainter` does with files."""

    config_class = ThinkerPainterConfig
    config: ThinkerPainterConfig
    painter: Painter
    thinker: nn.Module
    transformer: nn.Module
    shares_encoder: bool

    def save_pretrained(self, folder: str | Path) -> Path:
        """See `UnifiedModel` and `files`."""
        folder = Path(folder)
        if self.adapted_layers is None:
            return super().save_pretrained(folder)
        folder.mkdir(parents=True, exist_ok=True)
        base = self.config.painter if self.shares_encoder else self.config.thinker
        write_adapters(self, self.painter.pipeline, folder, base)
        write_model_config(self, folder)
        return folder

    def write_weights(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        """See `UnifiedModel`. A painter that was made in memory is written whole."""
        if not self.config.painter:
            self._write_pipeline(folder / PAINTER, tensors)
        write_parts(self.thinker, self.transformer, folder, tensors)
        processor: Any = self.processor
        processor.tokenizer.save_pretrained(folder / THINKER)
        # The weights beside the config are whole, whatever they began as.
        write_model_config(self, folder, replace(self.config, base=""))

    def _write_pipeline(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        """Write all parts of the pipeline, those of this model with its weights in `tensors`."""
        own = {id(part): name for name, part in self.named_modules()}
        with ExitStack() as stack:
            for part in (self.transformer, *self.painter.encoders.values()):
                if id(part) not in own:
                    continue
                weights = part_of(tensors, own[id(part)])
                writer: Any = part
                # With adapters its own tensors have other names.
                save: Any = partial(write_transformer, writer, tensors=weights)
                if part is not self.transformer:
                    save = partial(writer.save_pretrained, state_dict=weights, **ONE_FILE)
                stack.enter_context(
                    replaced(part, save_pretrained=lambda at, *_, f=save, **__: f(at))
                )
            self.painter.pipeline.save_pretrained(folder)

    @classmethod
    def holds_adapters(cls, folder: Path) -> bool:
        """See `UnifiedModel`."""
        return has_adapters_in(folder)

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
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        thinker: str | None = None,
        painter: str | None = None,
        height: int | None = None,
        width: int | None = None,
        tells: str | None = None,
        reads_base: bool | None = None,
        strict: bool | None = None,
        thinking: bool | None = None,
    ) -> Self:
        """Load what `save_pretrained` wrote; the parts come from where its config says.

        Args:
            folder: of the model.
            dtype: of all weights.
            device: of all parts.
            thinker: where it is now, if it was moved.
            painter: likewise.
            height: in place of the config's; likewise all below.
            width: of the images.
            tells: see `ThinkerPainterConfig`.
            reads_base: likewise.
            strict: likewise.
            thinking: likewise.

        Raises:
            ValueError: a part is not there any more, or a file is damaged or does not fit.
        """
        # Imported here, because `loading` needs this module.
        from agents.models.thinker_painter.loading import build, with_moved_parts

        given: dict[str, Any] = {"height": height, "width": width, "tells": tells, "strict": strict}
        given |= {"reads_base": reads_base, "thinking": thinking}
        folder = Path(folder).absolute()
        saved = with_moved_parts(read_model_config(cls, folder), thinker, painter, folder)
        config = replace(saved, **{key: value for key, value in given.items() if value is not None})
        has_adapters = has_adapters_in(folder)
        # Where the whole weights are; those of the parts themselves if nowhere.
        base = config.base if has_adapters else str(folder)
        if base and not Path(base).is_dir():
            raise ValueError(
                f"expected the model {base!r}, to which the adapters in {folder} belong, found "
                "none; if it was moved, write its folder as 'base' into config.json"
            )
        whole = Path(base) if base else None
        model: Any = build(replace(config, base=base), whole, dtype=dtype, device=device)
        if whole is not None:
            model.load_saved(whole)
        if has_adapters:
            read_adapters(model, folder)
        return model

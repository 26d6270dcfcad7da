"""Images in the context of a thinker that sees, or of a painter that edits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from agents.models.thinker_painter.asked import Source
from agents.models.thinker_painter.cache import empty_cache, with_later_slots
from agents.models.thinker_painter.context import ThinkerContext, growable, longer
from agents.models.thinker_painter.thinker import Thinker
from agents.models.thinker_painter.vision import Vision
from unigrpo_env.mdp.rules import Role


def see(
    thinker: Thinker,
    vision: Vision,
    context: ThinkerContext,
    pixels: Tensor,
    mask: Tensor,
    *,
    with_grad: bool,
    checkpointing: bool,
) -> ThinkerContext:
    """Let the thinker read an image in the rows of `mask`.

    Args:
        thinker: reads.
        vision: how it sees.
        context: N rows.
        pixels: `[N, 3, height, width]` float32 in [-1, 1], resized where the thinker sees another
            size; anything in rows outside the mask.
        mask: `[N]` bool.
        with_grad: see `UnifiedModel.append_image`.
        checkpointing: see `UnifiedModel`.
    """
    if torch.is_grad_enabled() and not with_grad:
        with torch.no_grad():
            cut = context.detach()
            after = see(
                thinker, vision, cut, pixels, mask, with_grad=True, checkpointing=checkpointing
            )
        before = growable(context, repeatable=checkpointing)
        cache = with_later_slots(before.cache, after.reading.cache)
        return ThinkerContext(replace(after.reading, cache=cache))
    before = growable(context, repeatable=checkpointing)
    size = vision.view_size(*pixels.shape[-2:])
    image = vision.ids(*size).to(pixels.device)
    # The tower runs for the rows of the mask alone: others have no place for an image.
    ids = torch.where(mask[:, None], image, vision.start_id)
    relative, length = vision.positions(*size)
    positions = before.position[None, :, None] + relative.to(pixels.device)[:, None]
    # No words of the conversation, so they are not told to the painter.
    roles = torch.full_like(ids, Role.SYSTEM)
    end = before.position + length * mask
    grown = longer(before, ids, roles, mask[:, None].expand_as(ids), end, dense=False)
    inputs = vision.inputs(resize(pixels[mask], size)) if mask.any() else {}
    thinker.states(ids, grown.valid, positions, grown.cache, checkpointing=checkpointing, **inputs)
    return ThinkerContext(grown)


def resize(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Pixels `[N, 3, height, width]` in [-1, 1] at another size."""
    if pixels.shape[-2:] == size:
        return pixels
    resized = nn.functional.interpolate(pixels, size, mode="bicubic", antialias=True)
    return resized.clamp(-1, 1)


def keep_sources(context: ThinkerContext, pixels: Tensor, mask: Tensor) -> ThinkerContext:
    """Remember an image as what is edited next, in the rows of `mask`.

    Args:
        context: N rows.
        pixels: `[N, 3, height, width]` float32 in [-1, 1]; anything in rows outside the mask.
        mask: `[N]` bool.
    """
    reading = growable(context, repeatable=False)
    sources = list(reading.sources)
    rows = mask.nonzero()[:, 0].tolist()
    levels = ((pixels[mask] + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    for row, image in zip(rows, levels, strict=True):
        content = image.tobytes()
        known = reading.told.sources
        if content not in known:
            known[content] = Source(Image.fromarray(image))
        sources[row] = known[content]
    return ThinkerContext(replace(reading, sources=sources))


@torch.no_grad()
def check_sight(thinker: Thinker, vision: Vision) -> None:
    """Refuse a model that sees in another way than is supposed here.

    Args:
        thinker: reads a small image between two tokens, in pieces and at once.
        vision: how it is supposed to see.

    Raises:
        ValueError: the two differ.
    """
    device = thinker.model.device
    side = vision.patch_size * vision.merge_size
    # Neither square nor of one row, so that all three axes of the positions count.
    size = (2 * side, 3 * side)
    pixels = torch.linspace(-1, 1, 18 * side**2, device=device).view(1, 3, *size)
    image: dict[str, Any] = vision.inputs(pixels)
    ids = torch.tensor([[1, *vision.ids(*size).tolist(), 2]], device=device)
    relative, length = vision.positions(*size)
    between = 1 + relative[:, None].to(device)
    text = [torch.tensor([[place]], device=device) for place in (0, 1 + length)]
    try:
        expected = thinker.whole_logits(ids, image, ids == vision.image_id)
        cache = empty_cache()
        thinker.states(ids[:, :1], None, text[0], cache)
        thinker.states(ids[:, 1:-1], None, between, cache, **image)
        last = thinker.logits(thinker.states(ids[:, -1:], None, text[1], cache))
    except (RuntimeError, TypeError, ValueError) as error:
        problem = str(error)
    else:
        if thinker.are_close(last, expected[:, -1:]):
            return
        problem = "it gives other logits"
    raise ValueError(
        f"expected a thinker that sees as those of the Qwen family do, got "
        f"{type(thinker.model).__name__} ({problem}); choose one of that family, or give no vision"
    )

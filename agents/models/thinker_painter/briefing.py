"""Which rows of a context the painter can draw in one forward, and what it is told for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor

from agents.models.thinker_painter.asked import Source
from agents.models.thinker_painter.conditions import Conditions
from agents.models.thinker_painter.context import Reading, TextKey, ThinkerContext, Told
from agents.models.thinker_painter.painter import Painter
from agents.models.thinker_painter.telling import Telling


@dataclass(frozen=True)
class Brief:
    """Rows of a context that are drawn together.

    Attributes:
        rows: `[n]` int64 of the context.
        conditions: n rows.
        source: what is edited in all of them.
    """

    rows: Tensor
    conditions: Conditions
    source: Source | None


def briefs(
    context: ThinkerContext,
    painter: Painter,
    telling: Telling,
    *,
    with_grad: bool,
    at_once: int | None = None,
) -> list[Brief]:
    """What the painter is told; a text that it was told before is not encoded again.

    Args:
        context: what was read.
        painter: encodes the texts.
        telling: makes them.
        with_grad: whether gradients may flow into the text encoder.
        at_once: texts that are encoded together at most; None: all.

    Raises:
        ValueError: the painter draws with a source alone, and a row has none.
    """
    reading = context.reading
    texts = row_texts(context, telling)
    own_sources: list[Source | None] = [None] * len(texts)
    if reading.sources:
        own_sources = [reading.sources[row] for row in context.all_rows().tolist()]
    keys: list[TextKey] = []
    sources: dict[int, Source | None] = {}
    for text, source in zip(texts, own_sources, strict=True):
        sources[id(source)] = source
        keys.append((text, id(source), with_grad))
    if painter.needs_source:
        _check_sources(keys, painter)
    # Rows of one source are drawn together: a pipeline takes one for all its rows.
    found = []
    for source_id, source in sources.items():
        members = [row for row, key in enumerate(keys) if key[1] == source_id]
        own = [keys[row] for row in members]
        _encode(own, source, painter, reading.told, at_once)
        found += _joined(own, members, source, reading)
    device = reading.ids.device
    result = [Brief(torch.tensor(r, device=device), c, s) for r, c, s in found]
    context.briefs[with_grad] = result
    return result


def _check_sources(keys: Sequence[TextKey], painter: Painter) -> None:
    missing = sum(source == id(None) for _, source, _ in keys)
    if missing:
        raise ValueError(
            f"expected an image to edit in each row, because {type(painter.pipeline).__name__} "
            f"draws with one alone, got {missing} of {len(keys)} rows without; play a scenario "
            "whose prompts have sources, such as edit, or take a painter that needs none"
        )


def row_texts(context: ThinkerContext, telling: Telling) -> list[str]:
    """The text of each row of a context; one that was made before is not made again."""
    reading = context.reading
    slots = torch.stack([reading.ids, reading.roles, reading.valid.long()], 1)
    if context.rows is not None:
        slots = slots[context.rows]
    texts = []
    known = reading.told.words
    for ids, roles, valid in slots.cpu().numpy():
        words = numpy.stack([ids, roles])[:, valid == 1]
        content = words.tobytes()
        if content not in known:
            known[content] = telling.text(*words.tolist())
        texts.append(known[content])
    return texts


def _encode(
    keys: Sequence[TextKey],
    source: Source | None,
    painter: Painter,
    told: Told,
    at_once: int | None,
) -> None:
    """Encode the texts that are new, each once."""
    new = [key for key in dict.fromkeys(keys) if key not in told.texts]
    size = at_once or max(len(new), 1)
    if not painter.reads_together:
        size = 1
    for start in range(0, len(new), size):
        batch = new[start : start + size]
        with_grad = batch[0][2]
        with torch.set_grad_enabled(with_grad):
            conditions = painter.encode([text for text, *_ in batch], source)
        for row, key in enumerate(batch):
            told.texts[key] = conditions, row


def _joined(
    keys: Sequence[TextKey], members: list[int], source: Source | None, reading: Reading
) -> list[tuple[list[int], Conditions, Source | None]]:
    """Rows, their conditions and source: one entry if all conditions have the same shapes."""
    # By the batch in which they were encoded.
    batches: dict[int, tuple[Conditions, list[int], list[int]]] = {}
    for row, key in zip(members, keys, strict=True):
        conditions, place = reading.told.texts[key]
        _, places, rows = batches.setdefault(id(conditions), (conditions, [], []))
        places.append(place)
        rows.append(row)
    found: list[tuple[list[int], Conditions, Source | None]] = []
    for conditions, places, rows in batches.values():
        part = conditions.select(torch.tensor(places))
        for index, (before, joined, _) in enumerate(found):
            if joined.fits(part):
                found[index] = ([*before, *rows], Conditions.join([joined, part]), source)
                break
        else:
            found.append((rows, part, source))
    return [_in_order(*entry) for entry in found]


def _in_order(
    rows: list[int], conditions: Conditions, source: Source | None
) -> tuple[list[int], Conditions, Source | None]:
    order = sorted(range(len(rows)), key=rows.__getitem__)
    return sorted(rows), conditions.select(torch.tensor(order)), source

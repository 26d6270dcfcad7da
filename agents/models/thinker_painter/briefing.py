"""Which rows of a context the painter can draw in one forward, and what it is told for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from agents.models.thinker_painter.asked import Source
from agents.models.thinker_painter.conditions import Conditions
from agents.models.thinker_painter.context import Reading, TextKey, ThinkerContext
from agents.models.thinker_painter.painter import Painter
from agents.models.thinker_painter.telling import Telling


@dataclass(frozen=True)
class Brief:
    """Rows of a context that are drawn together.

    Attributes:
        rows: `[n]` int64 of the context; None for all.
        conditions: n rows.
        source: what is edited in all of them.
    """

    rows: Tensor | None
    conditions: Conditions
    source: Source | None


def briefs(
    context: ThinkerContext, painter: Painter, telling: Telling, *, with_grad: bool
) -> list[Brief]:
    """What the painter is told; a text that it was told before is not encoded again.

    Args:
        context: what was read.
        painter: encodes the texts.
        telling: makes them.
        with_grad: whether gradients may flow into the text encoder.

    Raises:
        ValueError: the painter draws with a source alone, and a row has none.
    """
    if with_grad in context.briefs:
        return context.briefs[with_grad]
    reading = context.reading
    texts = row_texts(reading, telling)
    rows: Sequence[int] = range(len(texts))
    if context.rows is not None:
        rows = context.rows.tolist()
    keys: list[TextKey] = []
    sources: dict[int, Source | None] = {}
    for row in rows:
        source = reading.sources[row] if reading.sources else None
        sources[id(source)] = source
        keys.append((texts[row], id(source), with_grad))
    if painter.needs_source:
        _check_sources(keys, painter)
    # Rows of one source are drawn together: a pipeline takes one for all its rows.
    found = []
    for source_id, source in sources.items():
        members = [row for row, key in enumerate(keys) if key[1] == source_id]
        own = [keys[row] for row in members]
        _encode(own, source, painter, reading, with_grad)
        found += _joined(own, members, source, reading)
    device = reading.ids.device
    if len(found) == 1:
        result = [Brief(None, found[0][1], found[0][2])]
    else:
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


def row_texts(reading: Reading, telling: Telling) -> list[str]:
    """The text of each row of a reading."""
    if reading.texts is None:
        rows = zip(
            reading.ids.tolist(), reading.roles.tolist(), reading.valid.tolist(), strict=True
        )
        reading.texts = []
        for ids, roles, valid in rows:
            slots = [slot for slot, is_valid in enumerate(valid) if is_valid]
            text = telling.text([ids[slot] for slot in slots], [roles[slot] for slot in slots])
            reading.texts.append(text)
    return reading.texts


def _encode(
    keys: Sequence[TextKey],
    source: Source | None,
    painter: Painter,
    reading: Reading,
    with_grad: bool,
) -> None:
    """Encode the texts that are new, each once."""
    known = reading.told.texts
    new = [key for key in dict.fromkeys(keys) if key not in known]
    if not new:
        return
    batches = [new] if painter.reads_together else [[key] for key in new]
    for batch in batches:
        with torch.set_grad_enabled(with_grad):
            conditions = painter.encode([text for text, *_ in batch], source)
        for row, key in enumerate(batch):
            known[key] = conditions, row


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

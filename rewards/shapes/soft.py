"""A soft verifier of the shapes world: it has a gradient, and it is easier to please than `shapes`.

It is a proxy, of the kind that one trains on when the true measure has no gradient, and it has the
weaknesses of such proxies. A cell is recognised by the projection of its pixels on the direction
of a template. So more contrast than the template has is worth more than the template; what is
orthogonal to all templates (texture, other colours) costs nothing; and two objects that are half
drawn count as one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from rewards.base import EpisodeBatch
from rewards.shapes.grid import GRID, KINDS, matches, relation_table, split_cells, templates

SHARPNESS = 3.0
"""Scale of the recognition scores before the softmax."""

EMPTY = 2.0
"""The score of an empty cell. A perfect object scores 3.7 to 7.2."""


@cache
def _directions() -> tuple[Tensor, Tensor]:
    """The ground of a cell `[192]`, and the unit vector from it to each object `[kinds, 192]`."""
    # [1 + kinds, 192], the empty cell first.
    cells = templates().flatten(1)
    away = cells[1:] - cells[0]
    return cells[0], away / away.norm(dim=1, keepdim=True)


def recognise(images: Tensor) -> Tensor:
    """How probable it is that each cell holds each value. Gradients are kept.

    Args:
        images: `[N, 3, 24, 24]` in [0, 1].

    Returns:
        Probabilities `[N, 9, 1 + kinds]` float32.
    """
    cells = split_cells(images)
    ground, directions = _directions()
    # Length along each direction, [N, 9, kinds].
    scores = (cells - ground) @ directions.T
    # The empty cell has no direction, so it has a constant score.
    empty = torch.full_like(scores[..., :1], EMPTY)
    return (SHARPNESS * torch.cat([empty, scores], -1)).softmax(-1)


@dataclass(frozen=True)
class _Requirements:
    """What N prompts require, as tensors of float32; R is the greatest number of their objects.

    Attributes:
        wanted: `[N, R, 1 + kinds]`: 1 where a cell value is such an object.
        count: `[N, R]`: how many of them there must be; 0 where a prompt has fewer objects.
        relation: `[N, 9, 9]`: see `relation_table`; all 1 where there is no relation.
        related: `[N]`: 1 where there is a relation.
    """

    wanted: Tensor
    count: Tensor
    relation: Tensor
    related: Tensor


def _requirements(prompts: Sequence[Mapping[str, Any]]) -> _Requirements:
    """The metadata of prompts as tensors."""
    most = max(len(metadata["objects"]) for metadata in prompts)
    found = _Requirements(
        wanted=torch.zeros(len(prompts), most, 1 + len(KINDS)),
        count=torch.zeros(len(prompts), most),
        relation=torch.ones(len(prompts), GRID * GRID, GRID * GRID),
        related=torch.zeros(len(prompts)),
    )
    # The fields are filled in place: a frozen dataclass fixes the tensors, not their values.
    for row, metadata in enumerate(prompts):
        for number, wanted in enumerate(metadata["objects"]):
            found.count[row, number] = wanted["count"]
            for cell in range(1, 1 + len(KINDS)):
                found.wanted[row, number, cell] = float(matches(cell, wanted))
        relation = metadata.get("relation")
        if relation:
            found.relation[row] = relation_table(relation)
            found.related[row] = 1
    return found


def soft_shapes(episodes: EpisodeBatch) -> Tensor:
    """How well the expected counts meet the prompt; it can be fooled, see `rewards.shapes.soft`.

    With c the count that is asked for of each object and f the expected one, o the expected
    number of other objects and p the probability that a pair stands in the relation, the reward
    is the mean of `exp(-(f - c)^2)` over the objects, `exp(-o^2)`, and p where there is a relation.

    Args:
        episodes: what to score.

    Returns:
        `[N]` float32 in [0, 1], with a gradient to the images.
    """
    rows = [row for row, metadata in enumerate(episodes.metadata) if "objects" in metadata]
    reward = torch.full((len(episodes),), torch.nan)
    if not rows:
        return reward
    required = _requirements([episodes.metadata[row] for row in rows])
    cells = recognise(episodes.images[rows])
    # Not in place, so that the gradient goes through.
    return reward.index_put((torch.tensor(rows),), _score(cells, required))


def _score(cells: Tensor, required: _Requirements) -> Tensor:
    """The reward `[N]` of recognised cells `[N, 9, 1 + kinds]`."""
    # How far each cell holds each object: [N, R, 9].
    held = torch.einsum("ncv,nrv->nrc", cells, required.wanted)
    # The expected count of each object: [N, R].
    found = held.sum(-1)
    # Rows are padded to R objects; the padding must not count.
    asked = (required.count > 0).float()
    # Expected number of all objects less that of the wanted ones: [N].
    others = (cells[..., 1:].sum((1, 2)) - found.sum(1)).clamp(min=0)
    alone = (-(others**2)).exp()
    counts = ((-((found - required.count) ** 2)).exp() * asked).sum(1)
    # Pairs of a cell of the first object and a cell of the second, if there is one: [N, 9, 9].
    second = min(1, held.shape[1] - 1)
    pairs = held[:, 0, :, None] * held[:, second, None, :]
    # The share of the pairs that stand in the relation; the small number avoids 0 / 0.
    in_relation = (pairs * required.relation).sum((1, 2))
    places = in_relation / (pairs.sum((1, 2)) + 1e-6) * required.related
    return (counts + alone + places) / (asked.sum(1) + 1 + required.related)

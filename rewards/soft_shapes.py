"""A soft verifier of the shapes world: differentiable, and easier to please than the strict one.

It is a proxy, of the kind that one trains on when the true measure has no gradient, and it has the holes of such proxies. A cell is recognised by
how strongly it points the way of a template, so more contrast than any template has is worth more than the template; what points no way at all
(texture, off-colours) costs nothing; two half-drawn objects count as one.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from rewards.registry import EpisodeBatch
from rewards.shapes import CELL, GRID, KINDS, relation_table, templates

SHARPNESS, EMPTY = 3.0, 2.0
"""Scale of the recognition scores, and the score of an empty cell; a perfect object scores 3.7 to 7.2."""


@cache
def _directions() -> tuple[Tensor, Tensor]:
    """The ground of a cell, `[192]`, and each object's direction from it, `[kinds, 192]` of length 1."""
    cells = templates().flatten(1)
    away = cells[1:] - cells[0]
    return cells[0], away / away.norm(dim=1, keepdim=True)


def recognise(images: Tensor) -> Tensor:
    """Probabilities `[N, 9, 1 + kinds]` of what each cell holds, pictures `[N, 3, 24, 24]` in [0, 1]; keeps gradients."""
    cells = images.float().cpu().unflatten(2, (GRID, CELL)).unflatten(4, (GRID, CELL)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2).flatten(2)
    ground, directions = _directions()
    scores = (cells - ground) @ directions.T
    return (SHARPNESS * torch.cat([torch.full_like(scores[..., :1], EMPTY), scores], -1)).softmax(-1)


def soft_shapes(episodes: EpisodeBatch) -> Tensor:
    """How far the expected counts meet the prompt, in [0, 1]; differentiable, and it can be fooled: see `rewards.soft_shapes`."""
    known = [row for row, metadata in enumerate(episodes.metadata) if "objects" in metadata]
    reward = torch.full((len(episodes),), torch.nan)
    if not known:
        return reward
    wanted = torch.zeros(len(known), max(len(episodes.metadata[row]["objects"]) for row in known), 1 + len(KINDS))
    count = torch.zeros(wanted.shape[:2])
    relation, related = torch.ones(len(known), GRID * GRID, GRID * GRID), torch.zeros(len(known))
    for place, row in enumerate(known):
        metadata = episodes.metadata[row]
        for number, thing in enumerate(metadata["objects"]):
            count[place, number] = thing["count"]
            for kind, (colour, shape) in enumerate(KINDS, 1):
                wanted[place, number, kind] = float(shape == thing["shape"] and thing["colour"] in (None, colour))
        if metadata.get("relation"):
            relation[place], related[place] = relation_table(metadata["relation"]), 1
    cells = recognise(episodes.images[known])
    held = torch.einsum("ncv,nrv->nrc", cells, wanted)
    found = held.sum(-1)
    asked = (count > 0).float()
    others = (cells[..., 1:].sum((1, 2)) - found.sum(1)).clamp(min=0)
    counts = ((-((found - count) ** 2)).exp() * asked).sum(1)
    pairs = held[:, 0, :, None] * held[:, min(1, held.shape[1] - 1), None, :]
    places = (pairs * relation).sum((1, 2)) / (pairs.sum((1, 2)) + 1e-6) * related
    scored = (counts + (-(others**2)).exp() + places) / (asked.sum(1) + 1 + related)
    return reward.index_put((torch.tensor(known),), scored)

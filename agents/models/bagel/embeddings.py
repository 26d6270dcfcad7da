"""What BAGEL adds to a token of an image: its place in the image, and the flow time."""

from __future__ import annotations

from typing import cast

import torch
from diffusers.models.embeddings import get_2d_sincos_pos_embed, get_timestep_embedding
from torch import Tensor, nn


class TimeEmbedder(nn.Module):
    """Sinusoids of t (cosines first), then a small MLP.

    Args:
        hidden_size: width of the result.
        frequencies: the number of sinusoids.
    """

    def __init__(self, hidden_size: int, frequencies: int = 256) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(
            nn.Linear(frequencies, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, t: Tensor) -> Tensor:
        """Embed flow times `[N]` float32 in [0, 1] as `[N, hidden_size]`."""
        # [N, frequencies] float32, whatever the dtype of the weights.
        waves = get_timestep_embedding(
            t, self.frequencies, flip_sin_to_cos=True, downscale_freq_shift=0
        )
        return self.mlp(waves.to(next(self.mlp.parameters()).dtype))


class PositionTable(nn.Module):
    """Fixed two-dimensional sin-cos positions, column first; a weight that is never trained.

    Args:
        hidden_size: width of an entry.
        side: rows and columns of the table.

    Attributes:
        pos_embed: `[side * side, hidden_size]`, float32 until the weights are cast.
    """

    def __init__(self, hidden_size: int, side: int) -> None:
        super().__init__()
        # A parameter as in the release, although it is never trained.
        table = get_2d_sincos_pos_embed(hidden_size, side, base_size=side, output_type="pt")
        self.pos_embed = nn.Parameter(cast(Tensor, table).float(), requires_grad=False)


def grid_positions(rows: int, columns: int, side: int) -> Tensor:
    """Entries of a position table for a grid of tokens in its upper left corner.

    Args:
        rows: of the grid.
        columns: of the grid.
        side: rows and columns of the table.

    Returns:
        `[rows * columns]` int64, `row * side + column` of each token.
    """
    return (torch.arange(rows)[:, None] * side + torch.arange(columns)).flatten()

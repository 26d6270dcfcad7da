"""What a vision-language thinker of the Qwen family sees of an image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MOST_PIXELS = 1024 * 1024
"""An image with more is made smaller before it is seen."""


@dataclass(frozen=True)
class Vision:
    """How pixels come to a model that has a `visual` tower and three-dimensional positions.

    Attributes:
        patch_size: side of a patch, in pixels.
        merge_size: patches a side that become one token.
        frames: times that an image is repeated, because the tower reads videos too.
        start_id: token before an image.
        image_id: token in place of each of its patches.
        end_id: token after it.
        mean: subtracted from each of the three channels, of pixels in [0, 1].
        std: by which they are divided then.
    """

    patch_size: int
    merge_size: int
    frames: int
    start_id: int
    image_id: int
    end_id: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, config: Any, mean: tuple[float, ...], std: tuple[float, ...]) -> Vision | None:
        """What a model's config says; None for a model that does not see this way.

        Args:
            config: of transformers.
            mean: of the model's image processor.
            std: likewise.
        """
        vision = getattr(config, "vision_config", None)
        is_known = hasattr(vision, "spatial_merge_size") and hasattr(
            config, "vision_start_token_id"
        )
        if vision is None or not is_known:
            return None
        return cls(
            vision.patch_size,
            vision.spatial_merge_size,
            vision.temporal_patch_size,
            config.vision_start_token_id,
            config.image_token_id,
            config.vision_end_token_id,
            mean,
            std,
        )

    def view_size(self, height: int, width: int) -> tuple[int, int]:
        """The size at which an image is seen: whole tokens, and at most `MOST_PIXELS`."""
        side = self.patch_size * self.merge_size
        scale = (MOST_PIXELS / (height * width)) ** 0.5
        if scale < 1:
            sizes = (int(height * scale / side), int(width * scale / side))
        else:
            sizes = (round(height / side), round(width / side))
        return max(1, sizes[0]) * side, max(1, sizes[1]) * side

    def ids(self, height: int, width: int) -> Tensor:
        """Tokens `[2 + n]` int64 of one image of this size."""
        side = self.patch_size * self.merge_size
        count = (height // side) * (width // side)
        return torch.tensor([self.start_id, *[self.image_id] * count, self.end_id])

    def positions(self, height: int, width: int) -> tuple[Tensor, int]:
        """Positions `[3, 2 + n]` int64 of those tokens, from 0 on, and how far they reach.

        The three axes are time, height and width; a text token has the same on each. The text after
        an image goes on behind its longer side.
        """
        side = self.patch_size * self.merge_size
        rows, columns = height // side, width // side
        grid = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        inside = torch.stack([torch.zeros_like(grid[0]), *grid]).flatten(1) + 1
        end = 1 + max(rows, columns)
        first = torch.zeros(3, 1, dtype=torch.int64)
        return torch.cat([first, inside, torch.full((3, 1), end)], 1), end + 1

    def inputs(self, pixels: Tensor) -> dict[str, Tensor]:
        """The model's inputs beside the tokens.

        Args:
            pixels: `[N, 3, height, width]` float32 in [-1, 1].
        """
        rows, _, height, width = pixels.shape
        patch, merge = self.patch_size, self.merge_size
        high, wide = height // patch, width // patch
        mean = pixels.new_tensor(self.mean)[:, None, None]
        std = pixels.new_tensor(self.std)[:, None, None]
        values = ((pixels + 1) / 2 - mean) / std
        # [N, 3, rows of tokens, merge, patch, columns of tokens, merge, patch]
        values = values.reshape(rows, 3, high // merge, merge, patch, wide // merge, merge, patch)
        # [N, rows of tokens, columns of tokens, merge, merge, 3, patch, patch]
        values = values.permute(0, 2, 5, 3, 6, 1, 4, 7)
        # The frames of a patch stand between its channels and its pixels.
        frames = values.unsqueeze(6).expand(*[-1] * 6, self.frames, -1, -1)
        patches = frames.reshape(rows * high * wide, -1)
        grid = torch.tensor([[1, high, wide]], device=pixels.device).expand(rows, -1)
        return {"pixel_values": patches, "image_grid_thw": grid}

"""The colour of an object, named by a CLIP model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from rewards.geneval.names import COLOURS
from rewards.geneval.verifier import Detection
from rewards.vision.clip import Clip

Colours = Callable[[Tensor, Sequence[Detection], str], Sequence[str]]
"""Names the colours of objects of one class, whose name comes last.

The image is `[3, height, width]` float32 in [0, 1].
"""

TEMPLATES = (
    "a photo of a {colour} {name}",
    "a photo of a {colour}-colored {name}",
    "a photo of a {colour} object",
)
"""The sentences that stand for a colour; their features are averaged."""

GROUND = 0x99 / 255
"""What is not the object gets this level of grey."""


class ColourClip(Clip):
    """The CLIP model that names colours."""

    # Named in messages about its options.
    registered_name: ClassVar[str] = "geneval/colours"


class ClipColours:
    """A `Colours` as in the original scorer: the colour whose sentences are nearest to the object.

    Args:
        clip: a CLIP model, loaded at the first use.
    """

    def __init__(self, clip: ColourClip) -> None:
        self._clip = clip

    @torch.no_grad()
    def __call__(self, image: Tensor, objects: Sequence[Detection], name: str) -> list[str]:
        """The nearest of the ten colours for each object.

        Args:
            image: `[3, height, width]` float32 in [0, 1].
            objects: what was found in it, at least one.
            name: the class of all of them.
        """
        sentences = []
        for colour in COLOURS:
            sentences += [template.format(colour=colour, name=name) for template in TEMPLATES]
        with self._clip.at_work(image) as engine:
            # [30, D], computed once a class.
            texts = self._clip.text_features(engine, sentences)
            # A crop has a size of its own, so each is prepared alone.
            crops = [self._clip.embed(engine, crop(image, each)[None]) for each in objects]
        # [10, D]: the mean over the sentences of a colour is brought to length 1 again.
        means = functional.normalize(texts.unflatten(0, (len(COLOURS), -1)).mean(1), dim=-1)
        nearest = (torch.cat(crops).cpu() @ means.T).argmax(1)
        return [COLOURS[index] for index in nearest.tolist()]


def crop(image: Tensor, found: Detection) -> Tensor:
    """The box of an object, with all around its mask painted grey.

    Args:
        image: `[3, height, width]` float32 in [0, 1].
        found: the object; without a mask the ground stays as it is.

    Returns:
        `[3, rows, columns]` float32, at least one pixel.
    """
    if found.mask is not None:
        image = torch.where(found.mask.to(image.device), image, GROUND)
    left, top, right, bottom = (max(0, round(edge)) for edge in found.box)
    # A box of another detector may be thinner than a pixel, or reach beyond the image.
    left = min(left, image.shape[2] - 1)
    top = min(top, image.shape[1] - 1)
    return image[:, top : max(bottom, top + 1), left : max(right, left + 1)]

"""Objects in images, found by a Mask2Former of transformers."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from rewards.geneval.names import CLASSES
from rewards.geneval.verifier import Box, Detection
from rewards.image_bytes import image_bytes
from rewards.vision.model_scorer import ModelScorer

Detector = Callable[[Tensor], Sequence[Sequence[Detection]]]
"""Finds the objects of images `[N, 3, height, width]` float32 in [0, 1], for each in any order."""

THRESHOLD = 0.3
"""Objects must be more certain than this."""

COUNTING_THRESHOLD = 0.9
"""The same where objects are counted."""


@dataclass(kw_only=True, eq=False)
class Mask2FormerDetector(ModelScorer):
    """A `Detector` with the network and the arithmetic of the original scorer.

    The original takes the same network from mmdet 2. As there, the certainty of an object is the
    probability of its class times the mean probability inside its mask, and masks are resized to
    the image before they are cut.

    Its model is a `Mask2FormerForUniversalSegmentation` for the instances of COCO. The options that
    are not listed here are those of `ModelScorer`.

    Args:
        threshold: objects that are not more certain are left out.
    """

    threshold: float = THRESHOLD

    registered_name: ClassVar[str] = "geneval/detector"
    network_class: ClassVar[str] = "Mask2FormerForUniversalSegmentation"
    model_types: ClassVar[tuple[str, ...]] = ("mask2former",)
    classes: ClassVar[tuple[str, ...]] = CLASSES

    def load(self) -> Any:
        """Load the network and what prepares its images.

        Raises:
            ImportError: scipy is missing.
            OSError: the model is not there, or cannot be read.
            ValueError: the model is another one, or does not know COCO's 80 classes.
        """
        # The class of transformers needs it, whether or not a loss is computed.
        if importlib.util.find_spec("scipy") is None:
            raise ImportError(
                "reward 'geneval' needs scipy; install it with: pip install 'unigrpo[geneval]'"
            )
        from transformers import AutoImageProcessor

        network = self.build_network().eval().requires_grad_(False)
        if network.config.num_labels != len(CLASSES):
            raise ValueError(
                f"expected a detector of COCO's {len(CLASSES)} classes, got "
                f"{network.config.num_labels} in {self.model!r}; take one that was trained on the "
                "instances of COCO, such as facebook/mask2former-swin-small-coco-instance"
            )
        # The other backend needs torchvision and resizes a little differently.
        processor = AutoImageProcessor.from_pretrained(
            self.processor or self.model, revision=self.revision, backend="pil"
        )
        return network.to(self.target_device()), processor

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> list[list[Detection]]:
        """Find the objects of images.

        Args:
            images: `[N, 3, height, width]` float32 in [0, 1].
        """
        network, processor = self.loaded
        height, width = images.shape[-2:]
        found = []
        for part in images.split(self.batch):
            arrays = [image_bytes(image) for image in part]
            pixels = processor(images=arrays, return_tensors="pt")["pixel_values"]
            output = network(pixel_values=pixels.to(network.device, network.dtype))
            # One image at a time, because masks of its size take much memory.
            for classes, masks in zip(
                output.class_queries_logits, output.masks_queries_logits, strict=True
            ):
                found.append(find_objects(classes, masks, (height, width), self.threshold))
        return found


def find_objects(
    class_logits: Tensor, mask_logits: Tensor, size: tuple[int, int], threshold: float = THRESHOLD
) -> list[Detection]:
    """The objects of one image, from what a Mask2Former predicts for its Q queries.

    Args:
        class_logits: `[Q, 81]`; the last stands for "no object".
        mask_logits: `[Q, rows, columns]`.
        size: height and width of the image.
        threshold: objects that are not more certain are left out.
    """
    queries, labels = class_logits.shape
    labels -= 1
    # [Q]: the likeliest pairs of query and class, as many as there are queries.
    scores, pairs = class_logits.float().softmax(-1)[:, :labels].flatten().topk(queries)
    # A certainty is this probability times another one, so nothing below can pass.
    pairs = pairs[scores > threshold]
    scores = scores[scores > threshold]
    if len(pairs) == 0:
        return []
    chosen = mask_logits[pairs // labels].float()
    # [objects, height, width]
    logits = functional.interpolate(chosen[None], size, mode="bilinear", align_corners=False)[0]
    masks = logits > 0
    pixels = masks.sum((1, 2))
    inside = (logits.sigmoid() * masks).sum((1, 2)) / (pixels + 1e-6)
    certainties = (scores * inside).tolist()
    names = [CLASSES[label] for label in (pairs % labels).tolist()]
    found = []
    for name, certainty, mask in zip(names, certainties, masks.cpu(), strict=True):
        # An object without a pixel has no box; its certainty is 0.
        if certainty > threshold:
            found.append(Detection(name, certainty, box_of(mask), mask))
    return found


def box_of(mask: Tensor) -> Box:
    """The box around a mask: left, top, and the pixel after the last at the right and below.

    Args:
        mask: `[height, width]` bool, True somewhere.
    """
    rows = mask.any(1).nonzero()
    columns = mask.any(0).nonzero()
    return (
        float(columns[0]),
        float(rows[0]),
        float(columns[-1] + 1),
        float(rows[-1] + 1),
    )

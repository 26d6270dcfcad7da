"""How alike an image and a reference image are."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from rewards.base import EpisodeBatch, Failures, Scores
from rewards.image_bytes import read_image
from rewards.vision.model_scorer import ModelScorer

SOURCE = "source"
"""The reference is the first image that came with the prompt."""


class MissingReferenceError(ValueError):
    """An episode has no image to be compared with."""

    kind = "no reference image"


@dataclass(kw_only=True, eq=False)
class Dino(ModelScorer):
    """Cosine between the DINOv2 features (of the class token) of an image and of a reference.

    It is 1 for equal images and near 0 for images of different things; pose, place and background
    count less than in pixels. An episode without a reference has no score.

    Args:
        model: a DINOv2 model, with or without registers; see `ModelScorer` for the options that
            are not listed here.
        reference: "source" for the first image that came with the prompt, or a key of the prompt's
            metadata under which an image is: `[3, height, width]` in [0, 1], or the path of a file.
    """

    model: str = "facebook/dinov2-base"
    reference: str = SOURCE

    registered_name: ClassVar[str] = "dino"
    network_class: ClassVar[str] = "AutoModel"
    model_types: ClassVar[tuple[str, ...]] = ("dinov2", "dinov2_with_registers")

    def __call__(self, episodes: EpisodeBatch) -> Scores:
        """Score images.

        Args:
            episodes: what to score: its images, and its sources or metadata.

        Returns:
            The reward `[N]` float32, NaN for an episode without a reference, and the failures.
        """
        references: dict[int, Tensor] = {}
        failures: list[Exception] = []
        for row in range(len(episodes)):
            try:
                references[row] = self._reference(episodes.sources[row], episodes.metadata[row])
            except ValueError as error:
                failures.append(error)
        rows = list(references)
        reward = torch.full((len(episodes),), torch.nan)
        if rows:
            cosine = self._compare(episodes.images[rows], list(references.values()))
            reward = reward.to(cosine.device).index_put((torch.tensor(rows),), cosine)
        return Scores(reward, failures=Failures.of(failures))

    def image_features(self, network: Any, pixels: Tensor) -> Tensor:
        """The class token after the last normalisation.

        Args:
            network: see `ModelScorer.image_features`.
            pixels: see there.
        """
        return network(pixel_values=pixels).pooler_output

    def score_blank(self, images: Tensor) -> Tensor:
        """The score of a blank image against itself, for `prepare`.

        Args:
            images: `[1, 3, height, width]`.
        """
        metadata = {self.reference: images[0]}
        return self(EpisodeBatch([""], [""], images, [metadata], sources=[images])).reward

    def _compare(self, images: Tensor, references: list[Tensor]) -> Tensor:
        """The cosine between each image and its reference, `[N]`."""

        def compute(positions: list[int]) -> Tensor:
            # One by one, because references may differ in size.
            found = [self.embed(engine, references[position][None]) for position in positions]
            return torch.cat(found)

        # All members of a group have one reference.
        keys = [_digest(reference) for reference in references]
        with self.at_work(images) as engine:
            known = engine.memory(keys, compute)
            drawn = self.embed(engine, images)
            with torch.set_grad_enabled(drawn.requires_grad):
                return (drawn * known.to(drawn.device)).sum(-1)

    def _reference(self, sources: Tensor, metadata: Mapping[str, Any]) -> Tensor:
        """The image `[3, height, width]` to compare with."""
        if self.reference == SOURCE:
            if len(sources) == 0:
                raise MissingReferenceError(
                    "the prompt came with no image to compare with; name a key of the metadata "
                    "with the option 'reference' of reward 'dino'"
                )
            return sources[0]
        if self.reference not in metadata:
            raise MissingReferenceError(
                f"expected an image under {self.reference!r} in the metadata of the prompt, got "
                f"the keys {sorted(metadata)}; change the option 'reference' of reward 'dino'"
            )
        image = metadata[self.reference]
        if isinstance(image, Tensor):
            return image
        return read_image(image)


def _digest(image: Tensor) -> tuple[tuple[int, ...], bytes]:
    """A short key that equal images have in common."""
    content = image.detach().float().cpu().contiguous().numpy().tobytes()
    return tuple(image.shape), hashlib.sha256(content).digest()

"""GenEval as a reward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rewards.base import EpisodeBatch, Failures, Scores
from rewards.geneval.colours import ClipColours, ColourClip, Colours
from rewards.geneval.detector import COUNTING_THRESHOLD, THRESHOLD, Detector, Mask2FormerDetector
from rewards.geneval.names import CLASSES
from rewards.geneval.verifier import Detection, Verdict, check_form, group, verify
from rewards.registry import did_you_mean

SCORES = ("strict", "soft")
"""What the reward can be."""


@dataclass(kw_only=True, eq=False)
class GenEval:
    """Whether an image shows the objects, counts, colours and positions that its prompt names.

    The metadata of a prompt is a line of GenEval's file, see `rewards.geneval.verifier`. The
    thresholds and all further arithmetic are those of the original; the detector is not, because
    mmdet 2 no longer installs beside a present torch. So a figure has to name the detector.

    Args:
        detector: folder or hub id of a Mask2Former for COCO; in Python also a `Detector`.
        detector_revision: branch, tag or commit of its repository.
        colours: folder or hub id of a CLIP model; in Python also a `Colours`.
        colours_revision: likewise.
        device: of both models, such as "cuda:1"; "auto" is the first GPU, or the CPU without one.
        dtype: precision of both: "float32", "bfloat16" or "float16".
        batch: images that the detector sees at once.
        score: "strict", which is 1 or 0; or "soft", see `rewards.geneval.verifier.soft_score`.
        threshold: objects must be more certain than this.
        counting_threshold: the same for prompts whose tag is "counting".

    Raises:
        ValueError: an option is out of range.
    """

    detector: str | Detector = "facebook/mask2former-swin-small-coco-instance"
    detector_revision: str | None = None
    colours: str | Colours = "openai/clip-vit-large-patch14"
    colours_revision: str | None = None
    device: str = "auto"
    dtype: str = "float32"
    batch: int = 8
    score: str = "strict"
    threshold: float = THRESHOLD
    counting_threshold: float = COUNTING_THRESHOLD

    def __post_init__(self) -> None:
        """Check the options."""
        if self.score not in SCORES:
            raise ValueError(
                f"expected the score of reward 'geneval' to be one of {', '.join(SCORES)}, "
                f"got {self.score!r}"
            )
        for name in ("threshold", "counting_threshold"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise ValueError(
                    f"expected the {name} of reward 'geneval' at least 0 and below 1, got {value}"
                )
        self._detector, self._colours = self._make_parts()

    def _make_parts(self) -> tuple[Detector, Colours]:
        """Detector and colours. Where they are named, they load their model at the first use."""
        options: dict[str, Any] = {"device": self.device, "dtype": self.dtype, "batch": self.batch}
        detector = self.detector
        if isinstance(detector, str):
            detector = Mask2FormerDetector(
                model=detector,
                revision=self.detector_revision,
                threshold=min(self.threshold, self.counting_threshold),
                **options,
            )
        colours = self.colours
        if isinstance(colours, str):
            colours = ClipColours(
                ColourClip(model=colours, revision=self.colours_revision, **options)
            )
        return detector, colours

    @property
    def title(self) -> str:
        """What a figure of it must be called: the models and the thresholds that it depends on."""
        detector = _name_of(self.detector, self.detector_revision)
        colours = _name_of(self.colours, self.colours_revision)
        title = f"GenEval's verdict, objects by {detector}, colours by {colours}"
        if (self.threshold, self.counting_threshold) != (THRESHOLD, COUNTING_THRESHOLD):
            title += f", thresholds {self.threshold} and {self.counting_threshold}"
        return title

    def prepare(self) -> None:
        """Load both models, and use them on a blank image.

        Raises:
            Exception: whatever keeps them from being loaded or used.
        """
        blank = torch.zeros(3, 64, 64)
        self._detector(blank[None])
        self._colours(blank, [Detection(CLASSES[0], 1.0, (0.0, 0.0, 64.0, 64.0))], CLASSES[0])

    def __call__(self, episodes: EpisodeBatch) -> Scores:
        """Score the last image of each episode.

        Args:
            episodes: N of them; `images` and `metadata` are used.

        Returns:
            The reward, and both scores as the components `strict` and `soft`. `[N]` float32 each,
            NaN for an image that is not finite.

        Raises:
            ValueError: metadata that does not have GenEval's form, or an unknown class.
        """
        # [N]; no detector says more of such an image than that nothing is in it.
        is_finite = episodes.images.isfinite().flatten(1).all(1)
        rows = is_finite.nonzero()[:, 0].tolist()
        metadata = [episodes.metadata[row] for row in rows]
        components = {name: torch.full((len(episodes),), torch.nan) for name in SCORES}
        for row, verdict in zip(rows, self.verdicts(episodes.images[rows], metadata), strict=True):
            components["strict"][row] = float(verdict.correct)
            components["soft"][row] = verdict.soft
        error = ValueError("expected an image of finite numbers, got one with NaN or infinity")
        failures = Failures.of([error] * (len(episodes) - len(rows)), lambda _: "not finite")
        return Scores(components[self.score], components, failures)

    def verdicts(self, images: Tensor, metadata: Sequence[Mapping[str, Any]]) -> list[Verdict]:
        """What is right and wrong in each image.

        Args:
            images: `[N, 3, height, width]` float32 in [0, 1].
            metadata: of the N prompts.

        Raises:
            ValueError: see `__call__`.
        """
        for wanted in metadata:
            check_form(wanted)
            _check_classes(wanted, getattr(self._detector, "classes", None))
        if not metadata:
            return []
        found = self._detector(images.detach())
        judged = []
        for image, objects, wanted in zip(images, found, metadata, strict=True):
            judged.append(self._judge(image, objects, wanted))
        return judged

    def _judge(
        self, image: Tensor, objects: Sequence[Detection], wanted: Mapping[str, Any]
    ) -> Verdict:
        """The verdict on one image `[3, height, width]`."""
        threshold = self.threshold
        if wanted.get("tag") == "counting":
            threshold = self.counting_threshold

        def _name_colours(some: Sequence[Detection]) -> Sequence[str]:
            return self._colours(image, some, some[0].name)

        return verify(group(objects, threshold), wanted, _name_colours)


def _name_of(part: object, revision: str | None) -> str:
    """What a model or a callable is called."""
    if not isinstance(part, str):
        return str(getattr(part, "__name__", type(part).__name__))
    return f"{part}@{revision}" if revision else part


def _check_classes(wanted: Mapping[str, Any], known: Sequence[str] | None) -> None:
    """Refuse classes that the detector never finds, where it tells which it knows."""
    if known is None:
        return
    for entry in [*wanted.get("include", ()), *wanted.get("exclude", ())]:
        if entry["class"] not in known:
            raise ValueError(
                f"expected a class that the detector of reward 'geneval' knows, got "
                f"{entry['class']!r}; {did_you_mean(entry['class'], list(known))}"
            )

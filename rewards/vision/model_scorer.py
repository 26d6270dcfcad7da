"""What rewards with an image model of transformers have in common."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from rewards.base import EpisodeBatch
from rewards.scorer import LazyReward
from rewards.vision.feature_memory import FeatureMemory
from rewards.vision.pixels import Preparation, has_gradient

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""The precisions of a model by name."""

KEPT_FEATURES = 4096
"""How many texts or images a reward keeps the features of: less than 20 MB."""


@dataclass
class Engine:
    """The heavy parts of a reward.

    Attributes:
        network: a model of transformers that is not trained.
        prepare: makes what the network wants of images.
        tokenizer: for a network that reads texts.
        memory: features of texts or images that come again.
        turn: held by the thread that uses the network.
    """

    network: Any
    prepare: Preparation
    tokenizer: Any
    memory: FeatureMemory
    turn: threading.Lock


@dataclass(kw_only=True, eq=False)
class ModelScorer(LazyReward):
    """Base of rewards that embed images with a model of transformers.

    The weights are the user's: they are read from a folder, or from the Hugging Face hub and its
    cache. The scores have a gradient to the images where the images have one.

    Args:
        model: a folder or the id of a repository on the hub.
        processor: folder or id of what prepares images and texts; by default `model`.
        revision: branch, tag or commit of the model's repository; a processor from another
            repository has its newest.
        device: such as "cuda:1"; "auto" is the first GPU, or the CPU without one.
        dtype: precision of the network: "float32", "bfloat16" or "float16". Whatever it is,
            features are compared in float32.
        batch: how many images the network sees at once.
        offload: keep the network on the CPU between calls, except while a gradient is needed.

    Raises:
        ValueError: an option is out of range.
    """

    model: str
    processor: str | None = None
    revision: str | None = None
    device: str = "auto"
    dtype: str = "float32"
    batch: int = 16
    offload: bool = False

    registered_name: ClassVar[str]
    network_class: ClassVar[str]
    model_types: ClassVar[tuple[str, ...]]
    reads_texts: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the options."""
        if self.dtype not in DTYPES:
            raise ValueError(
                f"expected the dtype of reward {self.registered_name!r} to be one of "
                f"{', '.join(DTYPES)}, got {self.dtype!r}"
            )
        if self.batch < 1:
            raise ValueError(
                f"expected the batch of reward {self.registered_name!r} to be at least 1, "
                f"got {self.batch}"
            )

    def load(self) -> Engine:
        """Load the model and what prepares its inputs.

        Raises:
            OSError: the model or its processor is not there, or cannot be read.
            ValueError: it is a model of another kind, or some of its weights are missing.
        """
        from transformers import AutoImageProcessor, AutoTokenizer

        # What is small comes first, so that a mistake in it is known at once.
        self._check_kind()
        processor = self._read("processor", AutoImageProcessor.from_pretrained, backend="pil")
        prepare = self.preparation(Preparation.of(processor))
        tokenizer = None
        if self.reads_texts:
            tokenizer = self._read("processor", AutoTokenizer.from_pretrained)
        # Weights from an inference mode could not be part of a gradient later.
        with torch.inference_mode(False):
            network = self.build_network().eval().requires_grad_(False)
            if not self.offload:
                network.to(self.target_device())
        memory = FeatureMemory(KEPT_FEATURES)
        return Engine(network, prepare, tokenizer, memory, threading.Lock())

    def build_network(self) -> Any:
        """The network on the CPU, in its precision, with all its weights.

        Raises:
            OSError: see `load`.
            ValueError: see `load`.
        """
        import transformers

        network, found = self._read(
            "model",
            getattr(transformers, self.network_class).from_pretrained,
            dtype=DTYPES[self.dtype],
            output_loading_info=True,
        )
        # Weights that are missing are random, and so would be the reward.
        if found["missing_keys"]:
            raise ValueError(
                f"expected {self.model!r} to have all weights of a {self.network_class}, "
                f"but {len(found['missing_keys'])} are missing, such as "
                f"{min(found['missing_keys'])!r}; load the complete model"
            )
        return network

    def preparation(self, own: Preparation) -> Preparation:
        """How images are prepared for this reward.

        Args:
            own: as the processor of the model says.
        """
        return own

    def image_features(self, network: Any, pixels: Tensor) -> Tensor:
        """The features `[N, D]` of prepared images, of any length.

        Args:
            network: of the class `network_class`.
            pixels: `[N, 3, height, width]` in the precision of the network.
        """
        # Since transformers 5 this is an object with the features in it, as of all its models.
        return network.get_image_features(pixel_values=pixels).pooler_output

    def embed(self, engine: Engine, images: Tensor) -> Tensor:
        """Features of images, with a gradient if the images have one.

        Args:
            engine: as `at_work` gives it.
            images: `[N, 3, height, width]` in [0, 1].

        Returns:
            `[N, D]` float32 of length 1, on the device of the network.
        """
        device = self.target_device()
        features = []
        with torch.set_grad_enabled(has_gradient(images)):
            for part in images.split(self.batch):
                pixels = engine.prepare(part.to(device)).to(DTYPES[self.dtype])
                features.append(self.image_features(engine.network, pixels).float())
            return functional.normalize(torch.cat(features), dim=-1)

    @contextmanager
    def at_work(self, images: Tensor) -> Iterator[Engine]:
        """The heavy parts, on their device, for one thread at a time.

        Args:
            images: what is scored.
        """
        engine = self.loaded
        with engine.turn:
            if self.offload:
                _move(engine.network, self.target_device())
            try:
                yield engine
            finally:
                # The backward pass comes later and needs the weights where they are.
                if self.offload and not has_gradient(images):
                    _move(engine.network, torch.device("cpu"))

    def target_device(self) -> torch.device:
        """Where the network computes."""
        if self.device != "auto":
            return torch.device(self.device)
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("cpu")

    def prepare(self) -> None:
        """Load the model and score a blank image.

        Raises:
            ImportError: a package is missing.
            OSError: see `load`.
            ValueError: see `load`; or the score of the blank image is not finite.
        """
        with torch.no_grad():
            score = self.score_blank(torch.zeros(1, 3, 64, 64))
        if not score.isfinite().all():
            raise ValueError(
                f"reward {self.registered_name!r} scored a blank image {score.item()}; expected a "
                f"finite number. Are the weights of {self.model!r} whole, and is dtype "
                f"{self.dtype} wide enough for them?"
            )

    def score_blank(self, images: Tensor) -> Tensor:
        """The score `[1]` of a blank image, for `prepare`.

        Args:
            images: `[1, 3, height, width]`.
        """
        scored: Any = self
        result = scored(EpisodeBatch(["a blank image"], [""], images, [{}]))
        if isinstance(result, dict):
            result = result["reward"]
        return result

    def _check_kind(self) -> None:
        """Refuse a model that is not of the kind that this reward is made for."""
        from transformers import AutoConfig

        config = self._read("model", AutoConfig.from_pretrained)
        # A class of transformers takes weights of another kind with no more than a warning.
        if config.model_type not in self.model_types:
            raise ValueError(
                f"expected reward {self.registered_name!r} to be given a model of type "
                f"{' or '.join(self.model_types)}, got one of type {config.model_type} "
                f"in {self.model!r}"
            )

    def _read(self, option: str, load: Callable[..., Any], **arguments: Any) -> Any:
        """Read the model or the processor by a function of transformers."""
        source = self.model
        if option == "processor" and self.processor is not None:
            source = self.processor
        if self.revision is not None and source == self.model:
            arguments["revision"] = self.revision
        try:
            return load(source, **arguments)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise OSError(
                f"reward {self.registered_name!r} cannot load its {option} from {source!r}; "
                "expected a folder with its files, or the id of a repository on the Hugging Face "
                f"hub and a connection to it. Name another with the option {option!r}. The "
                f"reason: {reason}"
            ) from error


def _move(network: Any, device: torch.device) -> None:
    """Move a network to a device."""
    # As in `load`.
    with torch.inference_mode(False):
        network.to(device)

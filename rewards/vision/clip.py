"""How well images fit their prompts, for models that embed images and texts in one space."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from rewards.base import EpisodeBatch
from rewards.vision.model_scorer import Engine, ModelScorer
from rewards.vision.pixels import Preparation

H14 = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
"""The CLIP model from which PickScore and HPSv2 were trained. They read texts as it does."""


@dataclass(kw_only=True, eq=False)
class ImageTextScorer(ModelScorer):
    """Base of rewards that compare an image with its prompt: `(scale cos + bias) / divisor`.

    `cos` is the cosine between the features of the image and of the prompt; scale and bias are
    the model's own. A prompt that is too long for the model is cut off at its end. The features
    of a prompt are computed once and kept.

    Args:
        divisor: the score is divided by it; it matters only in sums of rewards.
    """

    divisor: float = 1.0

    reads_texts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        if self.divisor == 0 or not math.isfinite(self.divisor):
            raise ValueError(
                f"expected the divisor of reward {self.registered_name!r} to be a finite number "
                f"other than 0, got {self.divisor}"
            )

    def __call__(self, episodes: EpisodeBatch) -> dict[str, Tensor]:
        """Score images.

        Args:
            episodes: what to score; only prompts and images count.

        Returns:
            `reward`, and `raw` before it is divided, `[N]` float32 each.
        """
        with self.at_work(episodes.images) as engine:
            texts = self.text_features(engine, episodes.prompts)
            images = self.embed(engine, episodes.images)
            with torch.set_grad_enabled(images.requires_grad):
                cosine = (images * texts.to(images.device)).sum(-1)
                raw = self.logits(engine.network, cosine)
        return {"reward": raw / self.divisor, "raw": raw}

    def logits(self, network: Any, cosine: Tensor) -> Tensor:
        """The score before it is divided.

        Args:
            network: of the class `network_class`.
            cosine: between each image and its prompt, `[N]` float32.
        """
        return network.logit_scale.float().exp() * cosine

    def tokens(self, engine: Engine, texts: list[str]) -> dict[str, Tensor]:
        """What the network reads of texts, all of the model's full length.

        Args:
            engine: as `at_work` gives it.
            texts: some texts.
        """
        # With one length for all, a text's features do not depend on its neighbours.
        encoded = engine.tokenizer(
            texts,
            padding="max_length",
            truncation=True,
            max_length=engine.network.config.text_config.max_position_embeddings,
            return_tensors="pt",
        )
        return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}

    def text_features(self, engine: Engine, texts: list[str]) -> Tensor:
        """Features of texts, each computed once.

        Args:
            engine: as `at_work` gives it.
            texts: N texts.

        Returns:
            `[N, D]` float32 of length 1, on the CPU.
        """

        def compute(positions: list[int]) -> Tensor:
            features = []
            for start in range(0, len(positions), self.batch):
                part = [texts[position] for position in positions[start : start + self.batch]]
                tokens = self.tokens(engine, part)
                moved = {name: values.to(self.target_device()) for name, values in tokens.items()}
                found = engine.network.get_text_features(**moved).pooler_output
                features.append(found.float())
            return functional.normalize(torch.cat(features), dim=-1)

        return engine.memory(texts, compute)


@dataclass(kw_only=True, eq=False)
class Clip(ImageTextScorer):
    """CLIP score: `logits_per_image / 30`, which is `100 cos / 30` for OpenAI's models.

    The division is that of flow_grpo; other trainers return the plain cosine.

    Args:
        model: a CLIP model; see `ModelScorer` for this and the options that are not listed here.
        divisor: 30 brings the score near 1.
    """

    model: str = "openai/clip-vit-large-patch14"
    divisor: float = 30.0

    registered_name: ClassVar[str] = "clip"
    network_class: ClassVar[str] = "CLIPModel"
    model_types: ClassVar[tuple[str, ...]] = ("clip",)


@dataclass(kw_only=True, eq=False)
class PickScore(Clip):
    """PickScore, trained on what people chose: `logits_per_image / 26`.

    The division is that of flow_grpo; other trainers return the number before it, which is logged
    as `raw` here.

    Args:
        model: see `Clip`.
        processor: the model's repository is used with that of the model it was trained from.
        divisor: 26 brings the score near 1, and to about 0.8 for images from weak models.
    """

    model: str = "yuvalkirstain/PickScore_v1"
    processor: str | None = H14
    divisor: float = 26.0

    registered_name: ClassVar[str] = "pickscore"


@dataclass(kw_only=True, eq=False)
class HpsV2(Clip):
    """HPSv2, trained on what people preferred: the cosine alone, about 0.2 to 0.35.

    The whole image is seen: its longer side is resized, and black fills the rest of the square.

    The weights must be a `CLIPModel` of transformers. A public one is `adams-story/HPSv2-hf`,
    whose card says that its features equal the original's, but not whether it is v2.0 or v2.1.
    The original files, `xswu/HPSv2` on the hub, have the layout of open_clip and cannot be loaded
    here; convert them first.

    Args:
        model: see `Clip`.
        processor: that of the model from which HPSv2 was trained.
        divisor: 1, as the original has none.
    """

    model: str = "adams-story/HPSv2-hf"
    processor: str | None = H14
    divisor: float = 1.0

    registered_name: ClassVar[str] = "hpsv2"

    def preparation(self, own: Preparation) -> Preparation:
        """The whole image in the square that the model sees.

        Args:
            own: as the processor says.
        """
        square = own.cropped or own.resized
        if isinstance(square, tuple):
            square = max(square)
        if square is None:
            raise ValueError(
                f"expected the processor of reward {self.registered_name!r} to have a crop_size "
                "or a size, got neither; name that of a CLIP model with the option 'processor'"
            )
        return replace(own, resized=square, cropped=(square, square), is_longer_side=True)

    def logits(self, network: Any, cosine: Tensor) -> Tensor:
        """The cosine itself.

        Args:
            network: see `ImageTextScorer.logits`.
            cosine: see there.
        """
        return cosine


@dataclass(kw_only=True, eq=False)
class SigLip(ImageTextScorer):
    """SigLIP: `logits_per_image`, whose sigmoid is the probability that image and text fit.

    Texts are read in small letters, as these models were trained. The tokenizer of the first
    SigLIP needs the package sentencepiece; that of SigLIP 2 needs none.

    Args:
        model: a SigLIP model, or a SigLIP 2 model of fixed size; see `ModelScorer` for this and
            the options that are not listed here.
    """

    model: str = "google/siglip-so400m-patch14-384"

    registered_name: ClassVar[str] = "siglip"
    network_class: ClassVar[str] = "SiglipModel"
    model_types: ClassVar[tuple[str, ...]] = ("siglip",)

    def logits(self, network: Any, cosine: Tensor) -> Tensor:
        """The scaled cosine and the model's bias.

        Args:
            network: see `ImageTextScorer.logits`.
            cosine: see there.
        """
        return super().logits(network, cosine) + network.logit_bias.float()

    def tokens(self, engine: Engine, texts: list[str]) -> dict[str, Tensor]:
        """What the network reads: the padding too, as it was trained.

        Args:
            engine: see `ImageTextScorer.tokens`.
            texts: see there.
        """
        ids = super().tokens(engine, [text.lower() for text in texts])["input_ids"]
        return {"input_ids": ids}

"""How beautiful an image is, whatever its prompt."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from rewards.base import EpisodeBatch
from rewards.vision.model_scorer import Engine, ModelScorer

LINEAR_LAYERS = [0, 2, 4, 6, 7]
"""The numbers of the linear layers in the predictor. Between them is dropout, which rests."""

HEAD = "sac+logos+ava1-l14-linearMSE.pth"
"""The file of the predictor."""


@dataclass
class AestheticEngine(Engine):
    """The heavy parts, and the predictor.

    Attributes:
        weight: `[D]` float32.
        bias: one float32.
    """

    weight: Tensor
    bias: Tensor


@dataclass(kw_only=True, eq=False)
class Aesthetic(ModelScorer):
    """The LAION aesthetic predictor, about 1 to 10: `weight . features + bias`.

    The features are those of an image for CLIP, of length 1. The predictor has five layers but no
    activation between them, so that it is one vector and a bias. It was trained on ratings of
    photographs and paintings; the prompt does not count.

    Args:
        model: the CLIP model that the predictor was trained on; see `ModelScorer` for the options
            that are not listed here.
        head: the predictor's file, `sac+logos+ava1-l14-linearMSE.pth` from the repository
            christophschuhmann/improved-aesthetic-predictor on GitHub, or a safetensors file of
            the same tensors or of one `weight` `[1, D]` and `bias` `[1]`.
    """

    model: str = "openai/clip-vit-large-patch14"
    head: str | None = None

    registered_name: ClassVar[str] = "aesthetic"
    network_class: ClassVar[str] = "CLIPModel"
    model_types: ClassVar[tuple[str, ...]] = ("clip",)

    def load(self) -> AestheticEngine:
        """Load the model and the predictor.

        Raises:
            OSError: see `ModelScorer.load`; or there is no head.
            ValueError: see `ModelScorer.load`; or the head is another network, or does not fit.
        """
        # First what is quick to check.
        if self.head is None:
            raise ValueError(
                f"reward 'aesthetic' needs its option 'head': the path of {HEAD}, from the "
                "repository christophschuhmann/improved-aesthetic-predictor on GitHub"
            )
        weight, bias = read_head(self.head)
        engine = super().load()
        width = engine.network.config.projection_dim
        if len(weight) != width:
            raise ValueError(
                f"expected the head {self.head!r} to take the {width} features of {self.model!r}, "
                f"but it takes {len(weight)}; the predictor belongs to CLIP ViT-L/14"
            )
        return AestheticEngine(**vars(engine), weight=weight, bias=bias)

    def build_network(self) -> Any:
        """The image part of the model; see `ModelScorer.build_network`."""
        network = super().build_network()
        # No text is read, so more than a quarter of the weights need no memory.
        network.text_model = None
        return network

    def __call__(self, episodes: EpisodeBatch) -> Tensor:
        """Score images.

        Args:
            episodes: what to score; only the images count.

        Returns:
            `[N]` float32.
        """
        with self.at_work(episodes.images):
            engine: AestheticEngine = self.loaded
            features = self.embed(engine, episodes.images)
            device = features.device
            return features @ engine.weight.to(device) + engine.bias.to(device)


def read_head(path: str | Path) -> tuple[Tensor, Tensor]:
    """Read a predictor without activations and make one affine map of its layers.

    Args:
        path: of a PyTorch file, which is read without running code, or a safetensors file.

    Returns:
        The weight `[D]` and the bias, a single number, both float32.

    Raises:
        OSError: there is no such file.
        ValueError: the file has other layers than `LINEAR_LAYERS`, or not one alone.
    """
    if str(path).endswith(".safetensors"):
        from safetensors.torch import load_file

        tensors = load_file(path)
    else:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    layers = {}
    for name in tensors:
        found = re.fullmatch(r"(?:.*?(\d+)\.)?weight", name)
        if found:
            layers[int(found[1] or 0)] = name.removesuffix("weight")
    numbers = sorted(layers)
    # The predictor with activations has the same tensors under other numbers.
    if numbers not in (LINEAR_LAYERS, LINEAR_LAYERS[:1]):
        raise ValueError(
            f"expected the layers {LINEAR_LAYERS} of {HEAD}, or one weight and bias, in "
            f"{str(path)!r}; got layers {numbers}. A predictor with activations is not supported"
        )
    # In float64, so that five products cost no precision.
    product = torch.eye(tensors[f"{layers[0]}weight"].shape[1], dtype=torch.float64)
    bias = product.new_zeros(len(product))
    for number in numbers:
        weight = tensors[f"{layers[number]}weight"].double()
        product = weight @ product
        if number == 0:
            bias = tensors[f"{layers[number]}bias"].double()
        else:
            bias = weight @ bias + tensors[f"{layers[number]}bias"].double()
    if len(product) != 1:
        raise ValueError(
            f"expected the last layer of {str(path)!r} to give one number, got {len(product)}"
        )
    return product[0].float(), bias[0].float()

"""How the released BAGEL is written down: tokens of Qwen2, latents of FLUX's auto-encoder."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import Qwen2Tokenizer

from agents.models.bagel.config import BagelConfig
from agents.models.bagel.release_files import AUTOENCODER
from agents.models.bagel.resize import Resize
from agents.models.bagel.vae import VaeLatents, load_vae
from agents.storage import read_shapes, read_tensors
from unigrpo_env.mdp.noise import keyed_noise
from unigrpo_env.segment_processor import SegmentProcessor

VAE_TRANSFORM = Resize(max_size=1024, min_size=512, stride=16)
"""What the release does to a source before the auto-encoder reads it."""
VIT_TRANSFORM = Resize(max_size=980, min_size=224, stride=14)
"""What it does to an image before the vision encoder reads it."""

BOS = "<|im_start|>"
"""Opens every text."""
EOS = "<|im_end|>"
"""Closes every text; where the model wrote it, the image opens."""
END = "<|endoftext|>"
"""Ends an episode in scenarios that let the model end it.

Qwen2 was trained to close a document with it. BAGEL was not trained to end an episode at all, so a
model has to learn this use of the token.
"""
PAD = "<|vision_pad|>"
"""Fills the unused end of a token buffer; no model reads it."""
IMAGE = "<|image_pad|>"
"""Stands in the stream for an image to be read."""
MARKS = (BOS, EOS, END, PAD, IMAGE, "<|vision_start|>", "<|vision_end|>")
"""All tokens that the tokenizer must have."""

SYSTEM_PROMPT = (
    "You should first think about the {what} process in the mind and then {then}. \n"
    "The {what} process is enclosed within <think> </think> tags, "
    "i.e. <think> {what} process here </think> {result} here"
)
"""What the release was trained to read before it thinks."""


class BagelProcessor(SegmentProcessor):
    """Text and images of the released BAGEL.

    Args:
        tokenizer: of Qwen2, see `load_tokenizer`.
        autoencoder: of the images.
        config: the model's sizes, among them that of the images.
        vae_transform: how a source is resized; None for `VAE_TRANSFORM`, bounded by the positions.
        vit_transform: how an image is resized for the vision encoder; None likewise for
            `VIT_TRANSFORM`.

    Attributes:
        config: the sizes.
        posterior: whether the latent of a source is a `sample` of the auto-encoder's distribution,
            as in the release, or its `mean`.
        posterior_noise: gives the noise of that sample, one float32 for each value of a latent
            image `[channels, rows, columns]`, for an image `[height, width, 3]` uint8. By default
            the image itself is the key of the noise, so that all members of a group read the same
            source.

    Raises:
        ValueError: the tokenizer does not fit the model, or `vit_transform` the vision encoder.
    """

    scenario_defaults = MappingProxyType(
        {"prompt_budget": 1024 + 48, "text_budget": 1023, "turn_budget": 1024, "image_steps": 49}
    )

    def __init__(
        self,
        tokenizer: Any,
        autoencoder: Autoencoder,
        config: BagelConfig,
        *,
        vae_transform: Resize | None = None,
        vit_transform: Resize | None = None,
    ) -> None:
        super().__init__(tokenizer, config.vocab_size, image_token=IMAGE, end_token=END)
        if len(tokenizer) > config.vocab_size:
            raise ValueError(
                f"expected a tokenizer of at most {config.vocab_size} tokens, as many as the model "
                f"has, got {len(tokenizer)}; are tokenizer and weights of one folder?"
            )
        self.autoencoder = autoencoder
        added = tokenizer.added_tokens_decoder.items()
        special = {index for index, token in added if token.special}
        self._special_ids = frozenset(special.union(tokenizer.convert_tokens_to_ids(MARKS)))
        self.posterior: Literal["sample", "mean"] = "sample"
        self.posterior_noise: Callable[[Tensor], Tensor] = partial(
            keyed_posterior_noise, channels=config.z_channels, downsampling=config.downsampling
        )
        longest = config.token_side * config.max_latent_size
        self.vae_transform = vae_transform or VAE_TRANSFORM.bounded(longest)
        view = VIT_TRANSFORM
        if config.vision is not None:
            view = view.bounded(config.vision.longest_side)
        self.vit_transform = vit_transform or view
        self._set_sizes(config)

    @classmethod
    def from_release(
        cls,
        folder: str | Path,
        config: BagelConfig,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        **transforms: Resize,
    ) -> BagelProcessor:
        """Read tokenizer and auto-encoder of a released folder.

        The auto-encoder's weights are read when the first image is.

        Args:
            folder: with the tokenizer's files and `ae.safetensors`.
            config: the model's sizes.
            dtype: in which the auto-encoder computes.
            device: where it begins; it follows latents and images to an accelerator.
            **transforms: see the class.

        Raises:
            ValueError: a file is missing or damaged, a token is missing, or see the class.
        """
        folder = Path(folder)
        autoencoder = Autoencoder(folder / AUTOENCODER, dtype, device)
        return cls(load_tokenizer(folder), autoencoder, config, **transforms)

    def resized(self, height: int, width: int) -> BagelProcessor:
        """The same for images of another size, in pixels; tokenizer and auto-encoder are shared.

        Raises:
            ValueError: a size that the model has no positions for.
        """
        other = copy.copy(self)
        other._set_sizes(self.config.with_image_size(height, width))
        return other

    def _set_sizes(self, config: BagelConfig) -> None:
        self.config = config
        self.image_size = config.image_size
        self.latent_shape = (config.latent_height * config.latent_width, config.latent_dim)
        self.pixel_size = None
        if config.vision is not None:
            self.pixel_size = self.vit_transform.size(*config.image_size)
            config.vision.check_size(*self.pixel_size)

    def forbidden_ids(self, reads_images: bool = False) -> tuple[int, ...]:
        """Every special token but `<|im_end|>`, and the entries that no text has."""
        unused = range(len(self.tokenizer), self.vocab_size)
        return (*sorted(self._special_ids - {self.open_image_id}), *unused)

    def control_ids(self) -> frozenset[int]:
        """All special tokens."""
        return self._special_ids

    def system_prompt(self, *, thinks: bool, draws: bool) -> str:
        """One of the two texts that BAGEL reads before it thinks; empty where it does not."""
        if not thinks:
            return ""
        if draws:
            return SYSTEM_PROMPT.format(what="planning", then="generate the image", result="image")
        return SYSTEM_PROMPT.format(
            what="reasoning", then="provide the user with the answer", result="answer"
        )

    def source_size(self, height: int, width: int) -> tuple[int, int]:
        """The (height, width) of the image that is drawn from a source of this size, in pixels."""
        return self.vae_transform.size(height, width)

    def fit_source(self, image: Tensor) -> Tensor:
        """Resize a source as the release does, with Pillow; one of the right size stays as it is.

        Args:
            image: `[3, height, width]` float32 in [0, 1].

        Returns:
            `[3, *image_size]` float32 in [0, 1], in 256 levels.

        Raises:
            ValueError: the source gets another size than this processor's.
        """
        height, width = image.shape[1:]
        levels = (image * 255).round().byte()
        if (height, width) != self.image_size:
            size = self.source_size(height, width)
            if size != self.image_size:
                raise ValueError(
                    f"expected a source that becomes {_times(self.image_size)} pixels (height x "
                    f"width), got one of {height} x {width}, which becomes {_times(size)}; set the "
                    "image size to that, or resize the source first"
                )
            levels = self.vae_transform.resized(levels[None])[0]
        return levels.float() / 255

    def view_images(self, images: Tensor) -> Tensor:
        """What the vision encoder sees of images, resized with Pillow.

        Args:
            images: `[N, 3, *image_size]` float32 in [0, 1].

        Returns:
            `[N, 3, *pixel_size]` uint8, on the same device.
        """
        # Cut off, not rounded, as the release stores its images. A byte that was divided by 255
        # comes back as itself.
        return self.vit_transform.resized((images * 255).byte())

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """See `Processor`; `posterior` says which latent an image gets."""
        noise = None
        if self.posterior == "sample":
            levels = (images * 255).round().byte().permute(0, 2, 3, 1)
            noise = torch.stack([self.posterior_noise(image) for image in levels])
        return self._latents(images.device).encode(images, noise)

    def decode_latents(self, latents: Tensor) -> Tensor:
        """See `Processor`."""
        return self._latents(latents.device).decode(latents)

    def _latents(self, device: torch.device) -> VaeLatents:
        config = self.config
        return VaeLatents(
            self.autoencoder.on(device),
            config.latent_height,
            config.latent_width,
            config.latent_patch_size,
        )


class Autoencoder:
    """The auto-encoder of a released folder, which is read at its first use.

    Args:
        path: of `ae.safetensors`.
        dtype: in which it computes.
        device: where it begins.

    Raises:
        ValueError: the file is missing or is not whole.
    """

    def __init__(
        self,
        path: Path,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        # Only the header is read, but a file that is cut off is found out.
        read_shapes(path)
        self.path = path
        self.dtype = dtype
        self.device = device
        self._vae: Any = None

    def on(self, device: torch.device) -> Any:
        """The `diffusers.AutoencoderKL`, moved to an accelerator as soon as one is asked for."""
        if self._vae is None:
            weights = read_tensors(self.path)
            self._vae = load_vae(weights, dtype=self.dtype, device=self.device)
        # Sources are on the CPU. Once the auto-encoder is on an accelerator they go there too.
        if device.type != "cpu":
            self._vae.to(device)
        return self._vae


def keyed_posterior_noise(image: Tensor, channels: int, downsampling: int) -> Tensor:
    """Standard normal noise that depends on the image alone.

    Args:
        image: `[height, width, 3]` uint8.
        channels: of a latent image.
        downsampling: sides of an image are so many times those of its latent image.

    Returns:
        `[channels, height / downsampling, width / downsampling]` float32.
    """
    height, width = image.shape[:2]
    key = hashlib.blake2b(image.cpu().numpy().tobytes(), digest_size=8).digest()
    shape = (channels, height // downsampling, width // downsampling)
    return keyed_noise([(int.from_bytes(key, "big"),)], shape)[0]


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a released folder, with `<|im_start|>` before a text.

    Args:
        folder: with `tokenizer_config.json`, and `tokenizer.json` or `vocab.json` and `merges.txt`.

    Raises:
        ValueError: a file is missing or damaged, or a token that the layout needs is missing.
    """
    has_words = (folder / "tokenizer.json").is_file()
    has_parts = (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
    if not (folder / "tokenizer_config.json").is_file() or not (has_words or has_parts):
        raise ValueError(
            f"expected a Qwen2 tokenizer in {folder} (tokenizer_config.json, and tokenizer.json or "
            "vocab.json and merges.txt), found not all of it; copy the release's files there"
        )
    try:
        # Not AutoTokenizer: it reads config.json, which in some copies of the release is no JSON.
        tokenizer = Qwen2Tokenizer.from_pretrained(folder)
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise ValueError(
            f"the tokenizer in {folder} cannot be read ({error}); copy its files again"
        ) from error
    vocabulary = tokenizer.get_vocab()
    missing = [mark for mark in MARKS if mark not in vocabulary]
    if missing:
        raise ValueError(
            f"expected a tokenizer with the tokens {', '.join(MARKS)}, got one in {folder} without "
            f"{', '.join(missing)}; use the tokenizer of the release"
        )
    tokenizer.bos_token = BOS
    tokenizer.eos_token = EOS
    tokenizer.pad_token = PAD
    return tokenizer


def _times(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"

"""Sizes of a BAGEL model."""

from __future__ import annotations

from dataclasses import dataclass, replace

from transformers import Qwen2Config

from agents.models.bagel.vision import VisionConfig


@dataclass(frozen=True)
class BagelConfig:
    """Sizes of a BAGEL model; the defaults are the release's.

    Attributes:
        vocab_size: the number of tokens.
        hidden_size: width of the language model.
        intermediate_size: width of its MLPs.
        num_hidden_layers: the number of its layers.
        num_attention_heads: heads of the queries.
        num_key_value_heads: heads of keys and values.
        rope_theta: base of the rotary positions.
        rms_norm_eps: epsilon of all norms of the language model.
        hidden_act: activation of the MLPs.
        z_channels: channels of a latent image.
        downsampling: sides of an image are so many times those of its latent image; 1 without an
            auto-encoder.
        latent_patch_size: a latent token holds a `patch x patch` square of `z_channels` values.
        latent_height: latent tokens from top to bottom.
        latent_width: latent tokens from left to right.
        max_latent_size: side of the position table; the entry of a token is
            `row * max_latent_size + column`.
        image_start_id: the marker before an image.
        image_end_id: the marker after an image.
        vision: the vision encoder that reads the pixels of an image; None if the model has none.
        processor: the name of the model's processor, see `UnifiedModel.processor`; empty for none.
    """

    vocab_size: int = 152064
    hidden_size: int = 3584
    intermediate_size: int = 18944
    num_hidden_layers: int = 28
    num_attention_heads: int = 28
    num_key_value_heads: int = 4
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    hidden_act: str = "silu"
    z_channels: int = 16
    downsampling: int = 8
    latent_patch_size: int = 2
    latent_height: int = 64
    latent_width: int = 64
    max_latent_size: int = 64
    image_start_id: int = 151652
    image_end_id: int = 151653
    vision: VisionConfig | None = None
    processor: str = ""

    def __post_init__(self) -> None:
        # A config file holds the vision encoder's sizes as a plain object.
        if isinstance(self.vision, dict):
            object.__setattr__(self, "vision", VisionConfig(**self.vision))

    @property
    def latent_dim(self) -> int:
        """Values of a latent token."""
        return self.z_channels * self.latent_patch_size**2

    @property
    def token_side(self) -> int:
        """Pixels of a latent token, along each side."""
        return self.downsampling * self.latent_patch_size

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the images that are drawn, in pixels."""
        return self.latent_height * self.token_side, self.latent_width * self.token_side

    def with_image_size(self, height: int, width: int) -> BagelConfig:
        """The same for images of another size, in pixels.

        Raises:
            ValueError: there are no positions for an image of this size.
        """
        side = self.token_side
        longest = side * self.max_latent_size
        whole = height % side == 0 and width % side == 0
        if not whole or min(height, width) < side or max(height, width) > longest:
            raise ValueError(
                f"expected an image height and width in multiples of {side} up to {longest} "
                f"pixels, got {height} x {width}; choose the nearest such size"
            )
        return replace(self, latent_height=height // side, latent_width=width // side)

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        return self.hidden_size // self.num_attention_heads

    def qwen2(self) -> Qwen2Config:
        """Give the same sizes in the form that the parts from transformers take."""
        return Qwen2Config(
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
            hidden_act=self.hidden_act,
            # Transformers 5 reads the base of the rotary positions only in this form.
            rope_parameters={"rope_type": "default", "rope_theta": self.rope_theta},
        )

"""Sizes of the shipped model: the classes of BAGEL with under a million parameters."""

from __future__ import annotations

from agents.models.bagel.config import BagelConfig
from agents.models.bagel.model import Bagel
from agents.models.registry import TINY

TINY_CONFIG = BagelConfig(
    # The words and the marks of the shapes world.
    vocab_size=64,
    hidden_size=96,
    intermediate_size=256,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    rope_theta=1e3,
    # The shapes world has no auto-encoder: a latent token is a 4 x 4 square of pixels.
    z_channels=3,
    downsampling=1,
    latent_patch_size=4,
    latent_height=6,
    latent_width=6,
    max_latent_size=6,
    image_start_id=3,
    image_end_id=4,
    processor="shapes",
)


def load_tiny() -> Bagel:
    """The shipped weights: a BAGEL of under a million parameters for the shapes world."""
    return Bagel.from_pretrained(TINY)

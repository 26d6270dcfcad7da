"""Sizes of the shipped model: BAGEL's classes, under a million parameters."""

from agents.models.bagel import BagelConfig

TINY_CONFIG = BagelConfig(
    vocab_size=64,
    hidden_size=96,
    intermediate_size=256,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    rope_theta=1e3,
    z_channels=3,
    latent_patch_size=4,
    latent_height=6,
    latent_width=6,
    max_latent_size=6,
    image_start_id=3,
    image_end_id=4,
)

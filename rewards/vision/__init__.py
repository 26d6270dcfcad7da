"""Rewards on image models of transformers: how well an image fits, or looks."""

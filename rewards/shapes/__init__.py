"""Rewards of the shapes world, which read an image's pixels and never trust the model's words."""

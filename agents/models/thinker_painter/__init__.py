"""A language model of transformers that thinks, and a pipeline of diffusers that paints."""

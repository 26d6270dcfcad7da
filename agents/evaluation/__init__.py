"""How well a model does on held-out prompts."""

"""Tasks: where prompts come from, and demonstrations of how to answer them."""

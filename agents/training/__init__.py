"""Training: building the parts, the loop, optimisation, checkpoints, supervised training."""

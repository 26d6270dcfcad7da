"""Env times policy: complete episodes as trajectories."""

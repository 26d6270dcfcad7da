"""Scenarios: what an episode may do, as data."""

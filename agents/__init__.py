"""Everything that learns: models, policy, rollout, objectives, training, evaluation, commands."""

# Another distribution (openai-agents) has a package `agents` too. `unigrpo_env.launch` looks for
# this name to see whether that one has overwritten ours.
__unigrpo__ = True

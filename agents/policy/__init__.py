"""The policy: a model, its cache, its noise, and the stochastic sampler of latents."""

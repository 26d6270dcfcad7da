"""The Markov decision process of interleaved generation (UniGRPO, section 4.1), on tensors.

One step is one token (text phase) or one denoising step (image phase). `transition` is the only
place where an episode advances; the envs only wrap it.
"""

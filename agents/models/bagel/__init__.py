"""BAGEL (Deng et al. 2025, arXiv 2505.14683): the architecture, its vision encoder and its VAE."""

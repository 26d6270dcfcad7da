"""The oracle: a tiny random model run through the public reference implementation, and ours with its weights."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from agents.models import Bagel, BagelConfig


@pytest.fixture(scope="session")
def oracle():
    return load_file(Path(__file__).parents[1] / "data" / "bagel_oracle.safetensors")


@pytest.fixture(scope="session")
def model(oracle):
    config = BagelConfig(
        vocab_size=160, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        max_latent_size=12, latent_height=8, latent_width=8, image_start_id=154, image_end_id=155,
    )  # fmt: skip
    model = Bagel(config)
    model.load_state_dict({name: value for name, value in oracle.items() if not name.startswith(("in.", "out."))})
    return model


@pytest.fixture
def read(model, oracle):
    """Read named text segments of the oracle, by the model or something around it; returns the last logits and the context."""

    def read_segments(*segments, by=model):
        context, logits = by.start(1), None
        for segment in segments:
            logits, context = by.read_text(context, oracle[f"in.{segment}.ids"][None])
        return logits, context

    return read_segments

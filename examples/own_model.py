"""A model of your own: a GRU that reads tokens, and an MLP that draws.

    python examples/own_model.py

It learns the toy task (answer `dark` or `light` with the same word, then paint that grey) from
demonstrations first, then from the reward alone. `tests/examples/test_own_model.py` runs the
contract of every model on it.

N rows, T tokens, V = 5 tokens of the vocabulary, H hidden values, L x C = 1 x 12 latent.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from agents.config import load_config
from agents.models.base import UnifiedModel
from agents.models.registry import register_model, register_model_class
from agents.training.pretraining import SupervisedSettings, train_supervised
from agents.training.trainer import Trainer


@dataclass(frozen=True)
class GruConfig:
    """Sizes; `processor` names what brings the vocabulary and the latents."""

    vocab_size: int = 5
    latent_tokens: int = 1
    latent_dim: int = 12
    hidden_size: int = 32
    processor: str = "toy"


@dataclass(frozen=True)
class GruContext:
    """All that the model remembers of what it read: one hidden state a row, `[N, H]`."""

    hidden: Tensor

    @property
    def batch_size(self) -> int:
        return len(self.hidden)

    def select(self, rows: Tensor) -> GruContext:
        return GruContext(self.hidden[rows])

    def repeat_interleave(self, times: int) -> GruContext:
        return GruContext(self.hidden.repeat_interleave(times, dim=0))

    def detach(self) -> GruContext:
        return GruContext(self.hidden.detach())


@register_model_class
class GruModel(UnifiedModel[GruContext]):
    """Text moves the hidden state; an image is drawn from it."""

    config_class = GruConfig

    def __init__(self, config: GruConfig = GruConfig()) -> None:
        super().__init__()
        self.config = config
        hidden = config.hidden_size
        values = config.latent_tokens * config.latent_dim
        self.embedding = nn.Embedding(config.vocab_size, hidden)
        self.cell = nn.GRUCell(hidden, hidden)
        self.head = nn.Linear(hidden, config.vocab_size)
        self.velocity = nn.Sequential(
            nn.Linear(hidden + values + 1, 128), nn.SiLU(), nn.Linear(128, values)
        )

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def latent_shape(self) -> tuple[int, int]:
        return self.config.latent_tokens, self.config.latent_dim

    def parameters_by_expert(self) -> dict[str, list[nn.Parameter]]:
        image = list(self.velocity.parameters())
        text = [*self.embedding.parameters(), *self.cell.parameters(), *self.head.parameters()]
        return {"text": text, "image": image}

    def empty_context(self, batch_size: int) -> GruContext:
        return GruContext(self.head.weight.new_zeros(batch_size, self.config.hidden_size))

    def append_text(
        self, context: GruContext, ids: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, GruContext]:
        if mask is None:
            mask = torch.ones_like(ids, dtype=torch.bool)
        hidden = context.hidden
        states = []
        for column in range(ids.shape[1]):
            new = self.cell(self.embedding(ids[:, column]), hidden)
            # Padding leaves no trace.
            hidden = torch.where(mask[:, column, None], new, hidden)
            states.append(hidden)
        # [N, T, H] -> [N, T, V]
        return self.head(torch.stack(states, 1)), GruContext(hidden)

    def predict_velocity(self, context: GruContext, x: Tensor, t: Tensor) -> Tensor:
        seen = torch.cat([context.hidden, x.flatten(1), t[:, None]], 1)
        # The weights may be in bfloat16; velocities are float32.
        return self.velocity(seen.to(context.hidden.dtype)).float().view_as(x)


@register_model("gru")
def gru() -> GruModel:
    """Fresh weights: `unigrpo train --import examples/own_model.py model.name=gru env=toy`."""
    torch.manual_seed(0)
    return GruModel()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200, help="updates on demonstrations")
    parser.add_argument("--iterations", type=int, default=30, help="iterations of RL")
    arguments = parser.parse_args()
    config = load_config(
        [
            "env=toy",
            "model.name=gru",
            "optimizer.text_lr=0.003",
            "optimizer.image_lr=0.003",
            f"trainer.iterations={arguments.iterations}",
        ]
    )
    trainer = Trainer(config)
    print(f"reward at random: {trainer.evaluate().accuracy:.3f}")

    settings = SupervisedSettings(steps=arguments.steps, warmup=10, time_shift=1.0)
    train_supervised(trainer.model, [(trainer.variant, 1.0)], settings)
    print(f"reward before RL: {trainer.evaluate().accuracy:.3f}", flush=True)

    trainer.train()
    print(f"reward after RL: {trainer.evaluate().accuracy:.3f}")


if __name__ == "__main__":
    main()

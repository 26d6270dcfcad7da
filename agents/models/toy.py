"""The smallest model behind the verbs of the seam: two tables. Its best weights for the toy task are known, so learning can be checked.

It remembers the last word it read. The next token comes from a table over (word, last token). A picture is Gaussian around the word's row of
a second table, and for a Gaussian the velocity of the flow is known in closed form.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from agents.models.seam import UnifiedModel


def gaussian_velocity(x: Tensor, t: Tensor, mean: Tensor, spread: float) -> Tensor:
    """E[noise - x_0 | x_t = x] for x_0 ~ N(mean, spread^2) and x_t = (1 - t) x_0 + t noise.

    Args:
        x, mean: `[N, L, C]`.
        t: `[N]`, 1 is noise.
    """
    t = t[:, None, None]
    variance = (1 - t) ** 2 * spread**2 + t**2
    return (t - (1 - t) * spread**2) / variance * (x - (1 - t) * mean) - mean


@dataclass
class ToyContext:
    """The last word and the last token of each row, `[N]` int64."""

    word: Tensor
    last: Tensor

    @property
    def batch_size(self) -> int:
        return len(self.word)

    def select(self, rows: Tensor) -> ToyContext:
        return ToyContext(self.word[rows], self.last[rows])

    def repeat(self, times: int) -> ToyContext:
        return ToyContext(self.word.repeat_interleave(times), self.last.repeat_interleave(times))

    def detach(self) -> ToyContext:
        return self


@dataclass(frozen=True)
class ToyConfig:
    """Sizes of a `ToyModel`; tokens below `first_word` are marks. `spread` is the std of its pictures."""

    vocab_size: int = 5
    first_word: int = 3
    latent_tokens: int = 1
    latent_dim: int = 12
    spread: float = 0.25


class ToyModel(UnifiedModel[ToyContext]):
    """Two tables, at zero when new: any token is as likely as any other, pictures are middle grey."""

    config_class = ToyConfig

    def __init__(self, config: ToyConfig = ToyConfig()) -> None:
        super().__init__()
        self.config = config
        self.words = nn.Parameter(torch.zeros(config.vocab_size, config.vocab_size, config.vocab_size))
        self.pictures = nn.Parameter(torch.zeros(config.vocab_size, config.latent_tokens, config.latent_dim))

    def parameter_lists(self) -> dict[str, list[nn.Parameter]]:
        return {"text": [self.words], "image": [self.pictures]}

    def start(self, batch_size: int) -> ToyContext:
        nothing = torch.zeros(batch_size, dtype=torch.int64, device=self.words.device)
        return ToyContext(nothing, nothing)

    def read_text(
        self, context: ToyContext, ids: Tensor, mask: Tensor | None = None, *, last_only: bool = False
    ) -> tuple[Tensor, ToyContext]:
        mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
        words, lasts = [], []
        word, last = context.word, context.last
        for column in range(ids.shape[1]):
            token, counts = ids[:, column], mask[:, column]
            word = torch.where(counts & (token >= self.config.first_word), token, word)
            last = torch.where(counts, token, last)
            words.append(word)
            lasts.append(last)
        logits = self.words[word, last].unsqueeze(1) if last_only else self.words[torch.stack(words, 1), torch.stack(lasts, 1)]
        return logits, ToyContext(word, last)

    def velocity(self, context: ToyContext, x: Tensor, t: Tensor) -> Tensor:
        return gaussian_velocity(x, t, self.pictures[context.word], self.config.spread)

"""The smallest model: two tables. Its best weights for the toy task are known.

It remembers the last word that it read. The next token comes from a table over (word, last token).
An image is Gaussian around the word's row of a second table, and for a Gaussian the velocity of the
flow is known in closed form. So a test can check what training should reach.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from agents.models.base import UnifiedModel


def gaussian_velocity(x: Tensor, t: Tensor, mean: Tensor, std: float) -> Tensor:
    """Compute E[noise - x_0 | x_t = x] for x_0 ~ N(mean, std^2) and x_t = (1 - t) x_0 + t noise.

    Args:
        x: `[N, L, C]` float32.
        t: `[N]` float32; 1 is noise.
        mean: `[N, L, C]` float32.
        std: the standard deviation of every value of x_0.

    Returns:
        `[N, L, C]` float32.
    """
    # [N] -> [N, 1, 1]
    t = t[:, None, None]
    # x_t is Gaussian with mean (1 - t) * mean and this variance; regress noise - x_0 on it.
    variance = (1 - t) ** 2 * std**2 + t**2
    return (t - (1 - t) * std**2) / variance * (x - (1 - t) * mean) - mean


@dataclass
class ToyContext:
    """What a `ToyModel` remembers of each row. It is a `Context`.

    Attributes:
        word: `[N]` int64, the last word.
        last: `[N]` int64, the last token, be it a word or a mark.
    """

    word: Tensor
    last: Tensor

    @property
    def batch_size(self) -> int:
        """The number of rows."""
        return len(self.word)

    def select(self, rows: Tensor) -> ToyContext:
        """Take rows by index `[M]` int64; repeats are allowed."""
        return ToyContext(self.word[rows], self.last[rows])

    def repeat_interleave(self, times: int) -> ToyContext:
        """Repeat each row `times` times: row 0, row 0, ..., row 1, row 1, ..."""
        return ToyContext(self.word.repeat_interleave(times), self.last.repeat_interleave(times))

    def detach(self) -> ToyContext:
        """Give the context itself: tokens have no gradient."""
        return self


@dataclass(frozen=True)
class ToyConfig:
    """Sizes of a `ToyModel`.

    Attributes:
        vocab_size: the number of tokens.
        first_word: tokens below this one are marks, the others are words.
        latent_tokens: latent tokens of an image.
        latent_dim: values of each of them.
        std: the standard deviation of the model's images around their mean.
        processor: the name of the model's processor, see `UnifiedModel.processor`.
    """

    vocab_size: int = 5
    first_word: int = 3
    latent_tokens: int = 1
    latent_dim: int = 12
    std: float = 0.25
    processor: str = "toy"


class ToyModel(UnifiedModel[ToyContext]):
    """Two tables. They are zero in a new model: all tokens are equally likely, images are grey.

    Args:
        config: the sizes.

    Attributes:
        words: `[V, V, V]` float32, logits of the next token by last word and last token.
        images: `[V, L, C]` float32, the mean latent by last word.
    """

    config_class = ToyConfig

    def __init__(self, config: ToyConfig = ToyConfig()) -> None:
        super().__init__()
        self.config = config
        size = config.vocab_size
        # Zeros: every token is equally likely, so the entropy at the start is known.
        self.words = nn.Parameter(torch.zeros(size, size, size))
        self.images = nn.Parameter(torch.zeros(size, config.latent_tokens, config.latent_dim))

    @property
    def vocab_size(self) -> int:
        """See `UnifiedModel`."""
        return self.config.vocab_size

    @property
    def latent_shape(self) -> tuple[int, int]:
        """See `UnifiedModel`."""
        return self.config.latent_tokens, self.config.latent_dim

    def parameters_by_expert(self) -> dict[str, list[nn.Parameter]]:
        """See `UnifiedModel`."""
        return {"text": [self.words], "image": [self.images]}

    def empty_context(self, batch_size: int) -> ToyContext:
        """See `UnifiedModel`."""
        # Token 0 is a mark, so it never counts as a word.
        nothing = torch.zeros(batch_size, dtype=torch.int64, device=self.words.device)
        return ToyContext(nothing, nothing)

    def append_text(
        self, context: ToyContext, ids: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, ToyContext]:
        """See `UnifiedModel`."""
        if mask is None:
            mask = torch.ones_like(ids, dtype=torch.bool)
        # The state after the tokens so far, each [N]; the lists keep it after every token.
        word = context.word
        last = context.last
        words = []
        lasts = []
        for column in range(ids.shape[1]):
            # [N]
            token = ids[:, column]
            counts = mask[:, column]
            # A mark changes `last` alone; padding changes neither.
            word = torch.where(counts & (token >= self.config.first_word), token, word)
            last = torch.where(counts, token, last)
            words.append(word)
            lasts.append(last)
        # [N, T, V]
        logits = self.words[torch.stack(words, 1), torch.stack(lasts, 1)]
        return logits, ToyContext(word, last)

    def predict_velocity(self, context: ToyContext, x: Tensor, t: Tensor) -> Tensor:
        """See `UnifiedModel`."""
        # The mean of each row, [N, L, C], by its last word.
        return gaussian_velocity(x, t, self.images[context.word], self.config.std)

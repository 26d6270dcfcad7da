"""A model that reads images as a reward: can it tell the prompt from the image?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from agents.models.base import UnifiedModel
from agents.models.pixels import scale_pixels
from agents.models.registry import load_model
from agents.policy.tokens import chosen_log_probs
from rewards.base import EpisodeBatch, Failures, Scores
from rewards.scorer import LazyReward
from unigrpo_env.processor import Processor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""The precisions of a model by name."""

TRIAL = "a red square"
"""The words that `Readback.prepare` reads from two images."""


class NoWordsError(ValueError):
    """A prompt has no words that could be read."""

    kind = "no words"


@dataclass(frozen=True)
class Reader:
    """The heavy parts of the reward.

    Attributes:
        model: in evaluation mode; its weights need no gradient.
        processor: of the model.
        before: the tokens that stand before the image.
        between: the tokens from the image to the first word, at least one.
    """

    model: UnifiedModel[Any]
    processor: Processor
    before: list[int]
    between: list[int]


@dataclass(kw_only=True, eq=False)
class Readback(LazyReward):
    """The mean log-probability of the prompt's words after the image, under a frozen model.

        R = 1/T sum_i log p(w_i | image, w_1 ... w_(i-1))

    This is SpectraReward (arXiv 2607.11886), in nats a token and at most 0. One forward reads the
    image, what opens an answer, and the T tokens of the prompt; marks around them do not count.
    The words that the policy wrote are not read, nor are sources: only the last image is. A prompt
    without words has no score. No gradient reaches the image.

    The reading model is loaded beside the policy and never changes. Give it the weights that
    training begins with, and the policy is rewarded for images that it could read at the start.

    Args:
        model: a registered name or a folder, as `agents.models.registry.load_model` takes it. It
            must read images, in the size of those that are scored.
        model_options: what the model takes beside it, such as `height` and `width`.
        question: words of the user that come with the image; the prompt is the answer to them.
        latents: also read latents where the model has an encoder of pixels.
        device: such as "cuda:1"; "auto" is the first GPU, or the CPU without one.
        dtype: of its weights, "float32" or "bfloat16"; the model's own if left out.
        batch: how many images are read at once.

    Raises:
        ValueError: an option is out of range.
    """

    model: str = "tiny"
    model_options: Mapping[str, Any] | None = None
    question: str = ""
    latents: bool = True
    device: str = "auto"
    dtype: str | None = None
    batch: int = 16

    def __post_init__(self) -> None:
        """Check the options."""
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(
                f"expected the dtype of reward 'readback' to be one of {', '.join(DTYPES)}, "
                f"got {self.dtype!r}"
            )
        if self.batch < 1:
            raise ValueError(
                f"expected the batch of reward 'readback' to be at least 1, got {self.batch}"
            )

    def load(self) -> Reader:
        """Load the model.

        Raises:
            ValueError: there is no such model, or it reads no images.
        """
        device = self.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = None if self.dtype is None else DTYPES[self.dtype]
        model = load_model(self.model, device=device, dtype=dtype, **(self.model_options or {}))
        processor = model.processor
        if not model.reads_images or processor.image_id is None:
            raise ValueError(
                f"expected a model that reads images for reward 'readback', got {self.model!r} "
                f"({type(model).__name__}), which reads none; {_REMEDY}"
            )
        # The prompt is an answer, so what opens an answer stands before its words.
        opening = processor.encode_prompt(self.question, sources=1, thinks=True)
        place = opening.index(processor.image_id)
        between = opening[place + 1 :]
        if not between:
            raise ValueError(
                f"expected encode_prompt of {type(processor).__name__} to write a token after the "
                "image, before a thought, got none; an image alone predicts no word"
            )
        model.eval().requires_grad_(False)
        return Reader(model, processor, opening[:place], between)

    def prepare(self) -> None:
        """Load the model, and read a few words from two images.

        Raises:
            ValueError: see `load`; or a score is not finite, or the same for both images.
        """
        reader = self.loaded
        height, width = reader.processor.image_size
        black = torch.zeros(1, 3, height, width)
        ramp = torch.linspace(0, 1, 3 * height * width).view_as(black)
        # One by one, so that rounding cannot make a difference.
        words = [self.words(TRIAL)]
        scores = torch.cat([self.read(image, words) for image in (black, ramp)])
        if not scores.isfinite().all():
            raise ValueError(
                f"reward 'readback' scored two images {scores.tolist()}; expected finite numbers. "
                f"Are the weights of {self.model!r} whole?"
            )
        # A painter may take images that the model which writes never sees.
        if scores[0] == scores[1]:
            raise ValueError(
                f"expected a model whose words depend on the image for reward 'readback', but "
                f"{self.model!r} gave {scores[0]:g} with each of two images; {_REMEDY}"
            )

    def __call__(self, episodes: EpisodeBatch) -> Scores:
        """Score a batch of episodes.

        Args:
            episodes: what to score; `prompts` and `images` are used.
        """
        words = [self.words(prompt) for prompt in episodes.prompts]
        rows = [row for row, tokens in enumerate(words) if tokens]
        reward = torch.full((len(episodes),), torch.nan)
        for start in range(0, len(rows), self.batch):
            part = rows[start : start + self.batch]
            reward[part] = self.read(episodes.images[part], [words[row] for row in part])
        error = NoWordsError("expected a prompt with words to read from its image, got none")
        return Scores(reward, {}, Failures.of([error] * (len(episodes) - len(rows))))

    def words(self, prompt: str) -> list[int]:
        """The tokens of a prompt's words; none if it is blank."""
        if not prompt.strip():
            return []
        return self.loaded.processor.encode_text(prompt)

    @torch.no_grad()
    def read(self, images: Tensor, words: list[list[int]]) -> Tensor:
        """The mean log-probability of words after an image.

        Args:
            images: `[N, 3, height, width]` in [0, 1].
            words: N lists of tokens, none empty.

        Returns:
            `[N]` float32, on the CPU.
        """
        reader = self.loaded
        model = reader.model
        device = model.device
        latent, pixels = self._view(reader, images)
        context = model.empty_context(len(words))
        if reader.before:
            before = torch.tensor([reader.before] * len(words), device=device)
            _, context = model.append_hidden(context, before)
        context = model.append_image(context, latent, pixels)
        # [N, T] and [N]
        ids = pad_sequence([torch.tensor(reader.between + each) for each in words], True)
        lengths = torch.tensor([len(each) for each in words])
        first = len(reader.between)
        is_word = torch.arange(ids.shape[1] - first) < lengths[:, None]
        ids = ids.to(device)
        # Padding stands behind the words, so no state that counts depends on it.
        hidden, _ = model.append_hidden(context, ids)

        row, number = is_word.to(device).nonzero(as_tuple=True)
        place = first + number
        # The state before a word predicts it.
        log_prob, _ = chosen_log_probs(
            model.compute_logits,
            hidden[row, place - 1],
            ids[row, place],
            torch.ones(model.vocab_size, dtype=torch.bool, device=device),
            temperature=1.0,
        )
        each = torch.zeros(is_word.shape, device=device)
        each[row, number] = log_prob
        return each.sum(1).cpu() / lengths

    def _view(self, reader: Reader, images: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Images as `UnifiedModel.append_image` takes them."""
        processor = reader.processor
        try:
            fitted = [processor.fit_source(image) for image in images.float()]
        except ValueError as error:
            error.add_note(
                f"raised by reward 'readback', which reads with {self.model!r}; name another "
                "model with its option 'model', or set the image size in 'model_options'"
            )
            raise
        images = torch.stack(fitted).to(reader.model.device)
        latent = None
        if self.latents or processor.pixel_size is None:
            latent = processor.encode_images(images)
        if processor.pixel_size is None:
            return latent, None
        return latent, scale_pixels(processor.view_images(images))


_REMEDY = (
    "choose one that does, such as BAGEL, or a thinker_painter whose thinker sees images, with the "
    "option 'model'"
)

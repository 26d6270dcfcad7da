"""A backbone that shares nothing with the shapes world, to show what scenarios depend on.

Its tokenizer cuts bytes, not words; its prompts follow a chat template without `<bos>`; its padding
is not token 0; its latents come from a variational auto-encoder in bfloat16; its flow times are no
shifted grid; and it ends an episode by a token of its own. Importing this module registers the
processor and the model `chat` and the reward `brightness`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from torch import Tensor

from agents.models.bagel.model import Bagel, BagelConfig
from agents.models.registry import register_model
from rewards import EpisodeBatch, register_reward
from unigrpo_env.processor import Processor, register_processor
from unigrpo_env.rendering import enlarge
from unigrpo_env.tasks.prompt_file import PromptFile
from unigrpo_env.variants.variant import Variant, make_variant

MARKS = (
    "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|image|>", "<|draw|>", "<|stop|>",
    "<|pad|>", "<|vision_start|>", "<|vision_end|>",
)  # fmt: skip
"""The special tokens: their ids are 0 to 9 in this order."""
SYSTEM, USER, ASSISTANT, END, IMAGE, DRAW, STOP, PAD, VISION_START, VISION_END = range(len(MARKS))

SENTENCES = (
    "paint the sky over the sea",
    "make the image brighter",
    "make the image darker than before",
    "now draw a house beside the lake",
)
"""What the tokenizer is trained on."""

VOCAB_SIZE = 320
"""Entries of the model; the tokenizer has fewer, so the last ones are never sampled."""
SIDE = 16
"""Side of an image, in pixels."""


@cache
def chat_tokenizer() -> Tokenizer:
    """A byte-level BPE, trained on the spot."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=VOCAB_SIZE - 20,
        special_tokens=list(MARKS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer


@cache
def chat_vae() -> AutoencoderKL:
    """A random auto-encoder: 16 x 16 pixels to 8 values at each of 4 x 4 places, in bfloat16."""
    # A processor may be made at any time, so it must not move the global random state.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(8, 8, 8),
            layers_per_block=1,
            latent_channels=8,
            norm_num_groups=4,
        )
    return vae.to(torch.bfloat16).eval().requires_grad_(False)


@register_processor("chat")
class ChatProcessor(Processor):
    """The template `<|user|> words <|end|> <|assistant|> thought <|draw|>`.

    The system's turn stands first, sources stand inside the user's turn. After an image the
    assistant's turn is closed and a new one begins.
    """

    vocab_size = VOCAB_SIZE
    pad_id = PAD
    open_image_id = DRAW
    image_id = IMAGE
    end_id = STOP
    latent_shape = (16, 8)
    image_size = (SIDE, SIDE)
    batch_size = 4

    def __init__(self) -> None:
        self.tokenizer = chat_tokenizer()
        self.vae = chat_vae()

    def encode_text(self, text: str) -> list[int]:
        """See `Processor`."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode_text(self, ids: Sequence[int]) -> str:
        """See `Processor`. Bytes that are no text become a replacement character."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def encode_prompt(
        self, text: str, *, sources: int = 0, system: str = "", thinks: bool = True
    ) -> list[int]:
        """The system's turn, the user's turn with the sources, and the assistant's opening."""
        ids = []
        if system:
            ids += [SYSTEM, *self.encode_text(system), END]
        ids += [USER, *[IMAGE] * sources, *self.encode_text(text), END]
        return [*ids, *self._open_turn(thinks)]

    def encode_turn(self, text: str, *, thinks: bool = True) -> list[int]:
        """Close the assistant's turn, lay out the user's, and open the assistant's again."""
        return [END, USER, *self.encode_text(text), END, *self._open_turn(thinks)]

    def continuation_ids(self, thinks: bool = True) -> tuple[int, ...]:
        """Close the assistant's turn and open the next one."""
        return (END, *self._open_turn(thinks))

    def _open_turn(self, thinks: bool) -> tuple[int, ...]:
        if thinks:
            return (ASSISTANT,)
        return (ASSISTANT, DRAW)

    def forbidden_ids(self, reads_images: bool = False) -> tuple[int, ...]:
        """All marks but the two that the model may choose, and the unused entries."""
        marks = set(range(len(MARKS))) - {DRAW, STOP}
        return (*sorted(marks), *range(self.tokenizer.get_vocab_size(), VOCAB_SIZE))

    def control_ids(self) -> frozenset[int]:
        """All marks."""
        return frozenset(range(len(MARKS)))

    def describe_token(self, token: int) -> str:
        """The token in letters."""
        return self.tokenizer.id_to_token(token)

    def time_grid(self, steps: int, shift: float | None = None) -> tuple[float, ...]:
        """Squares of an even grid, which no shift gives; `shift` makes no difference."""
        return tuple((1 - number / steps) ** 2 for number in range(steps + 1))

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """See `Processor`; some images at a time."""
        parts = []
        for batch in images.split(self.batch_size):
            pixels = (batch * 2 - 1).to(self.vae.dtype)
            means = self.vae.encode(pixels).latent_dist.mean
            # [n, 8, 4, 4] -> [n, 16, 8]
            parts.append(means.float().flatten(2).transpose(1, 2))
        return torch.cat(parts)

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """See `Processor`; some latents at a time."""
        parts = []
        for batch in latents.split(self.batch_size):
            # [n, 16, 8] -> [n, 8, 4, 4]
            samples = batch.transpose(1, 2).unflatten(2, (4, 4)).to(self.vae.dtype)
            pixels = self.vae.decode(samples).sample
            parts.append((pixels.float() * 0.5 + 0.5).clamp(0, 1))
        return torch.cat(parts)


CHAT_CONFIG = BagelConfig(
    vocab_size=VOCAB_SIZE,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    rope_theta=1e3,
    z_channels=8,
    latent_patch_size=1,
    latent_height=4,
    latent_width=4,
    max_latent_size=4,
    image_start_id=VISION_START,
    image_end_id=VISION_END,
    processor="chat",
)


@register_model("chat")
def chat_model() -> Bagel:
    """A small random model for `ChatProcessor`; its velocity head is not zero."""
    model = Bagel(CHAT_CONFIG).initialise(0, std=0.15)
    with torch.no_grad():
        model.llm2vae.weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    return model


@register_reward("brightness")
def brightness(episodes: EpisodeBatch) -> Tensor:
    """How bright the last image is, from 0 to 1."""
    return episodes.images.mean((1, 2, 3))


def write_prompts(folder: Path, sources: int = 0, turns: Sequence[str] = ()) -> Path:
    """A prompt file of four lines, each with its own source images beside the file.

    Args:
        folder: where to write.
        sources: images that come with each prompt.
        turns: what the user says after each image.
    """
    generator = torch.Generator().manual_seed(0)
    lines = []
    for row, sentence in enumerate(SENTENCES):
        names = []
        for number in range(sources):
            names.append(f"source_{row}_{number}.png")
            image = torch.rand(3, SIDE, SIDE, generator=generator)
            enlarge(image, SIDE).save(folder / names[-1])
        lines.append(json.dumps({"prompt": sentence, "sources": names, "turns": list(turns)}))
    path = folder / "prompts.jsonl"
    path.write_text("\n".join(lines))
    return path


@dataclass(frozen=True)
class Case:
    """A scenario as this backbone plays it.

    Attributes:
        variant: its registered name.
        sources: images that come with each prompt.
        turns: what the user says after each image.
        reward: of a finished episode.
        settings: of the scenario, beyond `SMALL`.
    """

    variant: str
    sources: int = 0
    turns: tuple[str, ...] = ()
    reward: str = "brightness"
    settings: dict[str, Any] = field(default_factory=dict)

    def make(self, folder: Path) -> Variant:
        """The variant, with a prompt file in `folder`."""
        return make_variant(
            self.variant,
            processor=ChatProcessor(),
            task=PromptFile(write_prompts(folder, self.sources, self.turns)),
            reward=self.reward,
            **(SMALL | self.settings),
        )


SMALL = {"prompt_budget": 48, "text_budget": 6, "image_steps": 7}
"""Budgets of all cases."""

CASES = {
    "text_to_image": Case("text_to_image"),
    "edit": Case("edit", sources=1),
    "reflect": Case("reflect"),
    "story": Case("story"),
    "dialogue": Case("dialogue", turns=("make it darker",)),
    "several_sources": Case("edit", sources=2, settings={"source_images": 3}),
    "no_thoughts": Case("story", settings={"text_budget": 0}),
    "system_prompt": Case("text_to_image", settings={"system_prompt": "be brief"}),
    "last_text": Case("edit", sources=1, settings={"text_after_images": True}),
    "last_text_may_end": Case("story", settings={"text_after_images": True, "may_end": True}),
    "text_only": Case("text_to_image", reward="brevity", settings={"image_budget": 0}),
    "text_about_images": Case(
        "edit", sources=1, reward="brevity", settings={"image_budget": 0, "may_end": True}
    ),
}
"""The five scenarios, and what else a scenario may ask for."""

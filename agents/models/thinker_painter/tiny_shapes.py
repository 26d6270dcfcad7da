"""A thinker-painter of under a million parameters for the shapes world, with random weights.

The classes are those of real models: Qwen3 thinks and is the text encoder of Sana's pipeline, so
that an image teaches the thinker too. Squares of pixels stand in place of latents.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from diffusers import (
    ConfigMixin,
    DPMSolverMultistepScheduler,
    ModelMixin,
    SanaPipeline,
    SanaTransformer2DModel,
)
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, EncoderOutput
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Qwen3Config, Qwen3Model

from agents.models.thinker_painter.config import INSIDE, ThinkerPainterConfig
from agents.models.thinker_painter.loading import build
from agents.models.thinker_painter.model import ThinkerPainter
from unigrpo_env.tasks.shapes.vocabulary import shapes_tokenizer

SIDE = 24
"""Height and width of the images of the shapes world, in pixels."""
SQUARE = 4
"""Side of the square of pixels that is one latent token."""
CHAT_TEMPLATE = (
    "{% for message in messages %}<bos> {{ message['content'] }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}<bos> {% endif %}"
)
"""Each message is a segment of its own, as in the layout of the shipped BAGEL."""
BUDGETS = {"prompt_budget": 16, "text_budget": 19, "turn_budget": 16, "image_steps": 10}
"""Those of the shapes world; four objects and the token that ends a thought are 18."""
TOLD_TOKENS = 1 + BUDGETS["text_budget"]
"""Tokens that the painter reads: `<bos>` and a thought."""
SANA_CALL = {
    # Its instruction to the text encoder is in words that this world has not.
    "complex_human_instruction": None,
    "max_sequence_length": TOLD_TOKENS,
    "use_resolution_binning": False,
}
"""Arguments of the pipeline's call."""


class PixelAutoencoder(ModelMixin, ConfigMixin):
    """Squares of pixels as latents, and back: nothing is learned.

    Args:
        square: side of a latent's square, in pixels, a power of two.
        scaling_factor: see `AutoencoderDC`, whose place it takes.
        encoder_block_out_channels: likewise; its length says how far images are scaled down.
    """

    @register_to_config
    def __init__(
        self,
        square: int = SQUARE,
        scaling_factor: float = 1.0,
        encoder_block_out_channels: tuple[int, ...] = (3, 12, 48),
    ) -> None:
        super().__init__()
        self.square = square
        # Pipelines ask a part's weights for device and dtype.
        self.empty = nn.Parameter(torch.zeros(1), requires_grad=False)

    def encode(self, x: Tensor, return_dict: bool = True) -> Any:
        """Images `[N, 3, H, W]` to latents `[N, 3 square^2, H / square, W / square]`.

        Args:
            x: the images.
            return_dict: as diffusers means it.
        """
        latent = nn.functional.pixel_unshuffle(x, self.square)
        return EncoderOutput(latent=latent) if return_dict else (latent,)

    def decode(self, z: Tensor, return_dict: bool = True) -> Any:
        """The way back.

        Args:
            z: the latents.
            return_dict: as diffusers means it.
        """
        sample = nn.functional.pixel_shuffle(z, self.square)
        return DecoderOutput(sample=sample) if return_dict else (sample,)


class SmallSanaPipeline(SanaPipeline):
    """Sana's pipeline for images whose sides are no multiples of 32 pixels.

    It reads the states before the last layer, as the pipelines of Z-Image and Lumina 2 do: those
    after it say which word comes next, more than which words were read.
    """

    def _get_gemma_prompt_embeds(
        self, prompt: Any, *args: Any, max_sequence_length: int = 300, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        parts: Any = self
        found = parts.tokenizer(
            prompt,
            padding="max_length",
            max_length=max_sequence_length,
            truncation=True,
            return_tensors="pt",
        ).to(parts.text_encoder.device)
        mask = found["attention_mask"]
        output = parts.text_encoder(found["input_ids"], mask, output_hidden_states=True)
        return parts.text_encoder.norm(output.hidden_states[-2]), mask

    def check_inputs(self, *args: Any, **kwargs: Any) -> None:
        """Refuse nothing.

        Args:
            *args: see `SanaPipeline.check_inputs`.
            **kwargs: likewise.
        """


def make_tokenizer() -> PreTrainedTokenizerBase:
    """The words of the shapes world, with a chat template; `<bos>` opens what the painter reads."""
    tokenizer = copy.deepcopy(shapes_tokenizer())
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_painter(seed: int = 0) -> SmallSanaPipeline:
    """A pipeline with random weights, whose text encoder is a Qwen3 with tied embeddings.

    Args:
        seed: of the weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = Qwen3Model(
            Qwen3Config(
                vocab_size=64,
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=3,
                # The first layer sees three words: colour, shape and place of an object.
                layer_types=["sliding_attention", "full_attention", "full_attention"],
                use_sliding_window=True,
                sliding_window=3,
                num_attention_heads=4,
                num_key_value_heads=4,
                head_dim=16,
                # Thoughts are short: words side by side should look far apart.
                rope_parameters={"rope_type": "default", "rope_theta": 100.0},
                max_position_embeddings=512,
                tie_word_embeddings=True,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
            )
        )
        transformer = _make_transformer(encoder.config.hidden_size)
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return SmallSanaPipeline(make_tokenizer(), encoder, PixelAutoencoder(), transformer, scheduler)


def _make_transformer(caption_channels: int) -> Any:
    """Sana's network, which begins with a velocity that is about the latent itself."""
    channels = 3 * SQUARE**2
    heads = 6
    width = 16 * heads
    transformer: Any = SanaTransformer2DModel(
        in_channels=channels,
        out_channels=channels,
        num_layers=3,
        num_attention_heads=heads,
        attention_head_dim=16,
        num_cross_attention_heads=heads,
        cross_attention_head_dim=16,
        cross_attention_dim=width,
        caption_channels=caption_channels,
        mlp_ratio=1.5,
        sample_size=SIDE // SQUARE,
        patch_size=1,
        interpolation_scale=1.0,
    )
    with torch.no_grad():
        # Near noise the velocity is the latent. The latents stand in directions of their own, so
        # that the places of the tokens stay readable beside them.
        places = transformer.patch_embed.pos_embed[0]
        basis = torch.linalg.svd(places).Vh.flip(0)[:channels]
        transformer.patch_embed.proj.weight.copy_(2 * basis.T[:, :, None, None])
        transformer.patch_embed.proj.bias.zero_()
        transformer.proj_out.weight.copy_(basis)
        transformer.proj_out.bias.zero_()
    return transformer


def make_tiny_painter() -> ThinkerPainter:
    """The thinker-painter, untrained; `unigrpo pretrain --model tiny_painter` trains it."""
    config = ThinkerPainterConfig(
        INSIDE,
        "shapes",
        SIDE,
        SIDE,
        tells="answer",
        system="",
        call=SANA_CALL,
        budgets=BUDGETS,
    )
    return build(config)

"""A thinker-painter of about a million parameters for the shapes world, with random weights.

The classes are those of real models: a Qwen3 thinks, and the transformer of FLUX.2-klein paints.
Squares of pixels stand in place of latents.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from diffusers import (
    ConfigMixin,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    ModelMixin,
)
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, EncoderOutput
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM

from agents.models.thinker_painter.config import ThinkerPainterConfig
from agents.models.thinker_painter.loading import build
from agents.models.thinker_painter.model import ThinkerPainter
from unigrpo_env.tasks.shapes.vocabulary import shapes_tokenizer

NAME = "shapes"
"""Of the thinker and of the painter."""
SIDE = 24
"""Height and width of the images of the shapes world, in pixels."""
SQUARE = 2
"""Side of the square of pixels that is a latent; klein packs 2 x 2 latents into a token."""
HEAD = 16
"""Width of an attention head, of all parts."""
CHAT_TEMPLATE = (
    "{% for message in messages %}<bos> {{ message['content'] }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}<bos> {% endif %}"
)
"""Each message is a segment of its own, as in the layout of the shipped BAGEL."""
BUDGETS = {"prompt_budget": 16, "text_budget": 19, "turn_budget": 16, "image_steps": 10}
"""Those of the shapes world; four objects and the token that ends a thought are 18."""
KLEIN_CALL = {"max_sequence_length": BUDGETS["text_budget"] + 3, "text_encoder_out_layers": (1,)}
"""Arguments of the pipeline's call: it reads a thought and the three marks of the template."""


class PixelAutoencoder(ModelMixin, ConfigMixin):
    """Squares of pixels as latents, and back: nothing is learned.

    Args:
        square: side of a latent's square, in pixels, a power of two.
        block_out_channels: see `AutoencoderKLFlux2`, whose place it takes; its length says how far
            images are scaled down.
        latent_channels: likewise.
        batch_norm_eps: likewise; 0, so that packed latents are not scaled.
    """

    @register_to_config
    def __init__(
        self,
        square: int = SQUARE,
        block_out_channels: tuple[int, ...] = (3, 12),
        latent_channels: int = 3 * SQUARE**2,
        batch_norm_eps: float = 0.0,
    ) -> None:
        super().__init__()
        self.square = square
        # Its mean of 0 and variance of 1 leave packed latents as they are.
        self.bn = nn.BatchNorm2d(4 * latent_channels, eps=batch_norm_eps, affine=False)
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


def make_tokenizer() -> PreTrainedTokenizerBase:
    """The words of the shapes world, with a chat template."""
    tokenizer = copy.deepcopy(shapes_tokenizer())
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_thinker(seed: int = 0) -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerBase]:
    """A language model with random weights, and its tokenizer.

    Args:
        seed: of the weights.
    """
    return _qwen3(seed, width=96, layers=3, mlp=2), make_tokenizer()


def make_painter(seed: int = 0) -> Flux2KleinPipeline:
    """A pipeline with random weights.

    Args:
        seed: of the weights.
    """
    encoder = _make_encoder(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = Flux2Transformer2DModel(
            in_channels=4 * 3 * SQUARE**2,
            num_layers=1,
            num_single_layers=4,
            attention_head_dim=HEAD,
            num_attention_heads=6,
            joint_attention_dim=encoder.config.hidden_size,
            timestep_guidance_channels=32,
            guidance_embeds=False,
            # Height, width and place in the text; nothing here has a time of its own.
            axes_dims_rope=(0, 6, 6, 4),
            # Six tokens a side: neighbours should look far apart.
            rope_theta=100,
        )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return Flux2KleinPipeline(scheduler, PixelAutoencoder(), encoder, make_tokenizer(), transformer)


def make_tiny_painter() -> ThinkerPainter:
    """The thinker-painter, untrained; `unigrpo pretrain --model tiny_painter` trains it."""
    config = ThinkerPainterConfig(
        NAME, NAME, SIDE, SIDE, tells="answer", system="", call=KLEIN_CALL, budgets=BUDGETS
    )
    return build(config)


def _make_encoder(seed: int) -> Qwen3ForCausalLM:
    """A text encoder that never learns, like those of the real pipelines.

    No language taught it anything, so its attention is made even: the state of a word is a random
    picture of the word itself and of its window of three, which for a place holds the colour and
    the shape that stand there.
    """
    encoder = _qwen3(seed, width=64, layers=1, mlp=1, window=3)
    weights: Any = encoder.model
    layer = weights.layers[0]
    with torch.no_grad():
        # As random numbers of variance 1, which the embeddings of a trained encoder are likewise.
        weights.embed_tokens.weight.mul_(encoder.config.hidden_size**0.5)
        layer.self_attn.q_norm.weight.zero_()
        # A mean of three has a third of the variance.
        layer.self_attn.o_proj.weight.mul_(3**0.5)
        layer.mlp.down_proj.weight.zero_()
    return encoder


def _qwen3(
    seed: int, *, width: int, layers: int, mlp: int, window: int | None = None
) -> Qwen3ForCausalLM:
    kind = "full_attention"
    deviation = 0.02
    if window is not None:
        kind = "sliding_attention"
        # A matrix of such numbers keeps the variance of what it is given.
        deviation = width**-0.5
    config = Qwen3Config(
        vocab_size=64,
        hidden_size=width,
        intermediate_size=mlp * width,
        num_hidden_layers=layers,
        layer_types=[kind] * layers,
        use_sliding_window=window is not None,
        sliding_window=window,
        num_attention_heads=width // HEAD,
        num_key_value_heads=width // HEAD,
        head_dim=HEAD,
        # Thoughts are short: words side by side should look far apart.
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=deviation,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config)

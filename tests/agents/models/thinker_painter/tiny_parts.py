"""Parts of the pipelines in `tiny`: tokenizers, text encoders and auto-encoders."""

from __future__ import annotations

from functools import cache
from typing import Any

import diffusers
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from torch import nn

PAD, BOS, EOS = "<|endoftext|>", "<bos>", "<eos>"
IMAGE_MARKS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
SPECIAL = (PAD, "<|im_start|>", "<|im_end|>", BOS, EOS, *IMAGE_MARKS)
"""The first ids, in this order."""
THINK = ("<think>", "</think>")
"""Tokens of their own too, but not special: they are a part of the text."""
SENTENCES = (
    "user assistant system two red circles and a blue square left of a green cross",
    "You help to paint images. Think about what the user asks for, then answer.",
    "Describe the image by detailing the color, shape, size, texture, quantity of the objects.",
)
"""What the tokenizer is trained on."""
VOCABULARY = 448
"""Entries of every text encoder; the tokenizer has fewer."""
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)
HIDDEN = 32
"""Width of every text encoder."""
SIZES = {
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@cache
def _bytes_tokenizer() -> Tokenizer:
    """A tokenizer of bytes and their most frequent pairs: it can write any text."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=VOCABULARY - 24,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.add_tokens([AddedToken(word, special=False) for word in THINK])
    return tokenizer


def chat_tokenizer() -> Any:
    """The tokenizer of a chat model, with the template of Qwen."""
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=_bytes_tokenizer(),
        pad_token=PAD,
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>", BOS, EOS, *IMAGE_MARKS],
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
    )


def plain_tokenizer(length: int = 77, padding_side: str = "right") -> Any:
    """The same vocabulary with a token before and after each text, as CLIP, T5 and Gemma have."""
    # A copy, because the other one writes no marks.
    tokenizer = Tokenizer.from_str(_bytes_tokenizer().to_str())
    marks = [(mark, tokenizer.token_to_id(mark)) for mark in (BOS, EOS)]
    tokenizer.post_processor = TemplateProcessing(single=f"{BOS} $A {EOS}", special_tokens=marks)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=length,
        padding_side=padding_side,
    )


def count_tokens(text: str) -> int:
    """Tokens of a text, in any of the tokenizers."""
    return len(_bytes_tokenizer().encode(text, add_special_tokens=False).ids)


def marks_of_images() -> dict[str, int]:
    """Their ids by the names that configs have for them."""
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    return dict(zip(names, map(SPECIAL.index, IMAGE_MARKS), strict=True))


def scheduler(**config: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(**config)


def clip(*, projects: bool) -> nn.Module:
    config = transformers.CLIPTextConfig(
        hidden_size=HIDDEN,
        intermediate_size=48,
        projection_dim=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=VOCABULARY,
        pad_token_id=0,
        bos_token_id=SPECIAL.index(BOS),
        eos_token_id=SPECIAL.index(EOS),
    )
    if projects:
        return transformers.CLIPTextModelWithProjection(config)
    return transformers.CLIPTextModel(config)


T5_SIZES = {"d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": VOCABULARY}


def t5(width: int = HIDDEN) -> nn.Module:
    return transformers.T5EncoderModel(transformers.T5Config(d_model=width, **T5_SIZES))


def umt5() -> nn.Module:
    return transformers.UMT5EncoderModel(transformers.UMT5Config(d_model=HIDDEN, **T5_SIZES))


def qwen3(kind: Any = transformers.Qwen3ForCausalLM) -> Any:
    """A Qwen3, which can write if `kind` has a head."""
    ends = {"pad_token_id": 0, "eos_token_id": SPECIAL.index("<|im_end|>")}
    config = transformers.Qwen3Config(
        **SIZES, **ends, head_dim=8, vocab_size=VOCABULARY, tie_word_embeddings=True
    )
    return kind(config)


def gemma2() -> nn.Module:
    config = transformers.Gemma2Config(
        **SIZES, head_dim=8, vocab_size=VOCABULARY, pad_token_id=0, sliding_window=256
    )
    return transformers.Gemma2Model(config)


def glm() -> nn.Module:
    config = transformers.GlmConfig(**SIZES, head_dim=8, vocab_size=VOCABULARY, pad_token_id=0)
    return transformers.GlmModel(config)


VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2}


def qwen25_vl() -> nn.Module:
    rope = {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"}
    text = {**SIZES, "vocab_size": VOCABULARY, "rope_scaling": rope, "pad_token_id": 0}
    config = transformers.Qwen2_5_VLConfig(
        text_config=text,
        vision_config={**VISION, "out_hidden_size": HIDDEN},
        **marks_of_images(),
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


class _Processor(transformers.Qwen2_5_VLProcessor):
    """One that can be made without torchvision, which processors of videos need."""

    def check_argument_for_proper_class(self, *_: Any) -> None:
        pass


def qwen_processor() -> Any:
    """It shows images to `qwen25_vl`, in few patches."""
    images = transformers.Qwen2VLImageProcessorPil(min_pixels=28**2, max_pixels=56**2)
    return _Processor(images, chat_tokenizer(), chat_template=CHAT_TEMPLATE)


def qwen3_vl() -> nn.Module:
    text = {**SIZES, "head_dim": 8, "vocab_size": VOCABULARY, "pad_token_id": 0}
    config = transformers.Qwen3VLConfig(
        text_config=text,
        vision_config={**VISION, "out_hidden_size": HIDDEN},
        **marks_of_images(),
    )
    return transformers.Qwen3VLModel(config)


def vae(levels: int = 2) -> nn.Module:
    """Latents of 4 values, `2 ** (levels - 1)` times smaller than the image."""
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=(8,) * levels,
        norm_num_groups=2,
        latent_channels=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.5,
        shift_factor=0.06,
    )


def flux2_vae() -> Any:
    """Its latents are normalised by the numbers of a batch norm."""
    found = diffusers.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=2,
        latent_channels=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    found.bn.running_mean.normal_(0, 0.2)
    found.bn.running_var.uniform_(0.5, 2)
    return found


def qwen_vae() -> nn.Module:
    """An auto-encoder of videos; each channel has a mean and a standard deviation."""
    return diffusers.AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.0, 0.3],
        latents_std=[1.2, 0.8, 1.0, 1.5],
    )


def deep_compression_vae() -> nn.Module:
    blocks = ("ResBlock", "EfficientViTBlock")
    scales: tuple[tuple[int, ...], ...] = ((), (5,))
    return diffusers.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=scales,
        decoder_qkv_multiscales=scales,
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        scaling_factor=0.4,
    )

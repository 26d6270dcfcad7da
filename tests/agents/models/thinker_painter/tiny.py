"""Pipelines of many families with random weights and one vocabulary, and models made of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import tiny_parts as parts
import torch
import transformers
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit
from tiny_parts import HIDDEN, chat_tokenizer, plain_tokenizer, qwen3, scheduler
from torch import nn

from agents.models.thinker_painter.model import ThinkerPainter
from agents.models.thinker_painter.painter import Painter

Made = tuple[Any, dict[str, Any]]
"""A pipeline, and arguments of its call, but for those of guidance."""
HEADS = {"attention_head_dim": 8, "num_attention_heads": 4}
PACKED_HEADS = {"attention_head_dim": 16, "num_attention_heads": 2, "axes_dims_rope": (4, 4, 8)}
SIZE = {"height": 16, "width": 24}
"""Not square, so that the two cannot be confused."""
CALL = {**SIZE, "max_sequence_length": 48}
FAMILIES: dict[str, Callable[[], Made]] = {}
"""Functions by name."""
INSIDE = ("zimage", "klein", "qwen")
"""Families whose text encoder can write: it is the thinker."""


def family(function: Callable[[], Made]) -> Callable[[], Made]:
    """Add a function to `FAMILIES`; its weights are the same whenever it is called."""

    def make() -> Made:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            pipeline, call = function()
        pipeline.set_progress_bar_config(disable=True)
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                part.eval()
        return pipeline, dict(call)

    FAMILIES[function.__name__] = make
    return make


def make_model(name: str, **options: Any) -> ThinkerPainter:
    """A model of a family.

    Its thinker is the text encoder in the families of `INSIDE`, else a Qwen3 of its own.

    Args:
        name: one of `FAMILIES`.
        **options: of `ThinkerPainter`.
    """
    pipeline, call = FAMILIES[name]()
    thinker = pipeline.text_encoder if name in INSIDE else make_thinker()
    return ThinkerPainter(thinker, Painter(pipeline, **call), chat_tokenizer(), **options)


def make_thinker() -> Any:
    """A Qwen3 that can write."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return qwen3().eval()


@family
def sd3() -> Made:
    transformer = diffusers.SD3Transformer2DModel(
        **HEADS,
        sample_size=12,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        caption_projection_dim=32,
        # The two CLIPs side by side.
        joint_attention_dim=2 * HIDDEN,
        pooled_projection_dim=2 * HIDDEN,
        pos_embed_max_size=12,
    )
    pipeline = diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=scheduler(shift=3.0),
        vae=parts.vae(),
        text_encoder=parts.clip(projects=True),
        tokenizer=plain_tokenizer(),
        text_encoder_2=parts.clip(projects=True),
        tokenizer_2=plain_tokenizer(),
        text_encoder_3=parts.t5(2 * HIDDEN),
        tokenizer_3=plain_tokenizer(),
    )
    return pipeline, CALL


def _flux_parts() -> dict[str, Any]:
    transformer = diffusers.FluxTransformer2DModel(
        **PACKED_HEADS,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        joint_attention_dim=HIDDEN,
        pooled_projection_dim=HIDDEN,
        guidance_embeds=True,
    )
    return {
        "transformer": transformer,
        "scheduler": scheduler(shift=3.0, use_dynamic_shifting=True),
        "vae": parts.vae(),
        "text_encoder": parts.clip(projects=False),
        "tokenizer": plain_tokenizer(),
        "text_encoder_2": parts.t5(),
        "tokenizer_2": plain_tokenizer(),
    }


@family
def flux() -> Made:
    return diffusers.FluxPipeline(**_flux_parts()), CALL


@family
def chroma() -> Made:
    transformer = diffusers.ChromaTransformer2DModel(
        **PACKED_HEADS,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        joint_attention_dim=HIDDEN,
        approximator_hidden_dim=32,
        approximator_layers=1,
        approximator_num_channels=16,
    )
    pipeline = diffusers.ChromaPipeline(
        transformer=transformer,
        scheduler=scheduler(),
        vae=parts.vae(),
        text_encoder=parts.t5(),
        tokenizer=plain_tokenizer(),
    )
    return pipeline, CALL


@family
def klein() -> Made:
    transformer = diffusers.Flux2Transformer2DModel(
        attention_head_dim=16,
        num_attention_heads=2,
        axes_dims_rope=(4, 4, 4, 4),
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        # Two layers of the text encoder side by side.
        joint_attention_dim=2 * HIDDEN,
        timestep_guidance_channels=32,
        guidance_embeds=False,
    )
    pipeline = diffusers.Flux2KleinPipeline(
        transformer=transformer,
        scheduler=scheduler(use_dynamic_shifting=True),
        vae=parts.flux2_vae(),
        text_encoder=qwen3(),
        tokenizer=chat_tokenizer(),
    )
    # Sources must have 64 pixels a side.
    return pipeline, {**CALL, "height": 64, "width": 96, "text_encoder_out_layers": (1, 2)}


def _qwen_parts() -> dict[str, Any]:
    transformer = diffusers.QwenImageTransformer2DModel(
        **PACKED_HEADS,
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        joint_attention_dim=HIDDEN,
    )
    return {
        "transformer": transformer,
        "scheduler": scheduler(use_dynamic_shifting=True, shift_terminal=0.02),
        "vae": parts.qwen_vae(),
        "text_encoder": parts.qwen25_vl(),
        "tokenizer": chat_tokenizer(),
    }


def _set_template(pipeline: Any, text: str) -> None:
    """Count the tokens before the prompt with the tokenizer that is used here."""
    pipeline.prompt_template_encode_start_idx = parts.count_tokens(text.split("{}")[0])


@family
def qwen() -> Made:
    pipeline = diffusers.QwenImagePipeline(**_qwen_parts())
    _set_template(pipeline, pipeline.prompt_template_encode)
    return pipeline, CALL


@family
def zimage() -> Made:
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=HIDDEN,
        rope_theta=256.0,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    with torch.no_grad():
        # They are empty memory until weights are loaded.
        transformer.x_pad_token.fill_(1)
        transformer.cap_pad_token.fill_(1)
    pipeline = diffusers.ZImagePipeline(
        transformer=transformer,
        scheduler=scheduler(shift=3.0),
        vae=parts.vae(),
        text_encoder=qwen3(),
        tokenizer=chat_tokenizer(),
    )
    return pipeline, CALL


@family
def sana() -> Made:
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=HIDDEN,
        sample_size=16,
    )
    solver = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    pipeline = diffusers.SanaPipeline(
        transformer=transformer,
        scheduler=solver,
        vae=parts.deep_compression_vae(),
        text_encoder=parts.gemma2(),
        tokenizer=plain_tokenizer(),
    )
    size = {"height": 32, "width": 64, "use_resolution_binning": False}
    return pipeline, {**CALL, **size, "complex_human_instruction": None}


@family
def lumina2() -> Made:
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=32,
        num_layers=2,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(8, 4, 4),
        axes_lens=(300, 64, 64),
        cap_feat_dim=HIDDEN,
    )
    pipeline = diffusers.Lumina2Pipeline(
        transformer=transformer,
        scheduler=scheduler(shift=6.0),
        # The pipeline takes it for granted that latents are 8 times smaller.
        vae=parts.vae(levels=4),
        text_encoder=parts.gemma2(),
        tokenizer=plain_tokenizer(length=128),
    )
    return pipeline, {**CALL, "height": 64, "width": 96, "max_sequence_length": 128}


@family
def auraflow() -> Made:
    transformer = diffusers.AuraFlowTransformer2DModel(
        **HEADS,
        sample_size=12,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        caption_projection_dim=32,
        joint_attention_dim=HIDDEN,
        pos_embed_max_size=256,
    )
    pipeline = diffusers.AuraFlowPipeline(
        transformer=transformer,
        scheduler=scheduler(shift=1.73),
        vae=parts.vae(),
        text_encoder=parts.umt5(),
        tokenizer=plain_tokenizer(),
    )
    return pipeline, CALL


@family
def ovis() -> Made:
    transformer = diffusers.OvisImageTransformer2DModel(
        **PACKED_HEADS,
        in_channels=16,
        out_channels=16,
        num_layers=1,
        num_single_layers=1,
        joint_attention_dim=HIDDEN,
    )
    pipeline = diffusers.OvisImagePipeline(
        transformer=transformer,
        scheduler=scheduler(),
        vae=parts.vae(),
        text_encoder=qwen3(transformers.Qwen3Model),
        tokenizer=chat_tokenizer(),
    )
    before = chat_tokenizer().apply_chat_template(
        [{"role": "user", "content": f"{pipeline.system_prompt}{{}}"}], tokenize=False
    )
    pipeline.user_prompt_begin_id = parts.count_tokens(before.split("{}")[0])
    return pipeline, CALL


@family
def krea2() -> Made:
    transformer = diffusers.Krea2Transformer2DModel(
        **HEADS,
        in_channels=16,
        num_layers=2,
        num_key_value_heads=2,
        intermediate_size=32,
        timestep_embed_dim=8,
        text_hidden_dim=HIDDEN,
        num_text_layers=2,
        text_num_attention_heads=2,
        text_num_key_value_heads=1,
        text_intermediate_size=16,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 2, 2),
    )
    pipeline = diffusers.Krea2Pipeline(
        transformer=transformer,
        scheduler=scheduler(use_dynamic_shifting=True),
        vae=parts.qwen_vae(),
        text_encoder=parts.qwen3_vl(),
        tokenizer=chat_tokenizer(),
        text_encoder_select_layers=(0, 1),
    )
    _set_template(pipeline, pipeline.prompt_template_encode_prefix)
    return pipeline, CALL


@family
def cogview4() -> Made:
    transformer = diffusers.CogView4Transformer2DModel(
        **HEADS,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        text_embed_dim=HIDDEN,
        time_embed_dim=8,
        condition_dim=4,
    )
    pipeline = diffusers.CogView4Pipeline(
        transformer=transformer,
        scheduler=scheduler(use_dynamic_shifting=True, time_shift_type="linear"),
        vae=parts.vae(),
        text_encoder=parts.glm(),
        tokenizer=plain_tokenizer(padding_side="left"),
    )
    return pipeline, {**CALL, "height": 32, "width": 48}


@family
def kontext() -> Made:
    pipeline = diffusers.FluxKontextPipeline(**_flux_parts())
    return pipeline, {**CALL, "max_area": 16 * 24, "_auto_resize": False}


dimensions = pipeline_qwenimage_edit.calculate_dimensions


@family
def qwen_edit() -> Made:
    # The pipeline enlarges every source to a million pixels, which takes minutes here.
    pipeline_qwenimage_edit.calculate_dimensions = lambda _, ratio: dimensions(64**2, ratio)
    pipeline = diffusers.QwenImageEditPipeline(**_qwen_parts(), processor=parts.qwen_processor())
    _set_template(pipeline, pipeline.prompt_template_encode)
    return pipeline, CALL

"""A pipeline that cannot be used is refused at once, in a sentence that says why."""

import diffusers
import pytest
import tiny_parts as parts
import torch
from tiny import FAMILIES

from agents.models.thinker_painter.painter import Painter

GUIDANCE = {
    "zimage": {"guidance_scale": 4.0},
    "sd3": {"guidance_scale": 4.5},
    "qwen": {"true_cfg_scale": 4.0, "negative_prompt": " "},
    "sana": {"guidance_scale": 4.5},
    "klein": {"guidance_scale": 4.0},
    "flux": {"true_cfg_scale": 4.0, "negative_prompt": " "},
}
"""Arguments that switch guidance on."""


@pytest.fixture
def sd3():
    return FAMILIES["sd3"]()


@pytest.fixture
def zimage():
    return FAMILIES["zimage"]()


@pytest.mark.parametrize("name", GUIDANCE)
def test_guidance_that_stays_on_is_refused(name):
    pipeline, call = FAMILIES[name]()
    with pytest.raises(ValueError, match="guidance is on; switch it off") as raised:
        Painter(pipeline, **call, **GUIDANCE[name])
    message = str(raised.value)
    assert type(pipeline).__name__ in message
    for argument in GUIDANCE[name]:
        assert argument in message


def test_guidance_is_off_without_a_word(zimage, sd3):
    """Each family counts from another value."""
    assert Painter(zimage[0], **zimage[1]).call["guidance_scale"] == 0
    assert Painter(sd3[0], **sd3[1]).call["guidance_scale"] == 1
    pipeline, call = FAMILIES["qwen"]()
    assert Painter(pipeline, **call).call["true_cfg_scale"] == 1


def test_distilled_guidance_is_left_on():
    """It is an input of the transformer, so it is no second call."""
    pipeline, call = FAMILIES["flux"]()
    painter = Painter(pipeline, **call)
    assert "guidance_scale" not in painter.call
    other = Painter(pipeline, **call, guidance_scale=8.0)
    assert other.call["guidance_scale"] == 8
    x = torch.randn(1, *painter.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        conditions = painter.encode(["two red circles"])
        found = [p.predict_velocity(conditions, x, torch.tensor([0.5])) for p in (painter, other)]
    assert not torch.allclose(*found)


def pixart(**changes):
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=8,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=16,
        caption_channels=32,
        norm_type="ada_norm_single",
    )
    members = {
        "transformer": transformer,
        "scheduler": diffusers.DDIMScheduler(),
        "vae": parts.vae(),
        "text_encoder": parts.t5(),
        "tokenizer": parts.plain_tokenizer(),
    }
    return diffusers.PixArtAlphaPipeline(**members | changes)


def stable_diffusion():
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        norm_num_groups=2,
    )
    return diffusers.StableDiffusionPipeline(
        unet=unet,
        scheduler=diffusers.DDIMScheduler(),
        vae=parts.vae(),
        text_encoder=parts.clip(projects=False),
        tokenizer=parts.plain_tokenizer(),
        safety_checker=None,
        feature_extractor=None,
    )


def test_a_model_of_noise_is_refused():
    with pytest.raises(ValueError, match="DDIMScheduler, whose model predicts noise"):
        Painter(pixart())


def test_a_solver_that_follows_no_flow_is_refused():
    solver = diffusers.DPMSolverMultistepScheduler()
    with pytest.raises(ValueError, match="DPMSolverMultistepScheduler, whose model predicts noise"):
        Painter(pixart(scheduler=solver))


def test_a_unet_is_refused():
    match = r"one transformer, got StableDiffusionPipeline with \['unet'\]"
    with pytest.raises(ValueError, match=match):
        Painter(stable_diffusion())


def video_vae():
    return diffusers.AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )


def test_two_transformers_are_refused():
    """Wan 2.2 takes one for much noise and another for little."""
    transformers = [
        diffusers.WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=32,
            freq_dim=16,
            ffn_dim=16,
            num_layers=1,
        )
        for _ in range(2)
    ]
    pipeline = diffusers.WanPipeline(
        transformer=transformers[0],
        transformer_2=transformers[1],
        scheduler=parts.scheduler(),
        vae=video_vae(),
        text_encoder=parts.umt5(),
        tokenizer=parts.plain_tokenizer(),
    )
    match = r"WanPipeline with \['transformer', 'transformer_2'\]"
    with pytest.raises(ValueError, match=match):
        Painter(pipeline)


def test_what_makes_videos_is_refused():
    """It has one transformer and a flow, but gives more than an image."""
    transformer = diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=32,
        freq_dim=16,
        ffn_dim=16,
        num_layers=1,
    )
    pipeline = diffusers.WanPipeline(
        transformer=transformer,
        scheduler=parts.scheduler(),
        vae=video_vae(),
        text_encoder=parts.umt5(),
        tokenizer=parts.plain_tokenizer(),
    )
    with pytest.raises(ValueError, match="expected a pipeline of images, got WanPipeline"):
        Painter(pipeline, height=16, width=16, num_frames=1, max_sequence_length=16)


@pytest.mark.parametrize("member", ["encode_prompt", "prepare_latents"])
def test_a_missing_member_is_named(sd3, member, monkeypatch):
    monkeypatch.delattr(diffusers.StableDiffusion3Pipeline, member)
    with pytest.raises(ValueError, match=f"StableDiffusion3Pipeline without {member}"):
        Painter(sd3[0], **sd3[1])


def test_a_missing_auto_encoder_is_named(sd3):
    sd3[0].register_modules(vae=None)
    with pytest.raises(ValueError, match="without a vae"):
        Painter(sd3[0], **sd3[1])


def test_a_size_that_is_refused_is_said_in_the_pipelines_words(sd3):
    pipeline, call = sd3
    with pytest.raises(ValueError, match=r"cannot be asked .*'height': 17.*divisible by 4"):
        Painter(pipeline, **{**call, "height": 17})


def test_a_size_that_is_rounded_is_refused():
    """FLUX warns and takes another one."""
    pipeline, call = FAMILIES["flux"]()
    with pytest.raises(ValueError, match="got 18 x 24, of which it makes 16 x 24"):
        Painter(pipeline, **{**call, "height": 18})


def test_sources_of_a_size_that_the_pipeline_refuses_are_not_offered():
    """FLUX.2-klein takes none below 64 pixels, and says so only when it draws."""
    pipeline, call = FAMILIES["klein"]()
    assert Painter(pipeline, **call).edits
    assert not Painter(pipeline, **{**call, "height": 32}).edits


def test_a_size_that_is_binned_is_refused():
    """Sana takes the nearest of those that it was trained with."""
    pipeline, call = FAMILIES["sana"]()
    pipeline.image_processor.classify_height_width_bin = lambda *_, **__: (32, 32)
    with pytest.raises(ValueError, match="got 32 x 64, of which it makes 32 x 32"):
        Painter(pipeline, **{**call, "use_resolution_binning": True})


def test_the_pipelines_own_size_is_taken(sd3):
    pipeline, call = sd3
    painter = Painter(pipeline, max_sequence_length=call["max_sequence_length"])
    assert painter.image_size == (24, 24)
    assert painter.latent_shape == (144, 4)


def test_an_argument_that_the_pipeline_does_not_know_is_refused(sd3):
    pipeline, call = sd3
    with pytest.raises(ValueError, match=r"cannot be asked .*unexpected keyword argument 'colour'"):
        Painter(pipeline, **call, colour="red")


def test_a_text_encoder_that_fails_is_not_taken_for_guidance(sd3, monkeypatch):
    pipeline, call = sd3

    def fail(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(pipeline.text_encoder, "forward", fail)
    with pytest.raises(ValueError, match="out of memory"):
        Painter(pipeline, **call)


def test_rows_of_one_time_are_noticed():
    """AuraFlow's transformer takes one time for all its rows, most take one for each."""
    pipeline, call = FAMILIES["auraflow"]()
    painter = Painter(pipeline, **call)
    count = []
    handle = painter.transformer.register_forward_pre_hook(lambda *_: count.append(1))
    x = torch.zeros(4, *painter.latent_shape)
    with torch.no_grad():
        conditions = painter.encode(["a"] * 4)
        painter.predict_velocity(conditions, x, torch.tensor([0.2, 0.7, 0.2, 0.7]))
        assert len(count) == 2
        painter.predict_velocity(conditions, x, torch.full((4,), 0.3))
    handle.remove()
    assert len(count) == 3

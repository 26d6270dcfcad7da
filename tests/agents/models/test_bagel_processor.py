"""Text and images of the released layout, against the reference implementation."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from agents.models.bagel.config import BagelConfig
from agents.models.bagel.processor import (
    VAE_TRANSFORM,
    VIT_TRANSFORM,
    BagelProcessor,
    keyed_posterior_noise,
)
from agents.models.bagel.resize import Resize
from agents.models.bagel.vision import VisionConfig
from unigrpo_env.env import InterleavedGenEnv
from unigrpo_env.tasks.task import Prompt
from unigrpo_env.testing import random_episode
from unigrpo_env.variants.variant import Scenario, make_variant

DATA = Path(__file__).parents[2] / "data"
FOLDER = DATA / "bagel_release"
ORACLE = json.loads((DATA / "bagel_release_oracle.json").read_text())
CASES = ORACLE["cases"]
VISION = VisionConfig(
    hidden_size=24, num_attention_heads=2, image_size=224, patch_size=14, max_patches=16
)
TOLERANCE = {"atol": 1e-4, "rtol": 0}
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "vocab.json", "merges.txt")


@pytest.fixture(scope="module")
def tensors():
    return load_file(DATA / "bagel_release_oracle.safetensors")


def make(height=64, width=96, folder=FOLDER, vocab_size=576, vision=VISION, **settings):
    config = BagelConfig(vocab_size=vocab_size, max_latent_size=16, vision=vision)
    return BagelProcessor.from_release(folder, config.with_image_size(height, width), **settings)


@pytest.fixture(scope="module")
def processor():
    return make()


class Ask:
    """A task that asks for the same every time."""

    def __init__(self, text, **parts):
        self.prompt = Prompt(text, **parts)

    def prompts(self, split, count, seed):
        return [self.prompt] * count


def nothing(batch):
    """A reward that pays nothing."""
    return torch.zeros(len(batch))


@pytest.fixture
def folder(tmp_path):
    """A copy without the model's weights, to be damaged."""
    for name in (*TOKENIZER_FILES, "ae.safetensors", "config.json"):
        shutil.copy(FOLDER / name, tmp_path)
    return tmp_path


def image(pixels):
    """uint8 `[height, width, 3]` as the env has it."""
    return pixels.permute(2, 0, 1).float() / 255


def text_ids(case, name):
    return [
        token
        for segment in CASES[case]["context"]
        if segment["name"] == name
        for token in segment["ids"]
    ]


def test_tokens(processor):
    ids = ORACLE["special_ids"]
    assert processor.bos_id == ids["bos_token_id"]
    assert processor.open_image_id == ids["eos_token_id"]
    assert processor.describe_token(processor.image_id) == "<|image_pad|>"
    assert len(processor.tokenizer) == ORACLE["tokenizer_length"]
    # An env may pad with a token that can be sampled in no phase.
    assert len({processor.pad_id, processor.end_id, processor.open_image_id}) == 3


@pytest.mark.parametrize(
    ("thinks", "draws", "expected"),
    [
        (True, True, ORACLE["system_prompts"]["generation"]),
        (True, False, ORACLE["system_prompts"]["understanding"]),
        (False, True, ""),
        (False, False, ""),
    ],
)
def test_system_prompt(processor, thinks, draws, expected):
    assert processor.system_prompt(thinks=thinks, draws=draws) == expected


@pytest.mark.parametrize("case", CASES)
def test_prompt(processor, case):
    arguments = CASES[case]["arguments"]
    sources = int("image" in arguments)
    draws = "understanding_output" not in arguments
    system = processor.system_prompt(thinks=arguments["think"], draws=draws)
    found = processor.encode_prompt(
        arguments["text"], sources=sources, system=system, thinks=arguments["think"]
    )
    expected = text_ids(case, "system")
    assert processor.system_length(system) == len(expected)
    expected += [processor.image_id] * sources + text_ids(case, "prompt")
    if arguments["think"]:
        expected += CASES[case]["generated_ids"][:1]
    assert found == expected
    assert processor.opening_length(arguments["think"]) == int(arguments["think"])


@pytest.mark.parametrize("case", [name for name in CASES if "generated_ids" in CASES[name]])
def test_thought(processor, case):
    words = CASES[case]["generated_text"]
    assert processor.decode_text(CASES[case]["generated_ids"]) == words
    assert processor.decode_text([*CASES[case]["generated_ids"], processor.open_image_id]) == words
    assert processor.encode_text(words) == CASES[case]["text_encoded_again"]


def test_turn(processor):
    words = CASES["edit_think"]["arguments"]["text"]
    segment = text_ids("edit_think", "prompt")
    assert processor.encode_turn(words) == [*segment, processor.bos_id]
    assert processor.encode_turn(words, thinks=False) == segment


def test_forbidden_ids(processor):
    """The added tokens that are special, and the rows of the model that no text has."""
    forbidden = set(processor.forbidden_ids())
    assert forbidden == set(range(512, 526)) - {514} | set(range(534, 576))
    may_end = Scenario(may_end=True).rules(processor)
    assert may_end.end_id == processor.end_id
    assert set(may_end.forbidden_ids) == forbidden - {processor.end_id}


@pytest.mark.parametrize("mark", ["<|im_end|>", "<|vision_start|>", "<|image_pad|>"])
def test_typed_marks_are_refused(processor, mark):
    task = Ask(f"a {mark} circle")
    env = InterleavedGenEnv("text_to_image", processor=processor, task=task, reward=nothing)
    with pytest.raises(ValueError, match="the control token"):
        env.reset(seed=0)


@pytest.mark.parametrize("scenario", ["text_to_image", "edit", "reflect", "story", "dialogue"])
def test_every_scenario_can_be_played(processor, tensors, scenario):
    parts = {}
    if scenario == "edit":
        parts["sources"] = (image(tensors["in.source"]),)
    if scenario == "dialogue":
        parts["turns"] = ("make the circle green",)
    env = InterleavedGenEnv(
        scenario,
        processor=processor,
        task=Ask("a red circle", **parts),
        reward=nothing,
        text_budget=5,
        image_steps=1,
    )
    episode = random_episode(env, seed=0)
    assert episode.info["image"].shape == (3, 64, 96)
    assert episode.observations[-1]["images_drawn"] >= 1


def test_budgets_are_the_release_s(processor):
    variant = make_variant("text_to_image", processor=processor, task=Ask("a"), reward=nothing)
    assert variant.rules.text_budget == 1023
    assert variant.rules.image_steps == 49
    # Shift 3: t = 3 s / (1 + 2 s) of s = 48 / 49.
    assert variant.rules.times[1] == pytest.approx(144 / 145)


def test_source(processor, tensors):
    fitted = processor.fit_source(image(tensors["in.source"]))
    assert torch.equal(fitted, image(tensors["mid.source_sized"]))
    assert torch.equal(processor.fit_source(fitted), fitted)
    seen = processor.view_images(fitted[None])
    assert seen.dtype == torch.uint8
    assert torch.equal(seen[0], tensors["mid.vit_sized"].permute(2, 0, 1))
    assert processor.pixel_size == (70, 98)


def test_every_byte_is_seen_as_itself():
    """Divided by 255, or multiplied by its reciprocal, as some devices do."""
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    vision = dataclasses.replace(VISION, patch_size=16)
    plain = make(16, 16, vision=vision, vit_transform=Resize(16, 16, 16))
    for images in (levels.float() / 255, levels.float() * (1 / 255)):
        assert torch.equal(plain.view_images(images), levels)
        assert torch.equal(plain.fit_source(images[0]), levels[0].float() / 255)


def test_images_between_two_bytes_are_cut_off(processor):
    between = torch.full((2, 3, 64, 96), 100.9 / 255)
    assert (processor.view_images(between) == 100).all()
    assert processor.view_images(between[:0]).shape == (0, 3, 70, 98)


def test_source_latent(processor, tensors):
    other = make()
    noise = tensors["in.edit.vae_noise"]
    seen = []

    def recorded_noise(pixels):
        seen.append(pixels)
        return noise

    other.posterior_noise = recorded_noise
    source = image(tensors["mid.source_sized"])[None]
    found = other.encode_images(source)
    torch.testing.assert_close(found[0], tensors["mid.source_latent"], **TOLERANCE)
    assert torch.equal(seen[0], tensors["mid.source_sized"])
    other.posterior = "mean"
    mean = other.encode_images(source)
    other.posterior = "sample"
    other.posterior_noise = lambda pixels: 0 * noise
    assert torch.equal(other.encode_images(source), mean)
    assert (found - mean).abs().max() > 0.01


def test_an_image_is_the_key_of_its_noise(processor, tensors):
    source = image(tensors["mid.source_sized"])
    both = torch.stack([source, source.flip(2)])
    found = processor.encode_images(both)
    torch.testing.assert_close(found[:1], processor.encode_images(both[:1]), **TOLERANCE)
    noise = [keyed_posterior_noise(tensors["mid.source_sized"], 16, 8) for _ in range(2)]
    assert torch.equal(*noise)
    assert noise[0].shape == (16, 8, 12)
    other = keyed_posterior_noise(tensors["mid.source_sized"].flip(1), 16, 8)
    assert (other - noise[0]).abs().mean() > 0.5


def test_drawn_image(processor, tensors):
    upright = processor.resized(96, 64)
    found = upright.decode_latents(tensors["out.think.latent"][None])[0]
    expected = (tensors["out.think.decoded"] / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(found, expected, **TOLERANCE)
    bytes_apart = (found * 255).byte().permute(1, 2, 0).int() - tensors["out.think.image"].int()
    assert bytes_apart.abs().max() <= 1
    assert (bytes_apart != 0).float().mean() < 0.001


def test_autoencoder_in_low_precision(tensors):
    latents = tensors["out.edit_think.latent"][None, :1]
    found = make(16, 16, dtype=torch.bfloat16).decode_latents(latents)
    assert found.dtype == torch.float32
    apart = (found - make(16, 16).decode_latents(latents)).abs()
    assert 0 < apart.max() < 0.2


@pytest.mark.gpu
def test_autoencoder_follows_to_the_accelerator(tensors):
    processor = make()
    latents = tensors["out.edit_think.latent"][None]
    expected = processor.decode_latents(latents)
    found = processor.decode_latents(latents.cuda())
    assert found.is_cuda
    torch.testing.assert_close(found.cpu(), expected, atol=1e-2, rtol=0)
    # A source on the CPU is encoded where the auto-encoder is now, and its latent comes back.
    assert not processor.encode_images(expected).is_cuda


def test_decoding_carries_a_gradient(processor, tensors):
    latents = tensors["out.edit_think.latent"][None].requires_grad_()
    processor.decode_latents(latents).mean().backward()
    assert latents.grad.abs().max() > 0


def test_resized_shares_the_parts(processor):
    upright = processor.resized(96, 64)
    assert upright.tokenizer is processor.tokenizer
    assert upright.autoencoder is processor.autoencoder
    assert (upright.image_size, upright.latent_shape) == ((96, 64), (24, 64))
    assert upright.pixel_size == (98, 70)
    assert processor.image_size == (64, 96)


def test_without_a_vision_encoder():
    config = BagelConfig(vocab_size=576).with_image_size(1024, 768)
    processor = BagelProcessor.from_release(FOLDER, config)
    assert processor.pixel_size is None
    assert processor.latent_shape == (64 * 48, 64)


@pytest.mark.parametrize(
    ("transform", "size", "expected"),
    [
        (VAE_TRANSFORM, (1000, 2000), (512, 1024)),
        (VAE_TRANSFORM, (70, 100), (512, 736)),
        # 512 x 3840 has too many pixels, 464 x 3520 is too long, and 135 is nearer to 128.
        (VAE_TRANSFORM, (100, 750), (128, 1024)),
        # The shorter side is 52.5 strides; half is rounded to the even number.
        (VIT_TRANSFORM, (1024, 768), (980, 728)),
        (VIT_TRANSFORM, (512, 736), (518, 742)),
        (VIT_TRANSFORM, (1024, 64), (980, 56)),
    ],
)
def test_sizes_of_the_release(transform, size, expected):
    assert transform.size(*size) == expected
    assert transform.size(*size[::-1]) == expected[::-1]


def test_transforms_end_where_positions_end(processor):
    assert processor.vae_transform == Resize(256, 64, 16)
    assert processor.vit_transform == Resize(224, 56, 14)
    assert VAE_TRANSFORM.bounded(2000) == VAE_TRANSFORM
    assert processor.source_size(70, 100) == (64, 96)


def test_source_of_another_shape(processor):
    with pytest.raises(
        ValueError, match=r"64 x 96 .* got one of 200 x 100, which becomes 192 x 96"
    ):
        processor.fit_source(torch.zeros(3, 200, 100))


@pytest.mark.parametrize("size", [(64, 90), (0, 64), (64, 272)])
def test_size_without_positions(processor, size):
    with pytest.raises(ValueError, match=f"multiples of 16 up to 256 pixels, got {size[0]} x"):
        processor.resized(*size)


def test_transform_without_positions():
    with pytest.raises(ValueError, match="multiples of 14 up to 224 pixels, got 490 x 728"):
        make(vit_transform=Resize(980, 490, 14))


def test_vocabulary_is_too_small():
    with pytest.raises(ValueError, match="at most 530 tokens, as many as the model has, got 534"):
        make(vocab_size=530)


@pytest.mark.parametrize("files", [("tokenizer.json",), ("vocab.json", "merges.txt")])
def test_either_form_of_the_tokenizer(folder, files):
    for name in files:
        (folder / name).unlink()
    text = CASES["think"]["arguments"]["text"]
    assert make(folder=folder).encode_segment(text) == text_ids("think", "prompt")


@pytest.mark.parametrize(
    "files", [("tokenizer_config.json",), ("tokenizer.json", "merges.txt"), TOKENIZER_FILES]
)
def test_tokenizer_files_are_missing(folder, files):
    for name in files:
        (folder / name).unlink()
    with pytest.raises(ValueError, match="found not all of it; copy the release's files"):
        make(folder=folder)


def test_tokenizer_is_cut_off(folder):
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text[: len(text) // 2])
    with pytest.raises(ValueError, match="cannot be read"):
        make(folder=folder)


def test_tokenizer_lacks_a_mark(folder):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (folder / name).read_text()
        (folder / name).write_text(text.replace("<|vision_start|>", "<|other|>"))
    with pytest.raises(ValueError, match=r"in .* without <\|vision_start\|>; use the"):
        make(folder=folder)


def test_autoencoder_is_missing(folder):
    (folder / "ae.safetensors").unlink()
    with pytest.raises(ValueError, match=r"file at .*ae\.safetensors, found none"):
        make(folder=folder)


def test_autoencoder_is_cut_off(folder):
    """It is found out at once, although the weights are read later."""
    whole = (folder / "ae.safetensors").read_bytes()
    (folder / "ae.safetensors").write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        make(folder=folder)

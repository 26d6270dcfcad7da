"""Scores of image-text models, against transformers' own path from images of PIL to logits."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional
from transformers import (
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizerFast,
    SiglipImageProcessorPil,
    SiglipModel,
)

from rewards import EpisodeBatch, WeightedReward
from rewards.vision.clip import Clip, HpsV2, PickScore, SigLip
from rewards.vision.model_scorer import ModelScorer

PROMPTS = ["a red circle", "two blue squares", "a red circle", "hello, world", "x", "a red circle"]


def pictures(height, width):
    """One picture for each prompt, and the same as a tensor `[6, 3, height, width]`."""
    random = np.random.default_rng(0)
    images = []
    for blobs in random.integers(0, 256, (len(PROMPTS), 8, 8, 3), dtype=np.uint8):
        images.append(Image.fromarray(blobs).resize((width, height), Image.Resampling.BICUBIC))
    levels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    return images, levels.float() / 255


def episodes(images, prompts=PROMPTS):
    return EpisodeBatch(prompts, [""] * len(prompts), images, [{}] * len(prompts))


@pytest.fixture(scope="module")
def logits(tiny_clip):
    """`logits_per_image` of each picture and its prompt, by transformers alone."""
    processor = CLIPImageProcessorPil.from_pretrained(tiny_clip)
    tokenizer = CLIPTokenizerFast.from_pretrained(tiny_clip)
    model = CLIPModel.from_pretrained(tiny_clip)

    @torch.no_grad()
    def compute(images, prompts=PROMPTS):
        inputs = tokenizer(prompts, padding=True, truncation=True, return_tensors="pt")
        pixels = processor(images=images, return_tensors="pt")["pixel_values"]
        return model(**inputs, pixel_values=pixels).logits_per_image.diagonal()

    return compute


@pytest.fixture(scope="module")
def clip(tiny_clip):
    """The reward with the tiny model, loaded once."""
    return Clip(model=tiny_clip, device="cpu")


@pytest.fixture(scope="module")
def pickscore(tiny_clip):
    return PickScore(model=tiny_clip, processor=None, device="cpu")


@pytest.mark.parametrize(
    ("height", "width", "tolerance"),
    [(32, 32, 1e-7), (64, 64, 2e-4), (48, 80, 2e-4), (512, 512, 2e-4)],
)
def test_the_score_is_that_of_transformers(pickscore, logits, height, width, tolerance):
    images, tensor = pictures(height, width)
    expected = logits(images) / 26
    scores = pickscore(episodes(tensor))["reward"]
    # What differs between pictures is far greater than the tolerance.
    assert expected.std() > 5e-3
    assert scores == pytest.approx(expected, abs=tolerance)


def test_the_number_before_the_division_is_logged(clip, logits):
    images, tensor = pictures(32, 32)
    scores = WeightedReward(clip)(episodes(tensor))
    raw = scores.components["Clip/raw"]
    assert raw == pytest.approx(logits(images), abs=1e-5)
    assert torch.equal(scores.reward, raw / 30)


@pytest.mark.parametrize("batch", [1, 4])
def test_the_batch_changes_nothing(clip, tiny_clip, batch):
    _, tensor = pictures(48, 80)
    expected = clip(episodes(tensor))["reward"]
    scores = Clip(model=tiny_clip, device="cpu", batch=batch)(episodes(tensor))["reward"]
    assert scores == pytest.approx(expected, abs=1e-6)


def test_each_text_is_embedded_once(tiny_clip, monkeypatch):
    _, tensor = pictures(32, 32)
    reward = Clip(model=tiny_clip, device="cpu", batch=2)
    embedded = []
    network = reward.loaded.network
    embed = network.get_text_features

    def counted(input_ids, **others):
        embedded.append(len(input_ids))
        return embed(input_ids=input_ids, **others)

    monkeypatch.setattr(network, "get_text_features", counted)
    first = reward(episodes(tensor))["reward"]
    again = reward(episodes(tensor))["reward"]
    assert embedded == [2, 2]
    assert torch.equal(first, again)


def test_the_gradient_is_that_of_the_score(clip):
    _, tensor = pictures(48, 80)
    images = tensor.clone().requires_grad_()
    scores = WeightedReward(clip)(episodes(images), keep_gradient=True).reward
    scores.sum().backward()
    # Against finite differences along the gradient, unrounded as with a gradient.
    step = 0.02 * functional.normalize(images.grad.flatten(1)).view_as(images)
    sides = []
    for moved in (tensor + step, tensor - step):
        sides.append(clip(episodes(moved.requires_grad_()))["reward"].detach())
    slope = (sides[0] - sides[1]) / 0.04
    assert (slope > 1e-3).all()
    assert slope == pytest.approx(images.grad.flatten(1).norm(dim=1), rel=0.05)


def test_without_a_gradient_none_is_computed(clip):
    _, tensor = pictures(32, 32)
    assert not clip(episodes(tensor))["reward"].requires_grad
    with torch.no_grad():
        assert not clip(episodes(tensor.requires_grad_()))["reward"].requires_grad


def test_a_model_first_used_in_inference_mode_can_give_a_gradient(tiny_clip):
    _, tensor = pictures(32, 32)
    reward = Clip(model=tiny_clip, device="cpu")
    with torch.inference_mode():
        reward(episodes(tensor))
        # Weights that are moved when they are loaded can be used in a gradient too.
        moved = Clip(model=tiny_clip, device="meta").loaded.network
    assert not any(weights.is_inference() for weights in moved.parameters())
    images = tensor.clone().requires_grad_()
    reward(episodes(images))["reward"].sum().backward()
    assert images.grad.abs().sum() > 0


def test_a_long_prompt_is_cut_off_at_77_tokens(clip, logits):
    images, tensor = pictures(32, 32)
    # 75 letters and two marks are 77 tokens.
    long = ["a" * 200, "a" * 75, "a" * 74 + "b" * 9]
    scores = clip(episodes(tensor[[0, 0, 0]], long))["raw"]
    assert scores == pytest.approx(logits(images[:1] * 3, long), abs=1e-5)
    # A letter inside a word is another token than one at its end.
    assert scores[0] != scores[1]
    longer = clip(episodes(tensor[:1], ["a" * 300]))["raw"]
    assert longer[0] == pytest.approx(float(scores[0]), abs=1e-6)


def test_a_pickled_reward_leaves_its_model_behind(pickscore):
    _, tensor = pictures(32, 32)
    expected = pickscore(episodes(tensor))["reward"]
    pickled = pickle.dumps(pickscore)
    assert len(pickled) < 1000
    assert torch.equal(pickle.loads(pickled)(episodes(tensor))["reward"], expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_narrow_network_gives_nearly_the_same_score(clip, tiny_clip, dtype):
    _, tensor = pictures(32, 32)
    expected = clip(episodes(tensor))["raw"]
    reward = Clip(model=tiny_clip, device="cpu", dtype=dtype)
    assert reward.loaded.network.dtype is getattr(torch, dtype)
    scores = reward(episodes(tensor))["raw"]
    assert scores == pytest.approx(expected, abs=0.05)
    # Lengths are made 1 in float32: in bfloat16 they would be off by 1e-3.
    lengths = reward.embed(reward.loaded, tensor).norm(dim=1)
    assert lengths == pytest.approx(torch.ones(6), abs=1e-6)


def test_an_offloaded_network_computes_on_its_device(tiny_clip, monkeypatch):
    _, tensor = pictures(32, 32)
    monkeypatch.setattr(ModelScorer, "target_device", lambda self: torch.device("cpu", 0))
    reward = Clip(model=tiny_clip, offload=True)
    moves = []
    monkeypatch.setattr(reward.loaded.network, "to", lambda device: moves.append(str(device)))
    reward(episodes(tensor))
    assert moves == ["cpu:0", "cpu"]
    # The backward pass is still to come.
    reward(episodes(tensor.requires_grad_()))
    assert moves == ["cpu:0", "cpu", "cpu:0"]


def test_hpsv2_is_the_cosine_of_the_whole_image(tiny_clip, logits):
    images, tensor = pictures(48, 80)
    padded = []
    for image in images:
        square = Image.new("RGB", (32, 32))
        # 48 is to 80 as 19.2 to 32.
        square.paste(image.resize((32, 19), Image.Resampling.BICUBIC), (0, 6))
        padded.append(square)
    reward = HpsV2(model=tiny_clip, processor=None, device="cpu")
    expected = logits(padded) / reward.loaded.network.logit_scale.exp()
    assert reward(episodes(tensor))["reward"] == pytest.approx(expected, abs=5e-4)


def test_siglip_is_its_logit_of_small_letters(tiny_siglip, monkeypatch):
    images, tensor = pictures(48, 80)
    tokenizer = CLIPTokenizerFast.from_pretrained(tiny_siglip)
    ids = tokenizer(PROMPTS, padding="max_length", max_length=64, return_tensors="pt")["input_ids"]
    pixels = SiglipImageProcessorPil.from_pretrained(tiny_siglip)(images, return_tensors="pt")
    with torch.no_grad():
        found = SiglipModel.from_pretrained(tiny_siglip)(input_ids=ids, **pixels)
    reward = SigLip(model=tiny_siglip, device="cpu")
    expected = found.logits_per_image.diagonal()
    assert reward(episodes(tensor))["reward"] == pytest.approx(expected, abs=5e-4)
    # Other tokenizers than this one keep capital letters.
    read = []
    tokenizer = reward.loaded.tokenizer

    def spied(texts, **options):
        read.extend(texts)
        return tokenizer(texts, **options)

    monkeypatch.setattr(reward.loaded, "tokenizer", spied)
    reward(episodes(tensor[:1], ["A LOUD one"]))
    assert read == ["a loud one"]


def test_a_whole_model_is_ready_after_preparing(clip):
    clip.prepare()
    network = clip.loaded.network
    assert not network.training
    assert not any(weights.requires_grad for weights in network.parameters())


def test_a_missing_model_is_known_before_the_first_episode(tmp_path):
    with pytest.raises(OSError, match=r"'clip' cannot load its model from .*option 'model'"):
        Clip(model=str(tmp_path / "nowhere")).prepare()


def test_a_missing_processor_is_named(tiny_clip, tmp_path):
    with pytest.raises(OSError, match=r"'pickscore' cannot load its processor.*'processor'"):
        PickScore(model=tiny_clip, processor=str(tmp_path)).prepare()


def test_a_model_of_another_kind_is_refused(tiny_siglip):
    with pytest.raises(ValueError, match="model of type clip, got one of type siglip"):
        Clip(model=tiny_siglip).prepare()


def test_missing_weights_are_refused(tiny_clip, tmp_path):
    for part in (CLIPTokenizerFast, CLIPImageProcessorPil):
        part.from_pretrained(tiny_clip).save_pretrained(tmp_path)
    model = CLIPModel.from_pretrained(tiny_clip)
    weights = model.state_dict()
    del weights["visual_projection.weight"]
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ValueError, match=r"1 are missing, such as 'visual_projection.weight'"):
        Clip(model=str(tmp_path), device="cpu").prepare()


def test_broken_weights_are_known_before_the_first_episode(tiny_clip):
    reward = Clip(model=tiny_clip, device="cpu")
    torch.nn.init.constant_(reward.loaded.network.visual_projection.weight, torch.nan)
    with pytest.raises(ValueError, match="scored a blank image nan"):
        reward.prepare()


def test_a_broken_image_spoils_no_other(clip):
    _, tensor = pictures(32, 32)
    tensor[1, 0, 3, 3] = torch.nan
    scores = clip(episodes(tensor))["reward"]
    assert scores.isfinite().tolist() == [True, False, True, True, True, True]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dtype": "fp16"}, "one of float32, bfloat16, float16, got 'fp16'"),
        ({"batch": 0}, "at least 1, got 0"),
        ({"divisor": 0}, "other than 0, got 0"),
    ],
)
def test_options_out_of_range_are_refused(options, reason):
    with pytest.raises(ValueError, match=reason):
        Clip(**options)

"""The vision encoder against numbers of the public reference implementation."""

import copy

import pytest
import torch

from agents.models.bagel.config import BagelConfig
from agents.models.bagel.model import Bagel
from agents.models.bagel.vision import VisionConfig

TOLERANCE = {"atol": 1e-4, "rtol": 0}


class BlindProcessor:
    """Decodes the first values of a latent as a small image."""

    pixel_size = None

    def decode_latents(self, latents):
        return latents[:, :3, :48].unflatten(2, (6, 8)).sigmoid()


class StubProcessor(BlindProcessor):
    """Shows each pixel as a square of 2 x 2."""

    pixel_size = (12, 16)

    def view_images(self, images):
        return (images * 255).byte().repeat_interleave(2, 2).repeat_interleave(2, 3)


@pytest.fixture
def with_processor(editing_model):
    model = copy.deepcopy(editing_model)
    model.processor = StubProcessor()
    return model


def test_encoder_and_connector(editing_model, editing_oracle):
    pixels = editing_oracle["in.vit.pixels"][None]
    patches = editing_model.vit_model.patches(pixels)
    torch.testing.assert_close(patches[0], editing_oracle["in.vit.patches"])
    features = editing_model.vit_model(pixels)
    torch.testing.assert_close(features[0], editing_oracle["out.vit.tower"], **TOLERANCE)
    table = editing_model.vit_pos_embed.pos_embed[editing_oracle["in.vit.patch_pos"]]
    embedded = editing_model.connector(features) + table
    torch.testing.assert_close(embedded[0], editing_oracle["out.vit.embeds"], **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize(
    ("segments", "expected"),
    [
        (("system", "src", "vit", "instr"), "out.greedy.ids"),
        (("und.vit", "und.question"), "out.und.greedy.ids"),
    ],
)
def test_text_about_an_image(editing_model, editing_oracle, read_editing, segments, expected):
    ids = editing_oracle[expected]
    _, context = read_editing(*segments)
    found = [ids[0]]
    while len(found) < len(ids):
        logits, context = editing_model.append_text(context, found[-1].view(1, 1))
        found.append(logits[0, -1].argmax())
    assert torch.stack(found).tolist() == ids.tolist()


@torch.no_grad()
def test_latent_is_decoded_for_the_encoder(with_processor):
    """A latent without pixels is read as if what the processor shows had been given too."""
    model = with_processor
    latent = torch.randn(2, 24, 64)
    more = torch.tensor([[1], [2]])
    seen = model.processor.view_images(model.processor.decode_latents(latent))
    # 0 ... 255 becomes -1 ... 1.
    pixels = seen.float() / 127.5 - 1
    assert pixels.min() < -0.5
    assert pixels.max() > 0.5
    given = model.append_image(model.empty_context(2), latent, pixels)
    decoded = model.append_image(model.empty_context(2), latent)
    latents_alone = model.append_latents(model.empty_context(2), latent)
    expected, _ = model.append_text(given, more)
    found, _ = model.append_text(decoded, more)
    without, _ = model.append_text(latents_alone, more)
    assert torch.equal(found, expected)
    assert (found - without).abs().max() > 1e-3


def test_no_gradient_reaches_a_latent_that_is_seen(with_processor):
    latent = torch.randn(1, 24, 64, requires_grad=True)
    assert not with_processor._view_latents(latent).requires_grad


def test_processor_that_shows_no_pixels(editing_model):
    model = copy.deepcopy(editing_model)
    model.processor = BlindProcessor()
    with pytest.raises(ValueError, match=r"with a pixel_size.*got BlindProcessor without"):
        model.append_image(model.empty_context(1), torch.zeros(1, 24, 64))


@torch.no_grad()
def test_pixels_alone(editing_model):
    pixels = torch.rand(2, 3, 24, 28) * 2 - 1
    found = editing_model.append_image(editing_model.empty_context(2), None, pixels)
    expected = editing_model.append_pixels(editing_model.empty_context(2), pixels)
    # Two markers, and 6 x 7 patches.
    assert found.size == expected.size == 44
    assert found.position.tolist() == [1, 1]
    for one, other in zip(found.keys, expected.keys, strict=True):
        assert torch.equal(one[:, :, :44], other[:, :, :44])


def test_append_image_is_latents_then_pixels(with_processor):
    model = with_processor
    latent = torch.randn(2, 24, 64)
    pixels = torch.rand(2, 3, 24, 28) * 2 - 1
    together = model.append_image(model.empty_context(2), latent, pixels)
    context = model.append_latents(model.empty_context(2), latent)
    separate = model.append_pixels(context, pixels)
    for one, other in zip(together.keys, separate.keys, strict=True):
        assert torch.equal(one, other)


def test_pixels_without_gradient(vision_bagel):
    pixels = torch.rand(2, 3, 16, 8) * 2 - 1
    context = vision_bagel.append_pixels(vision_bagel.empty_context(2), pixels, with_grad=False)
    logits, _ = vision_bagel.append_text(context, torch.tensor([[1], [2]]))
    logits.sum().backward()
    assert all(weight.grad is None for weight in vision_bagel.vit_model.parameters())
    assert all(weight.grad is None for weight in vision_bagel.connector.parameters())


def test_vision_parameters_are_the_text_experts(vision_bagel):
    listed = {id(weight) for weight in vision_bagel.parameters_by_expert()["text"]}
    assert all(id(weight) in listed for weight in vision_bagel.vit_model.parameters())
    assert id(vision_bagel.vit_pos_embed.pos_embed) not in listed


@pytest.mark.parametrize("size", [(30, 28), (44, 28)])
def test_pixels_of_a_wrong_size(editing_model, size):
    with pytest.raises(ValueError, match="multiples of 4 up to 40"):
        editing_model.append_image(editing_model.empty_context(1), pixels=torch.zeros(1, 3, *size))


def test_pixels_without_a_vision_encoder(small_bagel):
    pixels = torch.zeros(1, 3, 28, 28)
    context = small_bagel.empty_context(1)
    with pytest.raises(ValueError, match="a vision encoder, because `pixels` were given"):
        small_bagel.append_image(context, torch.zeros(1, 36, 48), pixels)
    with pytest.raises(ValueError, match="leave `pixels` out"):
        small_bagel.append_pixels(context, pixels)


def test_latent_without_a_processor(editing_model):
    with pytest.raises(ValueError, match="brings no processor"):
        editing_model.append_image(editing_model.empty_context(1), torch.zeros(1, 24, 64))


def test_save_and_load_with_vision(editing_model, tmp_path):
    editing_model.save_pretrained(tmp_path)
    loaded = Bagel.from_pretrained(tmp_path)
    assert loaded.config == editing_model.config
    for name, value in editing_model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name])


def test_release_has_its_published_size():
    """The published file: 14,607,260,128 values in 1223 tensors."""
    with torch.device("meta"):
        model = Bagel(BagelConfig(vision=VisionConfig()))
    weights = model.state_dict()
    assert len(weights) == 1223
    assert sum(weight.numel() for weight in weights.values()) == 14_607_260_128

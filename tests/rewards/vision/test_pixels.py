"""Prepared images, against the image processors of transformers and their PIL."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BitImageProcessorPil, CLIPImageProcessorPil, SiglipImageProcessorPil

from rewards.image_bytes import read_image
from rewards.vision.pixels import Preparation, centered

SHAPES = [(32, 32), (24, 40), (48, 80), (81, 33), (200, 200)]


def picture(height, width, seed=0):
    """Colours of 8 x 8 blobs with noise on them."""
    random = np.random.default_rng(seed)
    blobs = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    levels = np.asarray(blobs.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    noisy = levels + random.integers(-40, 40, levels.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def as_tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "processor",
    [
        CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        BitImageProcessorPil(size={"shortest_edge": 36}, crop_size={"height": 28, "width": 28}),
        SiglipImageProcessorPil(size={"height": 32, "width": 32}),
        SiglipImageProcessorPil(size={"height": 32, "width": 32}, resample=2),
    ],
    ids=["clip", "dino", "siglip", "bilinear"],
)
def test_the_preparation_is_that_of_transformers(processor, shape):
    image = picture(*shape)
    expected = processor(images=[image], return_tensors="pt")["pixel_values"]
    prepared = Preparation.of(processor)(as_tensor(image))
    assert prepared.shape == expected.shape
    # A level of a byte is 0.0146 at most. Some few are rounded to the other side.
    difference = (prepared - expected).abs()
    assert difference.max() < 0.0152
    assert difference.mean() < 4e-4


def test_an_image_of_the_right_size_is_only_normalised():
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    image = picture(32, 32)
    expected = processor(images=[image], return_tensors="pt")["pixel_values"]
    assert torch.allclose(Preparation.of(processor)(as_tensor(image)), expected, atol=1e-6)


def preparation(**options):
    return Preparation(**{"resized": None, "cropped": None, "mean": (0,), "std": (1,)} | options)


def test_values_are_rounded_only_where_no_gradient_flows():
    images = torch.full((1, 3, 4, 4), 0.301)
    assert torch.allclose(preparation()(images), torch.tensor(77 / 255), atol=1e-7)
    images.requires_grad_()
    exact = preparation()(images)
    assert torch.equal(exact, images)
    exact.sum().backward()
    assert torch.equal(images.grad, torch.ones_like(images))
    with torch.no_grad():
        assert not torch.equal(preparation()(images), images)


def test_resized_values_stay_in_range_with_a_gradient_too():
    # A sharp edge makes bicubic filters overshoot.
    images = (torch.arange(16) % 8 < 4).float().expand(1, 3, 16, 16).clone().requires_grad_()
    resized = preparation(resized=24)(images)
    assert resized.min() >= 0
    assert resized.max() <= 1


def test_the_whole_image_is_seen_with_black_around_it():
    whole = preparation(resized=8, cropped=(8, 8), is_longer_side=True)
    seen = whole(torch.ones(1, 3, 10, 20))
    expected = torch.zeros(1, 3, 8, 8)
    expected[:, :, 2:6] = 1
    assert torch.equal(seen, expected)
    # An image of the right length is filled up too.
    assert torch.equal(whole(torch.ones(1, 3, 4, 8)), expected)


def test_the_greater_half_of_an_odd_rest_is_at_the_end():
    row = torch.arange(1.0, 6).expand(1, 5)
    assert centered(row, 1, 2).tolist() == [[2, 3]]
    assert centered(row, 1, 8).tolist() == [[0, 1, 2, 3, 4, 5, 0, 0]]
    assert centered(row.T, 2, 1).tolist() == [[2], [3]]


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"resample": 1}, "resample=1"), ({"size": {"longest_edge": 32}}, "longest_edge")],
)
def test_an_unknown_preparation_is_refused(options, reason):
    with pytest.raises(ValueError, match=reason):
        Preparation.of(CLIPImageProcessorPil(**options))


def test_a_processor_may_neither_resize_nor_crop():
    processor = CLIPImageProcessorPil(do_resize=False, do_center_crop=False)
    assert Preparation.of(processor)(torch.zeros(1, 3, 5, 7)).shape == (1, 3, 5, 7)


def test_a_file_is_read_as_colours(tmp_path):
    Image.new("L", (3, 2), 51).save(tmp_path / "grey.png")
    assert torch.equal(read_image(tmp_path / "grey.png"), torch.full((3, 2, 3), 0.2))

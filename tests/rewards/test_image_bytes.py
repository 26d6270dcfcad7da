"""Images as bytes."""

import pytest
import torch

from rewards.image_bytes import image_bytes


def test_levels_are_rounded_and_cut_off():
    image = torch.tensor([-0.5, 0.0, 0.4 / 255, 0.6 / 255, 1.0, 7.0]).expand(3, 2, 6)
    pixels = image_bytes(image)
    assert pixels.shape == (2, 6, 3)
    assert pixels[0, :, 0].tolist() == [0, 0, 0, 1, 255, 255]


def test_red_comes_first():
    image = torch.zeros(3, 1, 1)
    image[0] = 1
    assert image_bytes(image).tolist() == [[[255, 0, 0]]]


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_numbers_that_are_not_finite_are_refused(wrong):
    image = torch.zeros(3, 2, 2)
    image[1, 0, 1] = wrong
    with pytest.raises(ValueError, match="got 1 that are NaN or inf"):
        image_bytes(image)


@pytest.mark.parametrize("shape", [(3, 0, 4), (1, 4, 4), (4, 4), (1, 3, 4, 4)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="with at least one pixel"):
        image_bytes(torch.zeros(shape))

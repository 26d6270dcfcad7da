"""The size of an image as JPEG."""

import numpy as np
import pytest
import torch
from PIL import Image

from rewards import EpisodeBatch
from rewards.factory import make_reward
from rewards.jpeg import Jpeg


def batch(images):
    count = len(images)
    return EpisodeBatch(["a"] * count, [""] * count, images, [{}] * count)


def noise(size=32):
    return torch.rand(3, size, size, generator=torch.Generator().manual_seed(0))


def test_the_reward_is_the_size_of_the_file_in_1000_bytes(tmp_path):
    file = tmp_path / "image.jpg"
    pixels = (noise() * 255).round().byte().permute(1, 2, 0)
    Image.fromarray(np.asarray(pixels)).save(file, quality=95)
    scores = Jpeg()(batch(noise()[None]))
    assert scores.reward.tolist() == pytest.approx([file.stat().st_size / 1000])


def test_noise_is_paid_more_than_a_plain_image():
    plain = torch.full((3, 32, 32), 0.5)
    dull, busy = Jpeg()(batch(torch.stack([plain, noise()]))).reward.tolist()
    assert busy > 2 * dull


def test_compressibility_is_the_negative_size_over_500():
    images = torch.stack([noise(), torch.zeros(3, 32, 32)])
    size = Jpeg()(batch(images)).reward
    scores = make_reward("jpeg", {"kind": "compressibility"})(batch(images))
    torch.testing.assert_close(scores.reward, -size / 500)
    torch.testing.assert_close(scores.components["kilobytes"], size)


@pytest.mark.parametrize("kind", ["incompressibility", "compressibility"])
def test_an_image_with_nan_has_no_score(kind):
    images = torch.stack([noise(), noise()])
    images[0, 0, 3, 3] = torch.nan
    scores = Jpeg(kind=kind)(batch(images))
    assert scores.reward.isnan().tolist() == [True, False]
    assert sum(scores.failures.counts.values()) == 1
    assert "finite" in str(scores.failures.first)


def test_a_batch_without_episodes_has_no_scores():
    assert Jpeg()(batch(torch.zeros(0, 3, 8, 8))).reward.tolist() == []


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="got 'smallest'"):
        Jpeg(kind="smallest")

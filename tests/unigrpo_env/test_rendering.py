"""Image files and frames."""

import numpy as np
import pytest
import torch
from PIL import Image

from rewards.image_bytes import read_image
from unigrpo_env.episodes import Episodes
from unigrpo_env.rendering import (
    BACKGROUND,
    MARGIN,
    SIDE,
    check_render_mode,
    enlarge,
    render_frame,
    to_pixels,
)
from unigrpo_env.variants.variant import make_variant


def shown(frame):
    """The image in a frame, without its edge."""
    return frame[MARGIN + 1 : MARGIN + SIDE - 1, MARGIN + 1 : MARGIN + SIDE - 1]


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("L", (3, 2), 102), (0.4, 0.4, 0.4)),
        (Image.new("P", (3, 2), 0), (0.0, 0.0, 0.0)),
        (Image.new("RGB", (3, 2), (255, 102, 0)).quantize(2), (1.0, 0.4, 0.0)),
        (Image.new("RGBA", (3, 2), (255, 0, 0, 51)), (1.0, 0.8, 0.8)),
        (Image.new("RGBA", (3, 2), (255, 0, 0, 0)), (1.0, 1.0, 1.0)),
        (Image.fromarray(np.full((2, 3), 102 * 257, np.uint16)), (0.4, 0.4, 0.4)),
    ],
)
def test_images_of_any_mode_are_rgb(tmp_path, image, expected):
    image.save(tmp_path / "p.png")
    found = read_image(tmp_path / "p.png")
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.tensor(expected)[:, None, None].expand(3, 2, 3))


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_broken_image_files(tmp_path, suffix):
    path = tmp_path / f"p.{suffix}"
    with pytest.raises(ValueError, match=f"whole image at .*p.{suffix}, got"):
        read_image(path)
    noise = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    whole = path.read_bytes()
    for broken in (b"", b"no image", whole[:20], whole[: len(whole) // 2]):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=f"whole image at .*p.{suffix}, got"):
            read_image(path)


def test_pixels_go_there_and_back(tmp_path):
    image = torch.rand(3, 4, 5)
    pixels = to_pixels(image)
    assert pixels.shape == (4, 5, 3)
    assert pixels.dtype == np.uint8
    Image.fromarray(pixels).save(tmp_path / "p.png")
    torch.testing.assert_close(read_image(tmp_path / "p.png"), image, atol=0.5 / 255, rtol=0)


def test_images_are_enlarged_in_squares():
    image = torch.tensor([0.0, 1.0]).view(1, 1, 2).expand(3, 2, 2)
    large = np.asarray(enlarge(image, 8))
    assert large.shape == (8, 8, 3)
    assert (large[:, :4] == 0).all()
    assert (large[:, 4:] == 255).all()
    assert enlarge(torch.rand(3, 8, 4), 4).size == (2, 4)


def test_render_modes():
    assert check_render_mode(None) is None
    assert check_render_mode("rgb_array") == "rgb_array"
    with pytest.raises(ValueError, match="expected render_mode 'rgb_array' or None, got 'human'"):
        check_render_mode("human")


def test_a_frame_before_the_first_reset():
    frame = render_frame(Episodes(make_variant("text_to_image"), 1), 0)
    assert frame.shape == (272, 608, 3)
    assert frame.dtype == np.uint8
    assert (shown(frame) == BACKGROUND).all()


def test_a_frame_shows_the_source_first():
    variant = make_variant("edit", text_budget=1, image_steps=1)
    episodes = Episodes(variant, 1)
    prompt = variant.task.prompts("train", 1, 0)[0]
    episodes.reset([0], [prompt], [0])
    expected = np.asarray(enlarge(prompt.sources[-1], SIDE))[1:-1, 1:-1]
    assert np.array_equal(shown(render_frame(episodes, 0)), expected)
    active = torch.tensor([True])
    token = torch.tensor([variant.rules.open_image_id])
    latent = variant.processor.encode_images(torch.full((1, 3, 24, 24), 0.5))
    episodes.step(token, latent, active)
    assert not np.array_equal(shown(render_frame(episodes, 0)), expected), "noise is shown"
    episodes.step(token, latent, active)
    assert (shown(render_frame(episodes, 0)) == 128).all()

"""Colours of objects, named by CLIP."""

import pytest
import torch
from PIL import Image
from torch.nn import functional
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

from rewards.geneval.colours import ClipColours, ColourClip, crop
from rewards.geneval.names import COLOURS
from rewards.geneval.verifier import Detection
from rewards.image_bytes import image_bytes


def object_at(box, size=(20, 30)):
    """An object whose mask is the lower half of its box."""
    left, top, right, bottom = box
    mask = torch.zeros(size, dtype=torch.bool)
    mask[(top + bottom) // 2 : bottom, left:right] = True
    return Detection("cup", 0.9, tuple(map(float, box)), mask)


def test_all_but_the_mask_is_grey():
    image = torch.rand(3, 20, 30)
    seen = crop(image, object_at((4, 2, 10, 8)))
    assert seen.shape == (3, 6, 6)
    assert (seen[:, :3] * 255 == 0x99).all()
    assert torch.equal(seen[:, 3:], image[:, 5:8, 4:10])


def test_without_a_mask_the_ground_stays():
    image = torch.rand(3, 20, 30)
    seen = crop(image, Detection("cup", 0.9, (4.0, 2.0, 10.0, 8.0)))
    assert torch.equal(seen, image[:, 2:8, 4:10])


@pytest.mark.parametrize(
    "box", [(-3.0, -2.0, 0.2, 0.3), (29.8, 19.9, 33.0, 30.0), (5.0, 5.0, 5.1, 5.2)]
)
def test_a_crop_has_a_pixel(box):
    assert crop(torch.rand(3, 20, 30), Detection("cup", 0.9, box)).numel() >= 3


@torch.no_grad()
def expected_colours(folder, image, objects):
    """By transformers alone, from crops as PIL images."""
    model = CLIPModel.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    colours = []
    for colour in COLOURS:
        sentences = [
            f"a photo of a {colour} cup",
            f"a photo of a {colour}-colored cup",
            f"a photo of a {colour} object",
        ]
        tokens = tokenizer(sentences, padding=True, return_tensors="pt")
        features = functional.normalize(model.get_text_features(**tokens).pooler_output, dim=-1)
        colours.append(functional.normalize(features.mean(0), dim=-1))
    processor = CLIPImageProcessorPil.from_pretrained(folder)
    names = []
    for each in objects:
        whole = Image.fromarray(image_bytes(image))
        mask = Image.fromarray(each.mask.numpy())
        painted = Image.composite(whole, Image.new("RGB", whole.size, "#999"), mask)
        pixels = processor(images=painted.crop(each.box), return_tensors="pt")
        features = model.get_image_features(**pixels).pooler_output[0]
        names.append(COLOURS[(torch.stack(colours) @ features).argmax()])
    return names


def test_same_as_transformers(tiny_clip):
    # Large squares of plain colours.
    levels = torch.rand(3, 4, 6, generator=torch.Generator().manual_seed(1))
    image = functional.interpolate(levels[None], scale_factor=5)[0]
    boxes = [(0, 0, 10, 10), (5, 5, 25, 20), (20, 0, 30, 20), (0, 10, 12, 20), (3, 3, 9, 7)]
    objects = [object_at(box) for box in boxes]
    clip = ColourClip(model=tiny_clip)
    named = ClipColours(clip)(image, objects, "cup")
    assert named == expected_colours(tiny_clip, image, objects)
    # The 30 sentences of a class are read once.
    ClipColours(clip)(image, objects[:1], "cup")
    assert len(clip.loaded.memory) == 30

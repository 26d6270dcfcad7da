"""A thinker that reads images in the middle of a ragged context, against one whole forward."""

import pytest
import torch
import transformers
from PIL import Image
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from agents.models.thinker_painter.cache import empty_cache
from agents.models.thinker_painter.context import Reading, ThinkerContext, Told, growable, longer
from agents.models.thinker_painter.image_reading import check_sight, see
from agents.models.thinker_painter.thinker import Thinker
from agents.models.thinker_painter.vision import Vision

IDS = {
    "image_token_id": 60,
    "video_token_id": 61,
    "vision_start_token_id": 62,
    "vision_end_token_id": 63,
}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "pad_token_id": 0,
}
TOWER = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
SIZE = (16, 24)
"""Height and width of the images: 2 x 3 tokens."""


def qwen25vl():
    rope = {"mrope_section": [1, 1, 2], "rope_type": "default", "rope_theta": 1e4}
    tower = TOWER | {"window_size": 16, "fullatt_block_indexes": [1]}
    config = transformers.Qwen2_5_VLConfig(
        text_config=TEXT | {"rope_parameters": rope}, vision_config=tower, **IDS
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def qwen3vl():
    """Features of its first layer of vision are added to those of the language model."""
    rope = {"mrope_section": [2, 1, 1], "rope_type": "default", "rope_theta": 1e4}
    tower = TOWER | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    config = transformers.Qwen3VLConfig(
        text_config=TEXT | {"rope_parameters": rope, "head_dim": 8}, vision_config=tower, **IDS
    )
    return transformers.Qwen3VLForConditionalGeneration(config)


FAMILIES = (qwen25vl, qwen3vl)


def made(family):
    torch.manual_seed(0)
    model = family().eval()
    for weight in model.parameters():
        if weight.ndim > 1:
            # Large enough that each patch and position counts.
            weight.data.mul_(8)
    return model


def vision_of(model):
    return Vision.of(model.config, tuple(OPENAI_CLIP_MEAN), tuple(OPENAI_CLIP_STD))


class Reader:
    """Ragged rows that read words and images."""

    def __init__(self, model, rows, checkpointing=False):
        self.thinker = Thinker(model)
        self.vision = vision_of(model)
        self.checkpointing = checkpointing
        none = torch.zeros(rows, 0, dtype=torch.int64)
        reading = Reading(empty_cache(), none, none, none.bool(), none.sum(1), True, [], Told())
        self.context = ThinkerContext(reading)

    def read(self, ids, mask):
        """Logits `[N, T, V]`."""
        before = growable(self.context, repeatable=self.checkpointing)
        count = mask.cumsum(1)
        positions = before.position[:, None] + count - mask.long()
        roles = torch.zeros_like(ids)
        end = before.position + count[:, -1]
        grown = longer(before, ids, roles, mask, end, dense=False)
        states = self.thinker.states(
            ids, grown.valid, positions, grown.cache, checkpointing=self.checkpointing
        )
        self.context = ThinkerContext(grown)
        return self.thinker.logits(states)

    def see(self, pixels, mask, with_grad=True):
        self.context = see(
            self.thinker,
            self.vision,
            self.context,
            pixels,
            mask,
            with_grad=with_grad,
            checkpointing=self.checkpointing,
        )


LENGTHS = [(5, 2, 4), (3, 4, 2), (2, 1, 3)]
"""Words before, between and after two images, by row."""
SEEN = torch.tensor([[True, True], [True, False], [False, True]])


class Story:
    """Three rows of words with two images, of which each row sees some."""

    def __init__(self, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.words = torch.randint(5, 50, (3, 3, 5), generator=generator)
        self.masks = torch.arange(5) < torch.tensor(LENGTHS)[..., None]
        self.levels = torch.randint(256, (2, 3, 3, *SIZE), generator=generator).byte()
        self.pixels = self.levels.float() / 127.5 - 1

    def play(self, reader, with_grad=True):
        """Logits of the words, `[words, V]` a row."""
        parts = []
        for piece in range(3):
            parts.append(reader.read(self.words[:, piece], self.masks[:, piece]))
            if piece < 2:
                # What a row does not see may hold anything.
                seen = SEEN[:, piece]
                pixels = self.pixels[piece].masked_fill(~seen[:, None, None, None], torch.nan)
                reader.see(pixels, seen, with_grad)
        return [
            torch.cat([part[row][mask] for part, mask in zip(parts, self.masks[row], strict=True)])
            for row in range(3)
        ]

    def whole(self, model, row):
        """The same of one row by transformers, with its own image processor."""
        processor = Qwen2VLImageProcessorPil(
            patch_size=4, merge_size=2, size={"shortest_edge": 1, "longest_edge": 4096}
        )
        ids, images = [], []
        for piece in range(3):
            ids += self.words[row, piece, : LENGTHS[row][piece]].tolist()
            if piece < 2 and SEEN[row, piece]:
                ids += [62, *[60] * 6, 63]
                array = self.levels[piece, row].permute(1, 2, 0).numpy()
                images.append(Image.fromarray(array))
        inputs = dict(processor(images, return_tensors="pt"))
        ids = torch.tensor([ids])
        logits = model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == 60).int(),
            **inputs,
        ).logits[0]
        model.model.rope_deltas = None
        return logits[ids[0] < 60]


@pytest.mark.parametrize("mode", ["without_gradient", "with_gradient", "cut", "checkpointing"])
@pytest.mark.parametrize("family", FAMILIES)
def test_images_in_a_ragged_context(family, mode):
    model = made(family)
    story = Story()
    with torch.set_grad_enabled(mode != "without_gradient"):
        reader = Reader(model, 3, mode == "checkpointing")
        found = story.play(reader, with_grad=mode != "cut")
        for row in range(3):
            torch.testing.assert_close(found[row], story.whole(model, row), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_pixel_and_place_counts(family):
    """The comparison above can fail: other pixels, or the image turned, give other logits."""
    model = made(family)
    story = Story()
    with torch.no_grad():
        expected = story.play(Reader(model, 3))[0][5:]
        story.pixels[0, 0, 0, 0, 0] *= -1
        assert (story.play(Reader(model, 3))[0][5:] - expected).abs().max() > 1e-4
        story = Story()
        story.pixels = story.pixels.flip(-1)
        assert (story.play(Reader(model, 3))[0][5:] - expected).abs().max() > 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_words_one_by_one_after_an_image(family):
    model = made(family)
    story = Story()
    with torch.no_grad():
        reader = Reader(model, 3)
        reader.read(story.words[:, 0], story.masks[:, 0])
        reader.see(story.pixels[0], SEEN[:, 0])
        reader.read(story.words[:, 1], story.masks[:, 1])
        reader.see(story.pixels[1], SEEN[:, 1])
        steps = [
            reader.read(story.words[:, 2, [step]], story.masks[:, 2, [step]]) for step in range(4)
        ]
        for row in range(3):
            count = LENGTHS[row][2]
            found = torch.cat(steps, 1)[row, :count]
            expected = story.whole(model, row)[-count:]
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def gradients(model, logits):
    generator = torch.Generator().manual_seed(1)
    loss = sum((torch.randn(x.shape, generator=generator) * x).sum() for x in logits)
    names = [name for name, _ in model.named_parameters()]
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return {
        name: gradient for name, gradient in zip(names, found, strict=True) if gradient is not None
    }


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_the_whole_forwards(family, checkpointing):
    model = made(family)
    story = Story()
    expected = gradients(model, [story.whole(model, row) for row in range(3)])
    found = gradients(model, story.play(Reader(model, 3, checkpointing)))
    assert found.keys() == expected.keys()
    assert any("visual" in name for name in found)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_cut_image_gives_the_tower_no_gradient(checkpointing):
    """The words before and after it keep theirs."""
    model = made(qwen25vl)
    found = gradients(model, Story().play(Reader(model, 3, checkpointing), with_grad=False))
    assert not any("visual" in name for name in found)
    assert any("language_model" in name for name in found)


@pytest.mark.parametrize("mode", ["without_gradient", "with_gradient", "cut", "checkpointing"])
def test_an_image_may_stand_first(mode):
    model = made(qwen25vl)
    story = Story()
    ids = torch.tensor([[62, *[60] * 6, 63, *story.words[0, 1].tolist()]])
    inputs = vision_of(model).inputs(story.pixels[0, :1])
    with torch.set_grad_enabled(mode != "without_gradient"):
        reader = Reader(model, 1, mode == "checkpointing")
        reader.see(story.pixels[0, :1], torch.tensor([True]), mode != "cut")
        found = reader.read(story.words[:1, 1], torch.ones(1, 5).bool())
        expected = reader.thinker.whole_logits(ids, inputs, ids == 60)
    torch.testing.assert_close(found, expected[:, 8:], atol=1e-5, rtol=0)
    if mode == "checkpointing":
        towers = [name for name in gradients(model, [found]) if "visual" in name]
        assert towers


def test_an_image_of_another_size_is_resized():
    model = made(qwen25vl)
    pixels = Story().pixels[0, :1]
    larger = torch.nn.functional.interpolate(pixels, (18, 26), mode="bicubic", antialias=True)
    words = torch.tensor([[7, 8]])
    found = []
    with torch.no_grad():
        for image in (pixels, larger):
            reader = Reader(model, 1)
            reader.see(image, torch.tensor([True]))
            found.append(reader.read(words, torch.ones(1, 2).bool()))
    assert not torch.equal(*found)
    torch.testing.assert_close(*found, atol=1, rtol=0)


def test_the_tower_runs_for_the_rows_that_see():
    model = made(qwen25vl)
    counts = []
    model.model.visual.register_forward_pre_hook(lambda _, args: counts.append(len(args[0])))
    reader = Reader(model, 3)
    story = Story()
    with torch.no_grad():
        reader.read(story.words[:, 0], story.masks[:, 0])
        reader.see(story.pixels[0], torch.tensor([True, False, True]))
        reader.see(story.pixels[0], torch.zeros(3, dtype=torch.bool))
    # 4 x 6 patches each.
    assert counts == [2 * 24]


def test_patches_are_those_of_the_image_processor():
    """Of a real model's sizes."""
    vision = Vision(14, 2, 2, 62, 60, 63, tuple(OPENAI_CLIP_MEAN), tuple(OPENAI_CLIP_STD))
    levels = torch.randint(256, (2, 3, 56, 84), generator=torch.Generator().manual_seed(0)).byte()
    images = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in levels]
    expected = Qwen2VLImageProcessorPil()(images, return_tensors="pt")
    found = vision.inputs(levels.float() / 127.5 - 1)
    torch.testing.assert_close(found["pixel_values"], expected["pixel_values"], atol=1e-5, rtol=0)
    assert torch.equal(found["image_grid_thw"], expected["image_grid_thw"])
    assert vision.view_size(56, 84) == (56, 84)
    assert len(vision.ids(56, 84)) == 2 * 3 + 2


@pytest.mark.parametrize(
    ("size", "seen"), [((50, 90), (56, 84)), ((10, 10), (28, 28)), ((2048, 2048), (1008, 1008))]
)
def test_view_size(size, seen):
    vision = Vision(14, 2, 2, 62, 60, 63, (0.5,) * 3, (0.5,) * 3)
    assert vision.view_size(*size) == seen


def test_a_model_that_does_not_see_has_no_vision():
    for config in (transformers.Qwen3Config(), transformers.Glm4vConfig()):
        assert Vision.of(config, (0.5,) * 3, (0.5,) * 3) is None


def test_a_model_that_sees_otherwise_is_refused():
    """Here it gives all patches of a column the same position."""
    model = made(qwen25vl)
    check_sight(Thinker(model), vision_of(model))
    own = model.model.get_rope_index

    def flat(*args, **kwargs):
        positions, deltas = own(*args, **kwargs)
        positions[1] = positions[0]
        return positions, deltas

    model.model.get_rope_index = flat
    with pytest.raises(ValueError, match=r"as those of the Qwen family do.*other logits"):
        check_sight(Thinker(model), vision_of(model))

"""What a backbone brings, what it may leave out, and the layouts that come with the library."""

import pytest
import torch

from unigrpo_env.pixel_latents import PixelLatents
from unigrpo_env.processor import PROCESSORS, Processor
from unigrpo_env.tasks.shapes.processor import ShapesProcessor
from unigrpo_env.variants.toy import ToyProcessor


class Least(Processor):
    """No optional part."""

    vocab_size = 8
    pad_id = 0
    open_image_id = 2
    latent_shape = (2, 3)
    image_size = (1, 2)

    def encode_text(self, text):
        return []

    def decode_text(self, ids):
        return ""

    def encode_prompt(self, text, *, sources=0, system="", thinks=True):
        return [2]

    def decode_latents(self, latents):
        return latents


def words(processor, ids):
    return " ".join(processor.tokenizer.convert_ids_to_tokens(list(ids)))


def test_an_incomplete_processor_cannot_be_made():
    with pytest.raises(TypeError, match="decode_latents"):
        Processor()


def test_optional_parts_say_what_is_missing():
    with pytest.raises(NotImplementedError, match="Least does not define encode_images"):
        Least().encode_images(torch.zeros(1, 3, 1, 2))
    with pytest.raises(NotImplementedError, match="Least does not define encode_turn"):
        Least().encode_turn("more")
    assert Least().continuation_ids() == ()
    assert Least().describe_token(5) == "id 5"


def test_marks_are_neither_written_nor_typed():
    processor = Least()
    assert processor.forbidden_ids() == (0,)
    assert processor.control_ids() == {2}
    processor.image_id = 6
    processor.end_id = 7
    assert processor.forbidden_ids() == (0, 6)
    assert processor.control_ids() == {2, 6, 7}


def test_padding_may_be_the_token_that_opens():
    # Some tokenizers pad with their end of text.
    processor = Least()
    processor.pad_id = 2
    assert processor.forbidden_ids() == ()


def test_the_time_grid_has_the_processor_s_shift():
    processor = Least()
    assert processor.time_grid(2) == (1.0, 0.75, 0.0)
    assert processor.time_grid(2, 1.0) == (1.0, 0.5, 0.0)
    processor.time_shift = 1.0
    assert processor.time_grid(2) == (1.0, 0.5, 0.0)
    with pytest.raises(ValueError, match="expected steps >= 1"):
        processor.time_grid(0)


def test_processors_are_known_by_name():
    assert isinstance(PROCESSORS["shapes"](), ShapesProcessor)
    assert isinstance(PROCESSORS["toy"](), ToyProcessor)
    with pytest.raises(ValueError, match="unknown processor 'shape'; did you mean 'shapes'"):
        PROCESSORS["shape"]


@pytest.mark.parametrize(
    ("text", "settings", "expected"),
    [
        ("a circle", {}, "<bos> a circle <eos> <bos>"),
        ("a circle", {"thinks": False}, "<bos> a circle <eos>"),
        ("a circle", {"sources": 2}, "<image> <image> <bos> a circle <eos> <bos>"),
        ("blue", {"system": "red"}, "<bos> red <eos> <bos> blue <eos> <bos>"),
        (
            "blue",
            {"system": "red", "sources": 1, "thinks": False},
            "<bos> red <eos> <image> <bos> blue <eos>",
        ),
        ("", {}, "<bos> <eos> <bos>"),
        ("", {"sources": 1}, "<image> <bos>"),
        ("", {"system": "red", "thinks": False}, "<bos> red <eos>"),
    ],
)
def test_every_text_is_a_segment(text, settings, expected):
    processor = ShapesProcessor()
    assert words(processor, processor.encode_prompt(text, **settings)) == expected


@pytest.mark.parametrize(("thinks", "tail"), [(True, " <bos>"), (False, "")])
def test_a_turn_is_a_segment(thinks, tail):
    processor = ShapesProcessor()
    turn = processor.encode_turn("make the circle blue", thinks=thinks)
    assert words(processor, turn) == f"<bos> make the circle blue <eos>{tail}"
    assert words(processor, processor.continuation_ids(thinks)) == tail.strip()


def test_marks_are_left_out_of_decoded_text():
    processor = ShapesProcessor()
    ids = processor.encode_text("<bos> red <image> circle <eos> <end> <pad>")
    assert processor.decode_text(ids) == "red circle"
    assert processor.decode_text([]) == ""


def test_unknown_words_are_found():
    processor = ShapesProcessor()
    assert processor.unknown_words("a red giraffe on the moon") == ["giraffe", "on", "moon"]
    assert processor.unknown_words("a red circle") == []


def test_typed_marks_are_described_in_letters():
    processor = ShapesProcessor()
    marks = {processor.describe_token(token) for token in processor.control_ids()}
    assert marks == {"<bos>", "<eos>", "<image>", "<end>"}


@pytest.mark.parametrize(
    ("height", "width", "patch"), [(24, 24, 4), (2, 2, 2), (4, 6, 2), (6, 3, 3)]
)
def test_pixels_are_encoded_and_decoded(height, width, patch):
    latents = PixelLatents(height, width, patch)
    images = torch.rand(2, 3, height, width)
    encoded = latents.encode(images)
    assert encoded.shape == (2, *latents.latent_shape)
    torch.testing.assert_close(latents.decode(encoded), images)


def test_a_latent_token_is_a_square():
    latents = PixelLatents(4, 6, 2)
    image = torch.zeros(1, 3, 4, 6)
    # Red in the last column of the second row of squares.
    image[0, 0, 2:, 4:] = 1
    encoded = latents.encode(image)[0]
    assert encoded.shape == (6, 12)
    assert (encoded[:5] == -1).all()
    assert encoded[5].tolist() == [1, -1, -1] * 4


def test_decoded_pixels_are_clamped():
    latents = PixelLatents(2, 2, 2)
    decoded = latents.decode(torch.tensor([[[9.0] * 6 + [-9.0] * 6]]))
    assert decoded.min() == 0
    assert decoded.max() == 1

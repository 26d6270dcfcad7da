"""From layouts to pixels and back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards.shapes.grid import (
    COLOURS,
    GROUND,
    KINDS,
    PLACES,
    UNREADABLE,
    VERDICT_CORRECT,
    VERDICT_WRONG,
    distances,
    draw,
    matches,
    read,
    relation_holds,
    relation_table,
    templates,
)

layouts = st.lists(st.integers(0, len(KINDS)), min_size=9, max_size=9)
RED_CIRCLE = 1 + KINDS.index(("red", "circle"))


@given(layouts)
def test_what_is_drawn_is_read(layout):
    assert read(draw(torch.tensor([layout]))).tolist() == [layout]


@settings(max_examples=30)
@given(layouts, st.integers(0, 1000))
def test_only_little_noise_is_readable(layout, seed):
    image = draw(torch.tensor([layout]))
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(image.shape, generator=generator)
    assert read((image + 0.04 * noise).clamp(0, 1)).tolist() == [layout]
    assert UNREADABLE in read((image + 0.6 * noise).clamp(0, 1)).tolist()[0]


def test_cells_are_drawn_row_by_row():
    image = draw(torch.tensor([[0, 0, RED_CIRCLE, 0, 0, 0, 0, 0, 0]]))[0]
    torch.testing.assert_close(image[:, 3, 20], torch.tensor(COLOURS["red"]))
    torch.testing.assert_close(image[:, 20, 3], torch.tensor(GROUND))
    assert PLACES[2] == "top-right"


def test_other_image_sizes_are_refused():
    with pytest.raises(ValueError, match=r"\[N, 3, 24, 24\], got \[1, 3, 32, 32\]"):
        read(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match=r"got \[3, 24, 24\]"):
        read(torch.zeros(3, 24, 24))


def test_templates_are_at_distance_zero():
    kinds = torch.arange(1 + len(KINDS))
    assert templates().shape == (21, 3, 8, 8)
    found = distances(draw(kinds[:, None].expand(-1, 9)))
    assert found.shape == (21, 9, 21)
    assert found[kinds, :, kinds].max() < 1e-3
    assert found[0, 0, 1:].min() > 0.17, "no object is near an empty cell"


def test_bytes_and_other_precisions_are_read():
    image = draw(torch.tensor([[RED_CIRCLE] * 9]))
    assert read(image.double()).tolist() == [[RED_CIRCLE] * 9]
    assert read(image.bfloat16()).tolist() == [[RED_CIRCLE] * 9]


def test_cells_match_descriptions():
    assert matches(RED_CIRCLE, {"colour": "red", "shape": "circle"})
    assert matches(RED_CIRCLE, {"colour": None, "shape": "circle"})
    assert matches(RED_CIRCLE, {"shape": "circle"})
    assert not matches(RED_CIRCLE, {"colour": "blue", "shape": "circle"})
    assert not matches(RED_CIRCLE, {"colour": "red", "shape": "square"})
    assert not matches(0, {"shape": "circle"})
    assert not matches(UNREADABLE, {"shape": "circle"})


def test_relations_compare_rows_or_columns():
    assert relation_holds("left of", 0, 4)
    assert relation_holds("right of", 8, 0)
    assert relation_holds("above", 2, 3)
    assert relation_holds("below", 7, 5)
    assert not relation_holds("left of", 0, 3)
    assert not relation_holds("above", 0, 1)
    with pytest.raises(ValueError, match="above or below, got 'near'"):
        relation_holds("near", 0, 1)


@pytest.mark.parametrize("pair", [("left of", "right of"), ("above", "below")])
def test_relation_tables_mirror_each_other(pair):
    first, second = (relation_table(relation) for relation in pair)
    assert torch.equal(first, second.T)
    assert first.sum() == 27
    assert first.dtype == torch.float32


def test_verdicts_are_words_of_the_vocabulary():
    assert (VERDICT_CORRECT, VERDICT_WRONG) == ("right-picture", "wrong-picture")

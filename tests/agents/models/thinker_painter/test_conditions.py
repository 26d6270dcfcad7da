"""Rows of what `encode_prompt` returned are taken and joined, whatever its form."""

import pytest
import torch
from tiny import FAMILIES

from agents.models.thinker_painter.conditions import Conditions, Rows, find_layout
from agents.models.thinker_painter.painter import Painter

ONE_BY_ONE = ("cogview4", "qwen_edit")
"""CogView4's text encoder sees the padding; Qwen-Image-Edit fails with more than one text."""
TEXTS = ["two red circles", "a blue square left of a green cross", "a tree"]


def made(rows, length=3):
    """Embeddings, a list of texts of any length, positions for all rows, and no mask."""
    embeddings = torch.arange(rows * length * 2.0).reshape(rows, length, 2)
    listed = [torch.full((row + 1,), float(row)) for row in range(rows)]
    positions = torch.zeros(length, 3)
    return embeddings, listed, positions, None


LAYOUT = (Rows.TENSOR, Rows.LIST, Rows.SHARED, Rows.TENSOR)


def test_layout_is_told_from_one_text_and_two():
    assert find_layout(made(1), made(2)) == LAYOUT


def test_layout_of_a_tensor_alone():
    assert find_layout(torch.zeros(1, 3), torch.zeros(2, 3)) is Rows.TENSOR


def test_layout_of_nested_tuples():
    one, two = (made(1)[:2], torch.zeros(4)), (made(2)[:2], torch.zeros(4))
    assert find_layout(one, two) == ((Rows.TENSOR, Rows.LIST), Rows.SHARED)


def test_layout_of_a_list_of_layers():
    """A list of two tensors is no list of two rows when it has two for one text, too."""
    one = [torch.zeros(1, 3), torch.zeros(1, 3)]
    two = [torch.zeros(2, 3), torch.zeros(2, 3)]
    assert find_layout(one, two) == (Rows.TENSOR, Rows.TENSOR)
    picked = Conditions(two, find_layout(one, two), 2).select(torch.tensor([1]))
    assert isinstance(picked.value, list)
    assert [len(part) for part in picked.value] == [1, 1]


def test_rows_are_selected():
    whole = Conditions(made(3), LAYOUT, 3)
    part = whole.select(torch.tensor([2, 0, 2]))
    assert part.rows == 3
    assert isinstance(part.value, tuple)
    embeddings, listed, positions, mask = part.value
    assert torch.equal(embeddings, whole.value[0][[2, 0, 2]])
    assert [float(entry[0]) for entry in listed] == [2, 0, 2]
    assert positions is whole.value[2]
    assert mask is None


def test_all_rows_in_their_order_are_no_copy():
    whole = Conditions(made(3), LAYOUT, 3)
    assert whole.select(torch.arange(3)) is whole


def test_rows_are_joined():
    whole = Conditions(made(3), LAYOUT, 3)
    parts = [whole.select(torch.tensor(rows)) for rows in ([0], [1, 2])]
    joined = Conditions.join(parts)
    assert joined.rows == 3
    assert torch.equal(joined.value[0], whole.value[0])
    assert all(map(torch.equal, joined.value[1], whole.value[1]))
    assert joined.value[2] is whole.value[2]
    assert joined.value[3] is None


def test_texts_of_other_lengths_do_not_fit():
    short, long = (Conditions(made(1, length), LAYOUT, 1) for length in (3, 4))
    assert not short.fits(long)
    assert short.fits(Conditions(made(2, 3), LAYOUT, 2))


def test_entries_of_a_list_may_have_any_length():
    one = Conditions([torch.zeros(3)], Rows.LIST, 1)
    assert one.fits(Conditions([torch.zeros(5)], Rows.LIST, 1))


def test_a_mask_does_not_fit_none():
    without = Conditions((torch.zeros(1, 3), None), (Rows.TENSOR, Rows.TENSOR), 1)
    having = Conditions((torch.zeros(1, 3), torch.ones(1, 3)), (Rows.TENSOR, Rows.TENSOR), 1)
    assert not without.fits(having)
    assert not having.fits(without)


@pytest.mark.parametrize("name", FAMILIES)
def test_selected_texts_are_those_encoded_alone(name):
    """Also in families that return lists, masks, or positions for all rows."""
    pipeline, call = FAMILIES[name]()
    painter = Painter(pipeline, **call)
    assert painter.reads_together == (name not in ONE_BY_ONE)
    x = torch.randn(1, *painter.latent_shape, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.4])
    with torch.no_grad():
        if not painter.reads_together:
            with pytest.raises(ValueError, match="encode each alone"):
                painter.encode([TEXTS[0], TEXTS[1] * 4])
            return
        together = painter.encode(TEXTS)
        for row, text in enumerate(TEXTS):
            one = together.select(torch.tensor([row]))
            found = painter.predict_velocity(one, x, t)
            alone = painter.predict_velocity(painter.encode([text]), x, t)
            torch.testing.assert_close(found, alone, atol=1e-5, rtol=0)

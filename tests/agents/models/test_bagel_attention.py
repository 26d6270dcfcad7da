"""What a token sees, and the two ways to compute its attention."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from agents.models.bagel.attention import attend, attend_folded, image_bias, text_bias

MASK = torch.tensor([[True, True, True], [True, False, False]])


@pytest.fixture
def contexts(small_bagel):
    """A context in which every row holds all slots, and one in which one row does not."""
    ids = torch.tensor([[1, 9, 2], [4, 5, 6]])
    _, dense = small_bagel.append_text(small_bagel.empty_context(2), ids)
    _, ragged = small_bagel.append_text(small_bagel.empty_context(2), ids, MASK)
    return dense, ragged


@pytest.fixture
def seen_shapes(monkeypatch):
    """The shape of each bias that attention gets; None for none."""
    shapes = []
    original = F.scaled_dot_product_attention

    def spy(query, key, value, bias=None, **settings):
        shapes.append(None if bias is None else tuple(bias.shape))
        return original(query, key, value, bias, **settings)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    return shapes


@pytest.mark.parametrize("with_grad", [False, True])
def test_image_needs_no_bias_for_each_of_its_tokens(small_bagel, contexts, seen_shapes, with_grad):
    x = torch.randn(2, 36, 48)
    dense, ragged = contexts
    with torch.set_grad_enabled(with_grad):
        small_bagel.predict_velocity(dense, x, torch.tensor([0.5, 0.5]))
        assert seen_shapes == [None, None]
        seen_shapes.clear()
        # 3 slots, 2 markers, 36 latent tokens.
        small_bagel.predict_velocity(ragged, x, torch.tensor([0.5, 0.5]))
        small_bagel.append_image(ragged, x)
        small_bagel.append_image(ragged, x, with_grad=False)
    assert set(seen_shapes) == {(2, 1, 1, 41)}


class HostReads(TorchDispatchMode):
    """Counts how often Python asks for the value of a tensor, for which a GPU is waited for."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*arguments, **(keywords or {}))


@torch.no_grad()
def test_denoising_asks_once_whether_something_is_hidden(small_bagel, contexts):
    x = torch.randn(2, 36, 48)
    for context, expected in zip(contexts, (0, 1), strict=True):
        for number in (expected, 0):
            with HostReads() as reads:
                small_bagel.predict_velocity(context, x, torch.tensor([0.5, 0.5]))
            assert reads.count == number


@torch.no_grad()
def test_one_token_needs_one_row_of_bias(small_bagel, contexts, seen_shapes):
    small_bagel.append_text(contexts[1], torch.tensor([[1], [2]]))
    assert set(seen_shapes) == {(2, 1, 1, 4)}


def test_text_sees_what_stands_before_it(contexts):
    _, ragged = contexts
    bias = text_bias(ragged, torch.tensor([[True, True], [False, True]]), torch.float32)
    visible = (bias == 0)[:, 0].long().tolist()
    assert visible[0] == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    # Row 1 holds one slot of the context; its padding sees itself and is not seen.
    assert visible[1] == [[1, 0, 0, 1, 0], [1, 0, 0, 0, 1]]
    assert bias[bias != 0].eq(-torch.inf).all()


def test_image_sees_context_and_itself(contexts):
    dense, ragged = contexts
    assert image_bias(dense, 4, torch.float32) is None
    bias = image_bias(ragged, 2, torch.bfloat16)
    assert bias.dtype == torch.bfloat16
    assert (bias == 0).long().tolist() == [[[[1, 1, 1, 1, 1]]], [[[1, 0, 0, 1, 1]]]]


def test_no_bias_is_a_bias_of_zeros():
    """To the bit, on the CPU: so a context in which nothing is hidden changes no number."""
    query = torch.randn(2, 4, 38, 24)
    key = torch.randn(2, 2, 60, 24)
    value = torch.randn(2, 2, 60, 24)
    zeros = torch.zeros(2, 1, 38, 60)
    expected = attend(query, key, value, zeros)
    assert torch.equal(attend(query, key, value, None), expected)
    assert torch.equal(attend(query, key, value, zeros[:, :, :1]), expected)


@pytest.mark.parametrize("heads", [2, 6])
@pytest.mark.parametrize("kind", ["none", "image", "text"])
def test_folded_heads_give_the_same(heads, kind):
    """What runs on a GPU gives the numbers and the gradients of what runs on a CPU."""
    query = torch.randn(2, heads, 5, 8, requires_grad=True)
    key = torch.randn(2, 2, 9, 8, requires_grad=True)
    value = torch.randn(2, 2, 9, 8, requires_grad=True)
    rows = {"none": 0, "image": 1, "text": 5}[kind]
    bias = None
    if rows:
        hidden = torch.rand(2, 1, rows, 9) < 0.4
        # Every token sees something.
        hidden[..., 0] = False
        bias = torch.zeros(2, 1, rows, 9).masked_fill(hidden, -torch.inf)
    weights = torch.randn(2, heads, 5, 8)
    results = []
    for function in (attend, attend_folded):
        mixed = function(query, key, value, bias)
        gradients = torch.autograd.grad((mixed * weights).sum(), (query, key, value))
        results.append((mixed, *gradients))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)

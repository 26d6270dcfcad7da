"""The context of a transformer."""

import torch

from agents.models.kv_cache import KeyValueContext


def context_of(rows=2, slots=3):
    """One layer with `slots` random slots in use."""
    generator = torch.Generator().manual_seed(0)
    return KeyValueContext(
        keys=[torch.randn(rows, 1, slots, 4, generator=generator)],
        values=[torch.randn(rows, 1, slots, 4, generator=generator)],
        valid=torch.ones(rows, slots, dtype=torch.bool),
        position=torch.full((rows,), slots),
        size=slots,
    )


@torch.no_grad()
def test_capacity_at_least_doubles():
    context = context_of()
    context.reserve(1)
    assert context.valid.shape[1] == 6
    assert context.size == 3
    context.reserve(3)
    assert context.valid.shape[1] == 6, "there is room already"
    context.reserve(20)
    assert context.valid.shape[1] == 23


@torch.no_grad()
def test_in_place_equals_concatenation():
    key = torch.randn(2, 1, 2, 4)
    value = torch.randn(2, 1, 2, 4)
    valid = torch.tensor([[True, True], [True, False]])
    position = torch.tensor([5, 4])
    buffered = context_of()
    buffered.reserve(2)
    keys, values = buffered.attend(0, key, value)
    grown = buffered.advance([keys], [values], valid, position)
    assert grown is buffered
    with torch.enable_grad():
        joined = context_of()
        keys, values = joined.attend(0, key, value)
        concatenated = joined.advance([keys], [values], valid, position)
    assert joined.size == 3, "with gradient the given context stays as it is"
    for name in ("keys", "values"):
        found = getattr(grown, name)[0][:, :, : grown.size]
        assert torch.equal(found, getattr(concatenated, name)[0])
    assert torch.equal(grown.valid[:, : grown.size], concatenated.valid)


@torch.no_grad()
def test_attend_without_advance_is_overwritten():
    context = context_of()
    before = context.keys[0].clone()
    context.reserve(2)
    context.attend(0, torch.ones(2, 1, 2, 4), torch.ones(2, 1, 2, 4))
    assert context.size == 3
    assert torch.equal(context.keys[0][:, :, :3], before)
    keys, _ = context.attend(0, torch.zeros(2, 1, 1, 4), torch.zeros(2, 1, 1, 4))
    assert not keys[:, :, 3].any()


def test_select_and_repeat_interleave():
    context = context_of()
    repeated = context.repeat_interleave(2)
    assert repeated.batch_size == 4
    selected = context.select(torch.tensor([0, 0, 1, 1]))
    assert torch.equal(repeated.keys[0], selected.keys[0])
    assert torch.equal(repeated.position, selected.position)


def test_context_with_gradient_is_not_written():
    context = context_of()
    context.keys[0].requires_grad_()
    with torch.no_grad():
        assert not context.in_place
        assert context.detach().in_place
    assert not context.detach().in_place, "gradients are enabled here"

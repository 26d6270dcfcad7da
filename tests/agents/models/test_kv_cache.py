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
    assert context.capacity == 6
    assert context.size == 3
    context.reserve(3)
    assert context.capacity == 6, "there is room already"
    context.reserve(20)
    assert context.capacity == 23


@torch.no_grad()
def test_exact_capacity_is_what_was_asked_for():
    context = context_of()
    before = context.keys[0].clone()
    context.reserve(1, exact=True)
    assert context.capacity == 4
    assert context.keys[0].shape == context.values[0].shape == (2, 1, 4, 4)
    assert torch.equal(context.keys[0][:, :, :3], before)
    context.reserve(0, exact=True)
    assert context.capacity == 4, "no room is taken back"
    context.reserve(2)
    assert context.capacity == 8, "without `exact` it doubles as before"


@torch.no_grad()
def test_in_place_equals_concatenation():
    key = torch.randn(2, 1, 2, 4)
    value = torch.randn(2, 1, 2, 4)
    valid = torch.tensor([[True, True], [True, False]])
    position = torch.tensor([5, 4])
    buffered = context_of()
    buffered.reserve(2)
    keys, values = buffered.extend(0)(key, value)
    grown = buffered.advance([keys], [values], valid, position)
    assert grown is buffered
    with torch.enable_grad():
        joined = context_of()
        keys, values = joined.extend(0)(key, value)
        concatenated = joined.advance([keys], [values], valid, position)
    assert joined.size == 3, "with gradient the given context stays as it is"
    for name in ("keys", "values"):
        found = getattr(grown, name)[0][:, :, : grown.size]
        assert torch.equal(found, getattr(concatenated, name)[0])
    assert torch.equal(grown.valid[:, : grown.size], concatenated.valid)


@torch.no_grad()
def test_extension_without_advance_is_overwritten():
    context = context_of()
    before = context.keys[0].clone()
    context.reserve(2)
    context.extend(0)(torch.ones(2, 1, 2, 4), torch.ones(2, 1, 2, 4))
    assert context.size == 3
    assert torch.equal(context.keys[0][:, :, :3], before)
    keys, _ = context.extend(0)(torch.zeros(2, 1, 1, 4), torch.zeros(2, 1, 1, 4))
    assert not keys[:, :, 3].any()


@torch.no_grad()
def test_extension_that_is_not_kept_leaves_the_buffers():
    context = context_of()
    context.reserve(2)
    new = torch.ones(2, 1, 2, 4)
    keys, values = context.extend(0, keep=False)(new, new)
    assert torch.equal(keys, torch.cat([context.keys[0][:, :, :3], new], 2))
    assert torch.equal(values, torch.cat([context.values[0][:, :, :3], new], 2))
    assert not context.keys[0][:, :, 3:].any()


@torch.no_grad()
def test_extension_forgets_what_is_read_later():
    """A layer may run again in the backward pass, when the context has grown."""
    context = context_of()
    extend = context.extend(0, keep=False)
    new = torch.ones(2, 1, 1, 4)
    before, _ = extend(new, new)
    context.reserve(1)
    keys, values = context.extend(0)(new * 2, new * 2)
    context.advance([keys], [values], torch.ones(2, 1).bool(), context.position + 1)
    after, _ = extend(new, new)
    assert torch.equal(after, before)


@torch.no_grad()
def test_whether_all_slots_are_held_is_known_until_the_context_grows():
    context = context_of()
    assert context.dense is None
    assert context.is_dense
    assert context.dense
    context.reserve(2)
    assert context.is_dense, "reserved slots are not in use"
    new = torch.ones(2, 1, 1, 4)

    def grow(valid, **known):
        keys, values = context.extend(0)(new, new)
        context.advance([keys], [values], valid, context.position + 1, **known)

    grow(torch.ones(2, 1).bool(), all_valid=True)
    assert context.dense, "nothing has to be asked"
    grow(torch.tensor([[True], [False]]))
    assert context.dense is None
    assert not context.is_dense
    context.reserve(1)
    grow(torch.ones(2, 1).bool())
    assert context.dense is False, "more slots do not fill the empty one"
    assert context.detach().dense is False
    assert context.repeat_interleave(2).dense is False
    # Row 0 holds all slots, row 1 does not.
    assert context.select(torch.tensor([0, 0])).is_dense
    assert not context.select(torch.tensor([0, 1])).is_dense


def test_later_slots_of_a_copy_join_the_own_ones():
    context = context_of()
    context.keys[0].requires_grad_()
    new = torch.ones(2, 1, 2, 4)
    with torch.no_grad():
        copied = context.detach()
        copied.reserve(2, exact=True)
        keys, values = copied.extend(0)(new, new)
        valid = torch.tensor([[True, True], [False, False]])
        copied.advance([keys], [values], valid, torch.tensor([4, 3]))
    joined = context.with_later_slots(copied)
    assert context.size == 3
    assert (joined.size, joined.position.tolist()) == (5, [4, 3])
    assert joined.valid.tolist() == [[True] * 5, [True] * 3 + [False] * 2]
    assert torch.equal(joined.keys[0], torch.cat([context.keys[0], new], 2))
    joined.keys[0].sum().backward()
    assert context.keys[0].grad.eq(1).all()


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

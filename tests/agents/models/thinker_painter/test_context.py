"""Contexts are row indices into what was read: nothing is copied, and nothing is encoded twice."""

import pytest
import torch
from tiny import make_model

from agents.policy.chunks import predict_velocity

VOCABULARY = 300
"""Tokens below this one are words."""


def read_rows(model, rows=3, length=4, seed=0):
    """A context whose rows hold different words."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(10, VOCABULARY, (rows, length), generator=generator)
    return model.append_text(model.empty_context(rows), ids)[1]


def inputs(model, rows):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, *model.latent_shape, generator=generator)
    return x, torch.rand(rows, generator=generator)


@pytest.fixture
def counted():
    """Let a painter list the texts that it encodes: `counted(model)`."""

    def count(model):
        encoded = []
        own = model.painter._asked.encode

        def encode(texts, source=None):
            encoded.append(list(texts))
            return own(texts, source)

        model.painter._asked.encode = encode
        return encoded

    return count


def keys_of(context):
    return [layer.keys.data_ptr() for layer in context.reading.cache.layers]


@pytest.mark.parametrize("with_grad", [False, True])
def test_rows_are_picked_without_a_copy(with_grad):
    model = make_model("sd3")
    with torch.set_grad_enabled(with_grad):
        context = read_rows(model)
        picked = context.select(torch.tensor([2, 0]))
        for other in (
            picked,
            picked.repeat_interleave(3),
            context.detach(),
            context.repeat_interleave(2).detach().select(torch.tensor([5])),
        ):
            assert other.reading is context.reading
            assert keys_of(other) == keys_of(context)
    assert picked.repeat_interleave(2).all_rows().tolist() == [2, 2, 0, 0]


def test_painting_gathers_no_keys(monkeypatch):
    model = make_model("zimage")
    context = read_rows(model).repeat_interleave(4)

    def gather(*_):
        raise AssertionError("keys were gathered")

    monkeypatch.setattr("agents.models.thinker_painter.context.grown_from", gather)
    model.predict_velocity(context, *inputs(model, 12))


@pytest.mark.parametrize("pick", ["select", "repeat_interleave", "detach"])
def test_a_shared_reading_stays_as_it_was(pick):
    """Whichever of the two contexts reads on, the other holds the same."""
    model = make_model("sd3")
    more = torch.tensor([[20, 21], [22, 23], [24, 25]])
    with torch.no_grad():
        expected, _ = model.append_text(read_rows(model), more)
        arguments = {"select": [torch.arange(3)], "repeat_interleave": [1], "detach": []}[pick]
        for first, second in ((0, 1), (1, 0)):
            context = read_rows(model)
            both = [context, getattr(context, pick)(*arguments)]
            model.append_text(both[first], more.flip(0))
            found, _ = model.append_text(both[second], more)
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_an_own_reading_grows_in_place():
    """One alone holds the keys: the old ones are not kept beside the new ones."""
    model = make_model("sd3")
    with torch.no_grad():
        context = read_rows(model)
        _, grown = model.append_text(context, torch.tensor([[20], [21], [22]]))
    assert grown.reading.cache is context.reading.cache


def test_texts_are_encoded_once(counted):
    """Whatever is picked, repeated or drawn again."""
    model = make_model("zimage")
    encoded = counted(model)
    context = read_rows(model)
    for other in (
        context,
        context,
        context.repeat_interleave(3),
        context.select(torch.tensor([2, 0])),
    ):
        model.predict_velocity(other, *inputs(model, other.batch_size))
    assert [len(texts) for texts in encoded] == [3]
    cut = context.detach()
    model.predict_velocity(cut.repeat_interleave(2), *inputs(model, 6))
    model.predict_velocity(cut, *inputs(model, 3))
    # Once more, without a graph.
    assert [len(texts) for texts in encoded] == [3, 3]


def test_equal_texts_are_encoded_once(counted):
    """The rows of a group that have only read their prompt."""
    model = make_model("sd3")
    encoded = counted(model)
    context = read_rows(model)
    _, context = model.append_text(
        context.select(torch.tensor([0, 0, 1, 1])), torch.full((4, 1), 30)
    )
    model.predict_velocity(context, *inputs(model, 4))
    assert [len(texts) for texts in encoded] == [2]


def test_rows_that_join_later(counted):
    """Rows finish their thoughts at different steps: the texts of new rows alone are encoded."""
    model = make_model("zimage")
    encoded = counted(model)
    x, t = inputs(model, 3)
    with torch.no_grad():
        context = read_rows(model)
        first = context.select(torch.tensor([1]))
        early = model.predict_velocity(first, x[[1]], t[[1]])
        # Row 1 has finished; the others write on.
        mask = torch.tensor([[True], [False], [True]])
        _, context = model.append_text(context, torch.full((3, 1), 30), mask)
        late = model.predict_velocity(context.select(torch.tensor([0, 1])), x[:2], t[:2])
        _, context = model.append_text(context, torch.full((3, 1), 31), mask.roll(1, 0) & mask)
        all_rows = model.predict_velocity(context, x, t)
    assert [len(texts) for texts in encoded] == [1, 1, 2]
    torch.testing.assert_close(late[1:], early, atol=1e-5, rtol=0)
    torch.testing.assert_close(all_rows[1:2], early, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["zimage", "qwen", "sd3"])
def test_rows_that_were_encoded_apart_are_drawn_alike(name):
    """Conditions of other shapes, from other calls, give what each row gives alone."""
    model = make_model(name)
    x, t = inputs(model, 3)
    with torch.no_grad():
        context = read_rows(model)
        alone = [
            model.predict_velocity(context.select(torch.tensor([row])), x[[row]], t[[row]])
            for row in range(3)
        ]
        together = model.predict_velocity(context, x, t)
        fresh = model.predict_velocity(read_rows(model), x, t)
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=0)
    torch.testing.assert_close(fresh, together, atol=1e-5, rtol=0)


@pytest.mark.parametrize("max_rows", [None, 2])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_training_step_encodes_once(counted, max_rows, checkpointing):
    """Also when the velocity is computed in parts, and again in the backward pass."""
    model = make_model("zimage")
    encoded = counted(model)
    model.max_rows = max_rows
    model.checkpointing = checkpointing
    x, t = inputs(model, 6)
    predict_velocity(model, read_rows(model), x, t, repeats=2).square().sum().backward()
    # No more texts at once than rows.
    assert [len(texts) for texts in encoded] == ([3] if max_rows is None else [2, 1])
    found = [
        weight.grad.clone() for weight in model.thinker.parameters() if weight.grad is not None
    ]
    assert found
    model.zero_grad()
    model.max_rows = None
    model.checkpointing = False
    predict_velocity(model, read_rows(model), x, t, repeats=2).square().sum().backward()
    weights = [weight for weight in model.thinker.parameters() if weight.grad is not None]
    for gradient, weight in zip(found, weights, strict=True):
        torch.testing.assert_close(gradient, weight.grad, atol=1e-5, rtol=1e-3)

"""Velocities in parts are those of the whole, and hold the activations of one part alone."""

import pytest
import torch

from agents.policy.chunks import FREE_SHARE, predict_velocity, rows_at_once
from agents.policy.evaluate import window_velocities
from agents.policy.guidance import Guidance, guided
from unigrpo_env.mdp.rules import Role

GIB = 2**30


@pytest.fixture
def inputs(small_bagel):
    """A context of 4 rows, and 12 latents with their times: three for each row."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 60, (4, 7), generator=generator)
    mask = torch.arange(7) < torch.tensor([[7], [3], [5], [7]])

    def read(model):
        _, context = model.append_text(model.empty_context(4), ids, mask)
        return context

    x = torch.randn(12, *small_bagel.latent_shape, generator=generator)
    t = torch.rand(12, generator=generator)
    return read, x, t


def gradients(model, velocity):
    model.zero_grad()
    velocity.square().mean().backward()
    found = {}
    for name, weight in model.named_parameters():
        if weight.grad is not None:
            found[name] = weight.grad.clone()
    return found


def note_rows(model, monkeypatch):
    """Returns the list that the rows of each forward are added to."""
    rows = []
    predict = model.predict_velocity

    def keep(context, x, t):
        assert context.batch_size == len(x) == len(t)
        rows.append(len(x))
        return predict(context, x, t)

    monkeypatch.setattr(model, "predict_velocity", keep)
    return rows


@torch.no_grad()
@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("max_rows", [1, 3, 5, 100])
def test_parts_are_the_whole(small_bagel, inputs, monkeypatch, repeats, max_rows):
    read, x, t = inputs
    context = read(small_bagel)
    x = x[: 4 * repeats]
    t = t[: 4 * repeats]
    repeated = context.repeat_interleave(repeats)
    expected = small_bagel.predict_velocity(repeated, x, t)
    rows = note_rows(small_bagel, monkeypatch)
    small_bagel.max_rows = max_rows
    found = predict_velocity(small_bagel, context, x, t, repeats)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert max(rows) <= max_rows
    assert max(rows) - min(rows) <= 1
    assert sum(rows) == len(x)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_parts_are_those_of_the_whole(small_bagel, inputs, checkpointing):
    """The weights' own, and through the context those of the text."""
    read, x, t = inputs
    context = read(small_bagel)
    whole = predict_velocity(small_bagel, context, x, t, 3)
    expected = gradients(small_bagel, whole)
    assert expected["language_model.model.embed_tokens.weight"].abs().sum() > 0
    small_bagel.max_rows = 5
    small_bagel.checkpointing = checkpointing
    parts = predict_velocity(small_bagel, read(small_bagel), x, t, 3)
    found = gradients(small_bagel, parts)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4)


@torch.no_grad()
def test_parts_under_guidance_are_the_whole(small_bagel, inputs):
    """A part has its rows of all branches."""
    _, x, t = inputs
    found = []
    for max_rows in (None, 3):
        small_bagel.max_rows = max_rows
        model = guided(small_bagel, Guidance(3.0, 2.0))
        roles = torch.full((4, 3), Role.USER)
        context = model.empty_context(4)
        reads = torch.tensor([True, False, True, False])
        context = model.append_image(context, x[:4], mask=reads)
        _, context = model.append_hidden(context, torch.arange(5, 17).view(4, 3), roles=roles)
        found.append(predict_velocity(model, context, x, t, 3))
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=0)


def kept_bytes(function):
    """Bytes that a forward keeps for its backward pass."""
    storages = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        function()
    return sum(storage.nbytes() for storage in storages.values())


def test_checkpointed_parts_keep_no_activations(small_bagel, inputs):
    read, x, t = inputs
    context = read(small_bagel)

    def predict():
        return predict_velocity(small_bagel, context, x, t, 3)

    whole = kept_bytes(predict)
    small_bagel.checkpointing = True
    layers = kept_bytes(predict)
    small_bagel.max_rows = 1
    parts = kept_bytes(predict)
    # All that is left of a part are the numbers of its rows.
    assert parts < layers / 10 < whole / 10


def test_one_part_is_one_plain_call(small_bagel, inputs, monkeypatch):
    """Nothing is copied where nothing is split."""
    read, x, t = inputs
    context = read(small_bagel)
    calls = []
    monkeypatch.setattr(small_bagel, "predict_velocity", lambda *given: calls.append(given) or x)
    assert predict_velocity(small_bagel, context, x[:4], t[:4]) is x
    assert calls[0][0] is context


@torch.no_grad()
def test_context_is_not_repeated_for_parts(small_bagel, inputs, monkeypatch):
    read, x, t = inputs
    context = read(small_bagel)
    latents = torch.cat([x, x[:4]]).unflatten(0, (4, 4))
    times = torch.cat([t, t[:4]]).unflatten(0, (4, 4))
    expected = window_velocities(small_bagel, context, latents, times)
    assert expected.shape == latents[:, :-1].shape
    monkeypatch.setattr(type(context), "repeat_interleave", None)
    small_bagel.max_rows = 5
    found = window_velocities(small_bagel, context, latents, times)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


class LatentsOnDevice:
    """As much of latents on a CUDA device as the choice of a size looks at."""

    is_cuda = True
    device = torch.device("cuda", 0)

    def __len__(self):
        return 64


@pytest.mark.parametrize(
    ("each", "expected"),
    [
        (0, 64),  # unknown
        (GIB // 100, 64),  # all fit
        (2 * GIB, int(FREE_SHARE * 40) // 2),
        (100 * GIB, 1),  # not even one: the device will say so
    ],
)
def test_rows_follow_free_memory(small_bagel, monkeypatch, each, expected):
    """30 GiB are free, and torch holds 10 more in which no tensor lies."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (30 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 45 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 35 * GIB)
    monkeypatch.setattr(small_bagel, "velocity_bytes", lambda context: each)
    context = small_bagel.empty_context(64)
    assert rows_at_once(small_bagel, context, LatentsOnDevice()) == expected
    small_bagel.max_rows = 7
    assert rows_at_once(small_bagel, context, LatentsOnDevice()) == 7


def test_all_rows_at_once_on_the_cpu(small_bagel):
    context = small_bagel.empty_context(3)
    x = torch.zeros(3, *small_bagel.latent_shape)
    assert rows_at_once(small_bagel, context, x) == 3


@torch.no_grad()
def test_no_rows_are_no_error(small_bagel):
    context = small_bagel.empty_context(0)
    x = torch.zeros(0, *small_bagel.latent_shape)
    assert predict_velocity(small_bagel, context, x, torch.zeros(0)).shape == x.shape

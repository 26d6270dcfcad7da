"""How often the host waits for the device, counted without one.

A stand-in for a GPU: its tensors say that they are on another device, and compute on the CPU. What
would wait for a GPU is noted, and an operation that mixes devices is an error as it is there.
"""

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from agents.policy.actor import Actor
from agents.policy.evaluate import evaluate_actions
from agents.policy.sde import Window
from agents.rollout.collector import Collector
from unigrpo_env.vector_env import InterleavedGenVectorEnv

aten = torch.ops.aten
DEVICE = torch.device("meta")
"""Torch knows a device of this name, and nothing else here uses it."""
COPIES = {aten._to_copy, aten.copy_}
INDEXED = {aten.index, aten.index_put, aten.index_put_}
READS = {
    aten._local_scalar_dense, aten.is_nonzero, aten.equal, aten.nonzero, aten.masked_select,
    aten._unique2, aten.unique_dim, aten.bincount,
}  # fmt: skip
"""Operations whose result, or whose result's shape, the host must know."""


class OnDevice(Tensor):
    """A tensor on `DEVICE`; its numbers are in `inner`."""

    @staticmethod
    def __new__(cls, inner):
        place = inner.shape, inner.stride(), inner.storage_offset()
        return Tensor._make_wrapper_subclass(cls, *place, dtype=inner.dtype, device=DEVICE)

    def __init__(self, inner):
        self.inner = inner

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


class Numbers(TorchFunctionMode):
    """Python numbers go to `DEVICE` and back by way of the CPU; else torch would lose them."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is Tensor.tolist and is_on_device(args[0]):
            StandIn.waits.append("tolist")
            return bring(args[0]).tolist()
        if func not in (torch.tensor, torch.as_tensor) or kwargs.get("device") != DEVICE:
            return func(*args, **kwargs)
        del kwargs["device"]
        return func(*args, **kwargs).to(DEVICE)


class StandIn(TorchDispatchMode):
    """Makes `DEVICE` usable; `waits` are the names of the operations that would wait for it."""

    waits: list[str] = []

    def __init__(self):
        super().__init__()
        self.numbers = Numbers()

    def __enter__(self):
        StandIn.waits = []
        self.numbers.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.numbers.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


def is_on_device(value):
    return isinstance(value, OnDevice)


def compute(func, args, kwargs):
    """Compute on the CPU; the result is on `DEVICE` if it is asked for there, or an input is."""
    name = func.overloadpacket
    tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
    there = [each for each in tensors if is_on_device(each)]
    here = [each for each in tensors if not is_on_device(each) and each.ndim]
    to_device = bool(there)
    if kwargs.get("device") is not None:
        to_device = torch.device(kwargs["device"]) == DEVICE
        kwargs = {**kwargs, "device": torch.device("cpu")}
    elif name is aten.copy_:
        to_device = is_on_device(args[0])
    if there and here and name not in COPIES | INDEXED:
        raise RuntimeError(f"{func} of tensors on two devices")
    # Torch's own tensors on this device hold no numbers; a list used as an index becomes one.
    if any(each.device == DEVICE for each in here):
        raise RuntimeError(f"{func} of a tensor that this stand-in did not see")
    if would_wait(func, args, kwargs, there, to_device):
        StandIn.waits.append(str(name))
    result = func(*tree_map(bring, args), **tree_map(bring, kwargs))
    if func._schema.is_mutable:
        return None if result is None else kwargs.get("out", args[0])
    if to_device:
        return tree_map(send, result)
    return result


def would_wait(func, args, kwargs, there, to_device):
    """Whether the host would wait for a GPU."""
    name = func.overloadpacket
    if name in COPIES:
        # Up without waiting if the caller says so; down never.
        crosses = to_device != bool(there) or (name is aten.copy_ and len(there) == 1)
        upwards = to_device and (kwargs.get("non_blocking") or args[2:] == (True,))
        return crosses and not upwards
    if name in INDEXED and there:
        indices = [each for each in tree_leaves(args[1]) if isinstance(each, Tensor)]
        # A mask is searched first, and indices on the CPU are copied.
        return any(each.dtype == torch.bool or not is_on_device(each) for each in indices)
    return bool(there) and name in READS


def bring(value):
    return value.inner if is_on_device(value) else value


def send(value):
    return OnDevice(value) if isinstance(value, Tensor) and not is_on_device(value) else value


def on_stand_in(model):
    """The model with its weights and buffers on `DEVICE`."""
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                moved = nn.Parameter(OnDevice(weight.data), weight.requires_grad)
                module._parameters[name] = moved
        for name, buffer in module._buffers.items():
            module._buffers[name] = send(buffer)
    return model


def length_reward(episodes):
    return torch.tensor([float(len(text)) for text in episodes.texts])


def collector_of(model, variant, device):
    env = InterleavedGenVectorEnv(variant, 6, copy=False, device=device)
    return Collector(env, Actor(model, window=Window(2, 0, 3)), 3)


def waits_of_steps(collector, prompts, monkeypatch):
    """Play episodes; returns whether each step was a token's, and how often it waited."""
    actor = collector.actor
    act = actor.act
    steps = []

    def note(observation):
        began = len(StandIn.waits)
        decision = act(observation)
        steps.append((decision.mean is None, began))
        return decision

    monkeypatch.setattr(actor, "act", note)
    collector.collect(prompts, 3)
    # Each step lasts until the next begins, so that it includes the env's and the record of it.
    kinds, began = zip(*steps, strict=True)
    waits = [after - before for before, after in pairwise(began)]
    return list(zip(kinds, waits, strict=False))


@pytest.mark.parametrize("name", ["text_to_image", "story", "dialogue"])
def test_a_step_waits_once(small_bagel, short_variant, monkeypatch, name):
    """A token for its number, a latent for the check that it is finite."""
    variant = short_variant(name, text_budget=8, image_steps=6, reward=length_reward)
    on_stand_in(small_bagel)
    prompts = variant.task.prompts("train", 2, 0)
    with StandIn():
        steps = waits_of_steps(collector_of(small_bagel, variant, DEVICE), prompts, monkeypatch)
    kinds = {True: 0, False: 0}
    # The first two steps of a text or an image have more to read and to compare, the last more to
    # write down.
    for first, second, (kind, waits), last in zip(
        steps, steps[1:], steps[2:], steps[3:], strict=False
    ):
        if {first[0], second[0], last[0]} == {kind}:
            assert waits <= 1
            kinds[kind] += 1
        else:
            assert waits <= 6
    assert min(kinds.values()) > 1


@pytest.mark.parametrize("text_budget", [0, 5])
def test_observation_may_be_on_the_device(small_bagel, short_variant, text_budget):
    """All of it, as a TorchRL env gives it; the decision is where that of the vector env is."""
    variant = short_variant("story", text_budget=text_budget, reward=length_reward)
    on_stand_in(small_bagel)
    decisions = []
    with StandIn():
        env = InterleavedGenVectorEnv(variant, 3, device=DEVICE)
        prompts = variant.task.prompts("train", 3, 0)
        observation, _ = env.reset(seed=0, options={"prompts": prompts})
        for seen in (observation, tree_map(send, observation)):
            actor = Actor(small_bagel, window=Window(2, 0, 3))
            actor.start([1, 2, 3], send(torch.zeros(3, dtype=torch.int64)))
            decisions.append(actor.act(seen))
    first, second = decisions
    for decision in decisions:
        assert not is_on_device(decision.token)
        assert not is_on_device(decision.active)
        assert is_on_device(decision.next_latent)
    assert torch.equal(first.token, second.token)
    assert torch.equal(bring(first.next_latent), bring(second.next_latent))


@pytest.mark.parametrize("name", ["text_to_image", "edit", "story"])
def test_episodes_on_a_device_are_those_on_the_cpu(small_bagel, short_variant, name):
    """And so are the gradients of what is made of them."""
    variant = short_variant(name, reward=length_reward)
    prompts = variant.task.prompts("train", 2, 0)
    legal = variant.rules.legal_by_round()

    def play_and_learn(device):
        episodes = collector_of(small_bagel, variant, device).collect(prompts, 3).flatten(0, 1)
        found = evaluate_actions(small_bagel, episodes, legal.to(device))
        loss = found.log_prob[episodes.chosen_mask].mean() + found.velocity.square().mean()
        loss.backward()
        gradients = [weight.grad for weight in small_bagel.parameters()]
        return episodes, [gradient for gradient in gradients if gradient is not None]

    expected, expected_gradients = play_and_learn(torch.device("cpu"))
    small_bagel.zero_grad()
    on_stand_in(small_bagel)
    with StandIn():
        found, gradients = play_and_learn(DEVICE)
    assert is_on_device(found.tokens)
    assert torch.equal(bring(found.tokens), expected.tokens)
    torch.testing.assert_close(bring(found.latent), expected.latent, atol=1e-4, rtol=0)
    torch.testing.assert_close(bring(found.log_prob), expected.log_prob, atol=1e-4, rtol=0)
    assert len(gradients) == len(expected_gradients)
    for gradient, other in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(bring(gradient), other, atol=1e-4, rtol=1e-3)

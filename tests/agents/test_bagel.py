"""The model against numbers computed by the public reference implementation (float32, random weights, original names)."""

import pytest
import torch

from agents.models import Bagel, BagelConfig, ToyModel, load_model
from unigrpo_env.flow_time import time_grid

TOLERANCE = {"atol": 1e-4, "rtol": 0}


@pytest.mark.parametrize("grad", [False, True], ids=["cache", "training"])
def test_logits_and_context(model, oracle, read, grad):
    with torch.set_grad_enabled(grad):
        logits, _ = read("prompt")
        torch.testing.assert_close(logits[0], oracle["out.prompt.logits"], **TOLERANCE)
        logits, context = read("prompt", "thought")
    torch.testing.assert_close(logits[0], oracle["out.thought.logits"], **TOLERANCE)
    for layer in range(3):
        for name, stored in (("k", context.keys), ("v", context.values)):
            found = stored[layer][0, :, : context.size].transpose(0, 1)
            torch.testing.assert_close(found, oracle[f"out.context.{name}.{layer}"], **TOLERANCE)


@torch.no_grad()
def test_one_call_or_two(model, oracle, read):
    ids = torch.cat([oracle["in.prompt.ids"], oracle["in.thought.ids"]])[None]
    logits, _ = model.read_text(model.start(1), ids)
    torch.testing.assert_close(logits[0, 12:], oracle["out.thought.logits"], **TOLERANCE)


@torch.no_grad()
def test_greedy_tokens(model, oracle, read):
    expected = oracle["out.greedy.ids"]
    _, context = read("prompt")
    found = [expected[0]]
    while len(found) < len(expected):
        logits, context = model.read_text(context, found[-1].view(1, 1))
        found.append(logits[0, -1].argmax())
    assert torch.stack(found).tolist() == expected.tolist()


@pytest.mark.parametrize("grad", [False, True], ids=["cache", "training"])
def test_velocities(model, oracle, read, grad):
    with torch.set_grad_enabled(grad):
        _, context = read("prompt", "thought")
        velocity = model.velocity(context.repeat(5), oracle["in.gen.x_t"], oracle["in.gen.t"])
        again = model.velocity(context.repeat(5), oracle["in.gen.x_t"], oracle["in.gen.t"])
    torch.testing.assert_close(velocity, oracle["out.gen.v"], **TOLERANCE)
    assert torch.equal(velocity, again), "noise is not remembered"


@torch.no_grad()
def test_six_step_sampling(model, oracle, read):
    _, context = read("prompt", "thought")
    times, x = time_grid(6, shift=3.0), oracle["in.gen.noise"][None]
    torch.testing.assert_close(times[:-1], oracle["out.gen.sample_t"], **TOLERANCE)
    for step in range(6):
        torch.testing.assert_close(x[0], oracle["out.gen.sample_x"][step], **TOLERANCE)
        velocity = model.velocity(context, x, times[step : step + 1])
        torch.testing.assert_close(velocity[0], oracle["out.gen.sample_v"][step], **TOLERANCE)
        x = x + velocity * (times[step + 1] - times[step])
    torch.testing.assert_close(x[0], oracle["out.gen.sample_x"][6], **TOLERANCE)


@torch.no_grad()
def test_ragged_rows_are_what_they_are_alone(small_bagel):
    ids = torch.tensor([[1, 7, 8, 2], [1, 9, 0, 0]])
    mask = ids != 0
    logits, context = small_bagel.read_text(small_bagel.start(2), ids, mask, last_only=True)
    more = torch.tensor([[10], [11]])
    later, context = small_bagel.read_text(context, more, torch.tensor([[True], [False]]))
    x, t = torch.randn(2, 36, 48), torch.tensor([0.7, 0.4])
    velocity = small_bagel.velocity(context, x, t)
    for row, words in enumerate(([1, 7, 8, 2], [1, 9])):
        alone, own = small_bagel.read_text(small_bagel.start(1), torch.tensor([words]), last_only=True)
        torch.testing.assert_close(alone[0], logits[row], atol=2e-5, rtol=0)
        if row == 0:
            alone, own = small_bagel.read_text(own, more[:1])
            torch.testing.assert_close(alone[0], later[0], atol=2e-5, rtol=0)
        torch.testing.assert_close(small_bagel.velocity(own, x[row : row + 1], t[row : row + 1])[0], velocity[row], atol=2e-5, rtol=0)


def test_save_and_load(small_bagel, tmp_path):
    for model in (small_bagel, ToyModel()):
        folder = model.save_pretrained(tmp_path / type(model).__name__)
        loaded = load_model(str(folder))
        assert loaded.config == model.config
        for name, value in model.state_dict().items():
            assert torch.equal(value, loaded.state_dict()[name])


def test_damaged_and_foreign_files(small_bagel, tmp_path):
    folder = small_bagel.save_pretrained(tmp_path / "model")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        Bagel.from_pretrained(folder)
    ToyModel().save_pretrained(tmp_path / "toy")
    (folder / "model.safetensors").write_bytes((tmp_path / "toy" / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="does not fit this Bagel: missing"):
        Bagel.from_pretrained(folder)
    with pytest.raises(ValueError, match="'ToyModel'"):
        Bagel.from_pretrained(tmp_path / "toy")
    with pytest.raises(ValueError, match="did you mean 'tiny'"):
        load_model("tine")


def test_the_experts_own_all_trainable_weights(small_bagel):
    lists = small_bagel.parameter_lists()
    listed = [id(weight) for weights in lists.values() for weight in weights]
    trainable = [id(weight) for weight in small_bagel.parameters() if weight.requires_grad]
    assert sorted(listed) == sorted(trainable)
    assert not small_bagel.latent_pos_embed.pos_embed.requires_grad


def test_the_released_model_counts_what_it_should():
    """14.6 billion parameters with vision tower; without it, and with tables, what its layers and heads add up to."""
    with torch.device("meta"):
        model = Bagel(BagelConfig())
    layers = sum(weight.numel() for name, weight in model.named_parameters() if ".layers." in name)
    assert round(layers / 2 / 1e9, 2) == 6.53
    head = sum(weight.numel() for name, weight in model.named_parameters() if "embed_tokens" in name or "lm_head" in name)
    assert round(head / 1e9, 2) == 1.09

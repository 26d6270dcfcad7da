"""Adapters in any model: what they add, who trains, and what they leave alone."""

import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from agents.models.base import UnifiedModel
from agents.models.lora import (
    adapters_by_expert,
    add_adapters,
    base_tensors,
    has_adapters,
    lora_layers,
    merge_adapters,
    switched_off,
)
from agents.models.registry import load_model
from agents.models.toy import ToyModel
from agents.testing.inputs import outputs_of

BOTH = {"text": 2, "image": 3}


@dataclass(frozen=True)
class PlainConfig:
    """Sizes of a `PlainModel`."""

    width: int = 8


@dataclass(frozen=True)
class PlainContext:
    """The sum of what was read, `[N, width]`."""

    state: torch.Tensor


class PlainModel(UnifiedModel[PlainContext]):
    """Linear layers alone: some whose names end alike, two that share a weight, one subclass."""

    config_class = PlainConfig

    def __init__(self, config=PlainConfig()):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(5, config.width)
        self.head = nn.Linear(config.width, config.width)
        self.inner = nn.ModuleDict({"head": nn.Linear(config.width, config.width, bias=False)})
        self.tied = nn.Linear(config.width, 5, bias=False)
        self.tied.weight = self.embed.weight
        self.own = nn.modules.linear.NonDynamicallyQuantizableLinear(config.width, config.width)
        self.draw = nn.Linear(config.width, 6)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)

    @property
    def vocab_size(self):
        return 5

    @property
    def latent_shape(self):
        return 2, 3

    def parameters_by_expert(self):
        image = list(self.draw.parameters())
        text = [*self.embed.parameters(), *self.head.parameters(), *self.inner.parameters()]
        return {"text": [*text, *self.own.parameters()], "image": image}

    def empty_context(self, batch_size):
        return PlainContext(self.head.weight.new_zeros(batch_size, self.config.width))

    def append_text(self, context, ids, mask=None):
        states = context.state[:, None] + self.embed(ids).cumsum(1)
        hidden = self.own(self.inner["head"](self.head(states).tanh()).tanh())
        return self.tied(hidden), PlainContext(states[:, -1])

    def predict_velocity(self, context, x, t):
        drawn = self.draw(context.state).float().view_as(x)
        return self.frozen(x.flatten(1).to(self.frozen.weight.dtype)).float().view_as(x) + drawn


@pytest.fixture(params=["small_bagel", "tiny", "bfloat16", "plain"])
def any_model(request, small_bagel):
    """Models of several kinds, without adapters and with frozen weights.

    A product of matrices may be rounded otherwise where one needs a gradient; adapters freeze all.
    """
    torch.manual_seed(0)
    model = small_bagel
    if request.param == "tiny":
        model = load_model("tiny")
    if request.param == "bfloat16":
        model = small_bagel.cast_weights(torch.bfloat16)
    if request.param == "plain":
        model = PlainModel()
    return model.requires_grad_(False)


def outputs(model):
    """Logits of a text and a velocity after it."""
    with torch.no_grad():
        return outputs_of(model)


def assert_same(found, expected):
    """To the last bit."""
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def differs(found, expected):
    """Which of the outputs differ."""
    return [not torch.equal(one, other) for one, other in zip(found, expected, strict=True)]


def train(model, seed=1):
    """Give all adapters weights that are not zero."""
    generator = torch.Generator().manual_seed(seed)
    for weights in adapters_by_expert(model).values():
        for weight in weights:
            weight.data.normal_(0, 0.1, generator=generator)


def adapters_off(model):
    return switched_off(lora_layers(model).values())


def adapted(model, rank=BOTH, **settings):
    """The model, with trained adapters of alpha 4."""
    add_adapters(model, rank, dict.fromkeys(rank, 4.0), **settings)
    train(model)
    return model


@pytest.mark.slow
def test_models_without_adapters_need_no_peft():
    """It takes a while to import."""
    modules = "lora, reference, adapter_files, registry, bagel.model"
    names = ", ".join(f"agents.models.{name}" for name in modules.split(", "))
    code = f"import sys, {names}; assert 'peft' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_new_adapters_change_no_output(any_model):
    expected = outputs(any_model)
    kind = type(any_model)
    assert not has_adapters(any_model)
    add_adapters(any_model, BOTH, {"text": 4, "image": 6})
    assert has_adapters(any_model)
    assert type(any_model) is kind
    assert_same(outputs(any_model), expected)
    train(any_model)
    assert differs(outputs(any_model), expected) == [True, True]


def test_adapters_alone_are_trained(any_model):
    add_adapters(any_model, BOTH, {"text": 4, "image": 6})
    trained = [weight for weight in any_model.parameters() if weight.requires_grad]
    lists = any_model.trainable_by_expert()
    assert set(lists) == {"text", "image"}
    listed = [weight for weights in lists.values() for weight in weights]
    assert {id(weight) for weight in listed} == {id(weight) for weight in trained}
    assert len(listed) == len(trained)
    assert all(weight.dtype == torch.float32 for weight in listed)


def test_model_without_adapters_trains_all_weights(small_bagel):
    lists = small_bagel.parameters_by_expert()
    for expert, weights in small_bagel.trainable_by_expert().items():
        assert [id(weight) for weight in weights] == [id(weight) for weight in lists[expert]]


def test_gradient_reaches_both_matrices_of_each_expert(small_bagel):
    model = adapted(small_bagel)
    _, context = model.append_text(model.empty_context(1), torch.tensor([[1, 2]]))
    model.predict_velocity(context, torch.randn(1, 36, 48), torch.tensor([0.5])).sum().backward()
    for weights in model.trainable_by_expert().values():
        assert any(weight.grad is not None and weight.grad.any() for weight in weights)
    assert model.llm2vae.weight.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapter_adds_the_product_of_two_matrices(small_bagel, dtype):
    model = adapted(small_bagel.cast_weights(dtype), {"image": 3})
    layer = model.language_model.model.layers[1].mlp_moe_gen.up_proj
    x = torch.randn(5, 32).to(dtype)
    low = layer.lora_A["default"].weight
    high = layer.lora_B["default"].weight
    assert low.shape == (3, 32)
    assert high.shape == (48, 3)
    with torch.no_grad():
        found = layer(x)
        # The sum is rounded once, at the end.
        expected = layer.base_layer(x).float() + 4 / 3 * x.float() @ low.T @ high.T
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected.to(dtype))


def test_each_expert_has_its_own_rank_and_alpha(small_bagel):
    add_adapters(small_bagel, {"text": 2, "image": 5}, {"text": 2, "image": 20})
    for name, layers in small_bagel.adapted_layers.items():
        for layer in map(small_bagel.get_submodule, layers):
            rank = {"text": 2, "image": 5}[name]
            assert layer.lora_A["default"].out_features == rank
            assert layer.scaling["default"] == {"text": 1, "image": 4}[name]
    names = small_bagel.adapted_layers
    assert "language_model.model.layers.0.mlp_moe_gen.up_proj" in names["image"]
    assert "language_model.model.layers.0.mlp.up_proj" in names["text"]


@pytest.mark.parametrize("rank", [{"image": 2}, {"image": 2, "text": 0}])
def test_expert_without_a_rank_gets_none(small_bagel, rank):
    expected = outputs(small_bagel)
    adapted(small_bagel, rank)
    assert small_bagel.adapted_layers["text"] == []
    assert small_bagel.trainable_by_expert()["text"] == []
    # Text runs through the text expert alone.
    assert differs(outputs(small_bagel), expected) == [False, True]


def test_targets_are_searched_in_the_name(small_bagel):
    adapted(small_bagel, targets=[r"layers\.1\..*q_proj", "lm_head"])
    layer = "language_model.model.layers.1.self_attn.q_proj"
    expected = {"text": [layer, "language_model.lm_head"], "image": [f"{layer}_moe_gen"]}
    assert small_bagel.adapted_layers == expected


def test_name_that_ends_in_a_target_is_another_layer():
    model = adapted(PlainModel(), targets=["^head$"])
    assert model.adapted_layers == {"text": ["head"], "image": []}
    assert type(model.inner["head"]) is nn.Linear


def test_layers_that_no_adapter_fits_are_left_out():
    """One shares its weight, one is of another class, one is not trained."""
    model = adapted(PlainModel())
    assert model.adapted_layers == {"text": ["head", "inner.head"], "image": ["draw"]}


def test_seed_repeats_the_adapters(small_bagel):
    torch.manual_seed(5)
    expected = torch.rand(3)
    first = small_bagel.frozen_copy()
    same = small_bagel.frozen_copy()
    other = small_bagel.frozen_copy()
    torch.manual_seed(5)
    for model, seed in ((first, 1), (same, 1), (other, 2)):
        add_adapters(model, BOTH, BOTH, seed=seed)
    # The numbers that others draw are the same as without adapters.
    assert torch.equal(torch.rand(3), expected)
    for one, two, three in zip(
        first.parameters(), same.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(one, two)
        if one.requires_grad and one.any():
            assert not torch.equal(one, three)


def test_targets_that_match_nothing(small_bagel):
    message = r"targets \['qproj'\].*it has 33 linear layers.*layers.0.self_attn.q_proj, "
    with pytest.raises(ValueError, match=message):
        add_adapters(small_bagel, BOTH, BOTH, ["qproj"])
    assert not has_adapters(small_bagel)


def test_model_without_linear_layers():
    with pytest.raises(ValueError, match=r"of ToyModel .* 0 linear layers to choose from: none"):
        add_adapters(ToyModel(), BOTH, BOTH)


def test_second_adapters_are_refused(small_bagel):
    adapted(small_bagel)
    with pytest.raises(ValueError, match="expected a Bagel without adapters"):
        add_adapters(small_bagel, BOTH, BOTH)


@pytest.mark.parametrize(
    ("rank", "alpha", "message"),
    [
        ({"vision": 2}, {"vision": 2}, r"one of \['image', 'text'\], got 2 for 'vision'"),
        ({"text": -1}, {}, "at least 0 .* got -1 for 'text'"),
        ({"text": 2}, {"image": 2}, "alpha above 0 for the expert 'text' of rank 2, got None"),
    ],
)
def test_wrong_settings(small_bagel, rank, alpha, message):
    with pytest.raises(ValueError, match=message):
        add_adapters(small_bagel, rank, alpha)
    assert not has_adapters(small_bagel)


def test_switched_off_adapters_leave_the_model_itself(any_model):
    expected = outputs(any_model)
    trained = outputs(adapted(any_model))
    with adapters_off(any_model):
        assert_same(outputs(any_model), expected)
        with adapters_off(any_model):
            assert_same(outputs(any_model), expected)
        assert_same(outputs(any_model), expected)
    assert_same(outputs(any_model), trained)


def test_switching_back_after_an_error(small_bagel):
    trained = outputs(adapted(small_bagel))
    with pytest.raises(RuntimeError, match="stop"), adapters_off(small_bagel):
        raise RuntimeError("stop")
    assert_same(outputs(small_bagel), trained)


def test_switching_freezes_nothing(small_bagel):
    lists = adapted(small_bagel).trainable_by_expert()
    # One expert is frozen on purpose.
    for weight in lists["text"]:
        weight.requires_grad_(False)
    expected = [weight.requires_grad for weight in small_bagel.parameters()]
    with adapters_off(small_bagel):
        assert [weight.requires_grad for weight in small_bagel.parameters()] == expected
    assert [weight.requires_grad for weight in small_bagel.parameters()] == expected


@pytest.mark.parametrize("first", ["adapters", "cast"])
def test_adapters_stay_in_float32(small_bagel, first):
    if first == "cast":
        small_bagel.cast_weights(torch.bfloat16)
    adapted(small_bagel)
    small_bagel.cast_weights(torch.bfloat16)
    for name, weight in small_bagel.named_parameters():
        expected = torch.float32 if ".lora_" in name else torch.bfloat16
        assert weight.dtype == expected, name
    assert outputs(small_bagel)[1].dtype == torch.float32


def test_frozen_copy_keeps_the_adapters(small_bagel):
    trained = outputs(adapted(small_bagel))
    copied = small_bagel.frozen_copy()
    assert not any(weight.requires_grad for weight in copied.parameters())
    assert copied.adapted_layers == small_bagel.adapted_layers
    train(small_bagel, seed=2)
    torch.testing.assert_close(outputs(copied), trained)
    train(copied, seed=2)
    torch.testing.assert_close(outputs(copied), outputs(small_bagel))


def test_own_tensors_have_their_first_names(any_model):
    expected = {name: tensor.clone() for name, tensor in any_model.state_dict().items()}
    found = base_tensors(adapted(any_model))
    assert list(found) == list(expected)
    assert_same(found.values(), expected.values())


def test_merged_weights_need_no_adapters(any_model):
    plain = any_model.frozen_copy()
    trained = outputs(adapted(any_model))
    dtypes = {name: weight.dtype for name, weight in plain.state_dict().items()}
    merge_adapters(any_model)
    merged = base_tensors(any_model)
    assert {name: tensor.dtype for name, tensor in merged.items()} == dtypes
    plain.load_state_dict(merged)
    # A merged weight in bfloat16 is rounded.
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.05}[next(any_model.parameters()).dtype]
    for model in (plain, any_model):
        for found, expected in zip(outputs(model), trained, strict=True):
            torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


def test_sums_are_rounded_once(small_bagel):
    model = adapted(small_bagel.cast_weights(torch.bfloat16), {"image": 2}, targets=["llm2vae"])
    layer = model.llm2vae
    with torch.no_grad():
        delta = 4 / 2 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    expected = (layer.weight.float() + delta).bfloat16()
    merge_adapters(model)
    assert torch.equal(base_tensors(model)["llm2vae.weight"], expected)


def test_merging_without_adapters_changes_nothing(small_bagel):
    before = small_bagel.frozen_copy().state_dict()
    merge_adapters(small_bagel)
    assert_same(base_tensors(small_bagel).values(), before.values())

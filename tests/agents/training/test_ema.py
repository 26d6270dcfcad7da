"""The running average of the weights."""

import pytest
import torch

from agents.training.ema import WeightAverage


def make(values, decay=0.9, dtype=torch.float32):
    """Weights of a dtype with float32 values beside them; float32 weights are their own values."""
    weights = {}
    masters = {}
    for name, value in values.items():
        weight = torch.nn.Parameter(torch.tensor(value).to(dtype))
        weights[name] = weight
        masters[name] = weight if dtype == torch.float32 else weight.detach().float()
    return weights, masters, WeightAverage(weights, masters, decay)


def set_all(values, number):
    with torch.no_grad():
        for value in values.values():
            value.fill_(number)


def test_average_by_hand():
    weights, _, average = make({"a": [1.0, 1.0]}, decay=0.9)
    expected = 1.0
    for number in (2.0, -3.0, 5.0):
        set_all(weights, number)
        average.update()
        expected = 0.9 * expected + 0.1 * number
    torch.testing.assert_close(average.averages["a"], torch.full((2,), expected))


def test_average_is_float32_beside_lower_weights():
    """Steps that bfloat16 cannot hold add up in the average."""
    weights, masters, average = make({"a": [1.0]}, decay=0.5, dtype=torch.bfloat16)
    set_all(masters, 1.001)
    average.update()
    torch.testing.assert_close(average.averages["a"], torch.tensor([1.0005]))
    assert average.averages["a"].dtype == torch.float32
    with average.applied():
        assert weights["a"].dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_applied_for_the_time_of_the_block(dtype):
    weights, masters, average = make({"a": [1.0], "b": [4.0]}, decay=0.5, dtype=dtype)
    set_all(masters, 2.0)
    set_all(weights, 2.0)
    average.update()
    with average.applied():
        assert weights["a"].item() == 1.5
        assert weights["b"].item() == 3.0
    assert weights["a"].item() == weights["b"].item() == 2.0
    set_all(weights, 7.0)
    assert float(average.averages["a"]) == 1.5, "the weights and their average share no memory"


def test_error_in_the_block_gives_the_weights_back():
    weights, _, average = make({"a": [1.0]})
    set_all(weights, 2.0)

    def fail():
        with average.applied():
            assert weights["a"].item() == 1.0
            raise RuntimeError("in the block")

    with pytest.raises(RuntimeError, match="in the block"):
        fail()
    assert weights["a"].item() == 2.0


def test_load():
    _, _, average = make({"a": [1.0], "b": [2.0]})
    average.load({"a": torch.tensor([5.0]), "b": torch.tensor([6.0])})
    assert {name: float(value) for name, value in average.averages.items()} == {"a": 5, "b": 6}

"""Features that are kept."""

import torch

from rewards.vision.feature_memory import FeatureMemory


def test_each_key_is_computed_once():
    asked = []
    memory = FeatureMemory(10)

    def features(words):
        def compute(positions):
            asked.append([words[position] for position in positions])
            return torch.tensor([[float(len(words[position]))] for position in positions])

        return memory(words, compute).flatten().tolist()

    assert features(["a", "bb", "a"]) == [1, 2, 1]
    assert features(["ccc", "bb"]) == [3, 2]
    assert features(["bb"]) == [2]
    assert asked == [["a", "bb"], ["ccc"]]


def test_the_keys_that_were_asked_for_last_are_kept():
    memory = FeatureMemory(2)
    computed = []

    def ask(*keys):
        def compute(positions):
            computed.extend(keys[position] for position in positions)
            return torch.zeros(len(positions), 1)

        return memory(keys, compute)

    ask("a")
    ask("b")
    ask("a")
    ask("c")
    # Now `b` is the one that was not asked for longest.
    ask("a")
    ask("b")
    assert computed == ["a", "b", "c", "b"]
    # More keys than there is room for.
    assert ask("d", "e", "f").shape == (3, 1)
    assert len(memory) == 2


def test_kept_features_can_be_part_of_a_gradient():
    memory = FeatureMemory(2)
    with torch.inference_mode():
        memory(["a"], lambda positions: torch.ones(1, 3))
    pixels = torch.ones(1, 3, requires_grad=True)
    features = memory(["a"], lambda positions: torch.zeros(1, 3))
    (features * pixels).sum().backward()
    assert torch.equal(pixels.grad, torch.ones(1, 3))

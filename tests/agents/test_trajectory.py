"""Recorded episodes: saved, loaded, joined, and sampled from a replay buffer."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, ReplayBuffer, TensorDictReplayBuffer
from torchrl.data.replay_buffers.samplers import SamplerWithoutReplacement

from agents.objectives.loss import UniGRPOLoss
from agents.trajectory import Trajectory


@pytest.fixture
def variant(short_variant):
    return short_variant("story")


@pytest.fixture
def episodes(small_bagel, variant, collect):
    return collect(small_bagel, variant)


def assert_same(found, expected):
    assert isinstance(found, Trajectory)
    assert found.batch_size == expected.batch_size
    tensors = expected.to_tensordict().flatten_keys("|")
    others = found.to_tensordict().flatten_keys("|")
    assert set(others.keys()) == set(tensors.keys())
    for name, value in tensors.items():
        assert torch.equal(others[name], value), name
        assert others[name].dtype == value.dtype, name


def test_save_and_load(episodes, tmp_path):
    path = episodes.save(tmp_path / "new" / "episodes.safetensors")
    loaded = Trajectory.load(path)
    assert_same(loaded, episodes)
    assert loaded.text_advantage is None


def test_trainer_fields_are_saved(episodes, variant, prepare, tmp_path):
    flat = prepare(episodes, variant, "reward_to_go")
    loaded = Trajectory.load(flat.save(tmp_path / "episodes.safetensors"))
    assert_same(loaded, flat)
    assert loaded.returns.shape == (9, 6)


def test_components_may_have_any_name(episodes, tmp_path):
    names = ("a", "a/b", "a.b", "components.a", "reward", "batch_size", "with space")
    values = {name: torch.rand(3, 3) for name in names}
    episodes.components = TensorDict(values, [3, 3])
    loaded = Trajectory.load(episodes.save(tmp_path / "episodes.safetensors"))
    assert set(loaded.components.keys()) == set(names)
    assert_same(loaded, episodes)


def test_episodes_can_be_joined(episodes, tmp_path):
    loaded = Trajectory.load(episodes.save(tmp_path / "episodes.safetensors"))
    joined = torch.cat([episodes, loaded])
    assert joined.batch_size == (6, 3)
    assert_same(joined[:3], episodes)
    assert_same(joined[3:], episodes)


def test_files_that_hold_no_trajectory(episodes, tmp_path):
    path = tmp_path / "episodes.safetensors"
    with pytest.raises(ValueError, match="expected a safetensors file"):
        Trajectory.load(path)
    episodes.save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        Trajectory.load(path)
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=r"without \['batch_size', 'chosen_mask'.*\['weight'\]"):
        Trajectory.load(path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("weight", torch.zeros(3, 3)),
        ("reward", torch.zeros(2, 3)),
        ("batch_size", torch.tensor([2, 3])),
        ("batch_size", torch.tensor(0.5)),
        ("components.red", torch.zeros(4)),
    ],
)
def test_foreign_tensors_are_refused(episodes, tmp_path, name, value):
    path = episodes.save(tmp_path / "episodes.safetensors")
    save_file({**load_file(path), name: value}, path)
    with pytest.raises(ValueError, match="expected a saved Trajectory"):
        Trajectory.load(path)


def replay_buffer(kind):
    return kind(
        storage=LazyTensorStorage(9), sampler=SamplerWithoutReplacement(shuffle=False), batch_size=9
    )


@pytest.mark.parametrize("kind", ["trajectory", "tensordict"])
def test_replay_buffer_feeds_the_loss(small_bagel, episodes, variant, prepare, kind):
    flat = prepare(episodes, variant)
    loss = UniGRPOLoss.for_variant(small_bagel, variant)
    if kind == "trajectory":
        buffer = replay_buffer(ReplayBuffer)
        buffer.extend(flat)
    else:
        buffer = replay_buffer(TensorDictReplayBuffer)
        buffer.extend(flat.to_tensordict())
    sample = buffer.sample()
    assert isinstance(sample, Trajectory if kind == "trajectory" else TensorDict)
    found = loss(sample)
    expected = loss(flat)
    assert expected["loss_text"] != 0
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


def test_of_leaves_a_trajectory_alone(episodes):
    assert Trajectory.of(episodes) is episodes
    assert_same(Trajectory.of(episodes.to_tensordict()), episodes)

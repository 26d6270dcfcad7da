"""Weights and settings on disk."""

import json

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from agents.storage import (
    check_shapes,
    check_weights,
    load_weights,
    read_config,
    read_json_object,
    read_shapes,
    read_tensors,
    write_json,
    write_tensors,
)


def test_tensors_survive(tmp_path):
    shared = torch.arange(6.0)
    tensors = {"rows": shared.view(2, 3), "columns": shared.view(2, 3).T}
    write_tensors(tensors, tmp_path / "a.safetensors")
    found = read_tensors(tmp_path / "a.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


ALL_KINDS = {
    "double": torch.tensor([1.5, -2.0], dtype=torch.float64),
    "single": torch.tensor(3.25),
    "half": torch.tensor([[0.5]], dtype=torch.float16),
    "brain": torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16),
    "long": torch.tensor([2**40, -1]),
    "int": torch.tensor([7], dtype=torch.int32),
    "short": torch.tensor([-3], dtype=torch.int16),
    "signed": torch.tensor([-5], dtype=torch.int8),
    "byte": torch.tensor([255, 0, 1], dtype=torch.uint8),
    "flag": torch.tensor([True, False]),
    "none": torch.zeros(0, 4),
}


def test_written_file_is_what_the_library_writes(tmp_path):
    write_tensors(ALL_KINDS, tmp_path / "ours")
    save_file(ALL_KINDS, tmp_path / "theirs")
    ours = load_file(tmp_path / "ours")
    theirs = load_file(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        assert torch.equal(ours[name], tensor)


def test_tensors_start_at_multiples_of_their_width(tmp_path):
    path = tmp_path / "a.safetensors"
    write_tensors(ALL_KINDS, path)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert length % 8 == 0
    for name, fields in json.loads(content[8 : 8 + length]).items():
        assert fields["data_offsets"][0] % ALL_KINDS[name].element_size() == 0


def test_writing_copies_nothing(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise AssertionError

    monkeypatch.setattr(torch.Tensor, "clone", refuse)
    shared = torch.arange(6.0)
    write_tensors({"all": shared, "part": shared[2:4]}, tmp_path / "a.safetensors")
    found = load_file(tmp_path / "a.safetensors")
    assert torch.equal(found["part"], torch.tensor([2.0, 3.0]))


def test_file_can_be_read_by_the_group(tmp_path):
    write_tensors(ALL_KINDS, tmp_path / "a.safetensors")
    (tmp_path / "plain").touch()
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_failed_write_of_tensors_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    path.write_text("old")

    def full(specs, part):
        part.write_text("half")
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("agents.storage.serialize_file", full)
    with pytest.raises(OSError, match=r"a\.safetensors could not be written .*No space left"):
        write_tensors(ALL_KINDS, path)
    assert [found.name for found in tmp_path.iterdir()] == ["a.safetensors"]
    assert path.read_text() == "old"


def test_some_tensors_in_another_dtype(tmp_path):
    path = tmp_path / "a.safetensors"
    write_tensors(ALL_KINDS, path)
    found = read_tensors(path, ["brain", "long"], dtype=torch.float32)
    assert found.keys() == {"brain", "long"}
    assert torch.equal(found["brain"], torch.tensor([1.0, 2.0, 3.0]))
    assert found["long"].dtype == torch.int64


def test_tensor_that_the_file_lacks(tmp_path):
    path = tmp_path / "a.safetensors"
    write_tensors({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="does not contain tensor b"):
        read_tensors(path, ["b"])


def test_read_tensors_do_not_depend_on_the_file(tmp_path):
    path = tmp_path / "a.safetensors"
    write_tensors({"a": torch.ones(1000)}, path)
    found = read_tensors(path)["a"]
    path.write_bytes(b"0" * path.stat().st_size)
    assert torch.equal(found, torch.ones(1000))


def test_shapes_of_a_file(tmp_path):
    path = tmp_path / "a.safetensors"
    write_tensors(ALL_KINDS, path)
    shapes = read_shapes(path)
    assert shapes == {name: tuple(tensor.shape) for name, tensor in ALL_KINDS.items()}


@pytest.mark.parametrize("left", [0, 4, 100, -1])
def test_shapes_of_a_file_that_is_cut_off(tmp_path, left):
    path = tmp_path / "a.safetensors"
    with pytest.raises(ValueError, match=r"expected a safetensors file at .*, found none"):
        read_shapes(path)
    write_tensors(ALL_KINDS, path)
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(ValueError, match=r"not a whole safetensors file .*it may be cut off"):
        read_shapes(path)


def test_failed_write_leaves_the_old_file(tmp_path):
    write_json({"a": 1}, tmp_path / "a.json")
    with pytest.raises(TypeError):
        write_json({"a": object()}, tmp_path / "a.json")
    assert read_json_object(tmp_path / "a.json") == {"a": 1}


def test_missing_and_damaged_tensors(tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(ValueError, match=r"expected a safetensors file at .*, found none"):
        read_tensors(path)
    path.write_bytes(b"12345678")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        read_tensors(path)


def test_json_that_is_no_object(tmp_path):
    path = tmp_path / "config.json"
    with pytest.raises(ValueError, match="expected a JSON file"):
        read_json_object(path)
    path.write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        read_json_object(path)
    path.write_text("[1]")
    with pytest.raises(ValueError, match="expected a JSON object"):
        read_config(tmp_path)


def test_folder_without_a_config(tmp_path):
    with pytest.raises(ValueError, match="known built-in model: 'tiny'"):
        read_config(tmp_path)


def test_misfits_are_named():
    module = nn.Linear(2, 3)
    wrong = {"weight": torch.zeros(2, 3), "other": torch.zeros(1)}
    with pytest.raises(ValueError) as caught:
        check_weights(module, wrong, "file")
    message = str(caught.value)
    assert message.startswith("file does not fit this Linear: missing bias; unexpected other; ")
    assert "weight: expected (3, 2), got (2, 3)" in message


def test_misfits_are_named_from_shapes_alone():
    with torch.device("meta"):
        module = nn.Linear(2, 3)
    check_shapes(module, {"weight": [3, 2], "bias": [3]}, "file")
    with pytest.raises(ValueError, match=r"bias: expected \(3,\), got \(4,\)"):
        check_shapes(module, {"weight": [3, 2], "bias": [4]}, "file")


def test_long_list_of_misfits_is_cut():
    weights = {str(number): torch.zeros(1) for number in range(6)}
    with pytest.raises(ValueError, match="and 4 more"):
        check_weights(nn.Linear(2, 3), weights, "file")


def test_misfit_leaves_the_module_unchanged():
    module = nn.Linear(2, 3)
    before = module.weight.clone()
    with pytest.raises(ValueError):
        load_weights(module, {"weight": torch.zeros(3, 2)}, "file")
    assert torch.equal(module.weight, before)

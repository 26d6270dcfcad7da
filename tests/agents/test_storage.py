"""Weights and settings on disk."""

import pytest
import torch
from torch import nn

from agents.storage import (
    check_weights,
    load_weights,
    read_config,
    read_json_object,
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

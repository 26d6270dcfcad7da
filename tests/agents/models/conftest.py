"""Small folders and files in the layout of the released BAGEL."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

RELEASE = Path(__file__).parents[2] / "data" / "bagel_release"


class ReleaseCopy:
    """A copy of the folder in the tests' data, to be changed."""

    def __init__(self, path):
        self.path = shutil.copytree(RELEASE, path)

    def change_json(self, file, **fields):
        """Set fields of a JSON file; None takes one away."""
        path = self.path / file
        fields = json.loads(path.read_text()) | fields
        left = {key: value for key, value in fields.items() if value is not None}
        path.write_text(json.dumps(left))

    def change_weights(self, file="ema.safetensors", **tensors):
        """Set tensors of a file, with `__` for each point of a name; None takes one away."""
        known = load_file(self.path / file)
        known |= {name.replace("__", "."): tensor for name, tensor in tensors.items()}
        left = {name: tensor for name, tensor in known.items() if tensor is not None}
        save_file(left, self.path / file)

    def split(self):
        """Replace the file of weights by three files and an index."""
        parts = [{}, {}, {}]
        index = {}
        for number, (name, tensor) in enumerate(load_file(self.path / "ema.safetensors").items()):
            parts[number % 3][name] = tensor
            index[name] = f"model-{number % 3}.safetensors"
        for number, part in enumerate(parts):
            save_file(part, self.path / f"model-{number}.safetensors")
        text = json.dumps({"metadata": {}, "weight_map": index})
        (self.path / "model.safetensors.index.json").write_text(text)
        (self.path / "ema.safetensors").unlink()


@pytest.fixture
def release_copy(tmp_path):
    """A copy of the folder, with methods that change it."""
    return ReleaseCopy(tmp_path / "release")


@pytest.fixture(scope="session")
def release_weights():
    """What `ema.safetensors` holds."""
    return load_file(RELEASE / "ema.safetensors")


@pytest.fixture(scope="session")
def assert_state():
    """A function that compares a model's state with weights, converted to the model's dtype."""

    def compare(model, weights):
        state = model.state_dict()
        assert state.keys() == weights.keys()
        dtype = model.vae2llm.weight.dtype
        for name, weight in weights.items():
            assert state[name].dtype == dtype
            assert torch.equal(state[name], weight.to(dtype)), name

    return compare


class _Weights(dict):
    """Random weights that are added layer by layer."""

    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def norm(self, name, channels):
        self[f"{name}.weight"] = torch.rand(channels, generator=self.generator) + 0.5
        self[f"{name}.bias"] = torch.randn(channels, generator=self.generator) * 0.1

    def conv(self, name, inputs, outputs, side=3):
        std = (inputs * side**2) ** -0.5
        shape = (outputs, inputs, side, side)
        self[f"{name}.weight"] = torch.randn(shape, generator=self.generator) * std
        self[f"{name}.bias"] = torch.randn(outputs, generator=self.generator) * 0.1

    def block(self, name, inputs, outputs):
        self.norm(f"{name}.norm1", inputs)
        self.conv(f"{name}.conv1", inputs, outputs)
        self.norm(f"{name}.norm2", outputs)
        self.conv(f"{name}.conv2", outputs, outputs)
        if inputs != outputs:
            self.conv(f"{name}.nin_shortcut", inputs, outputs, side=1)

    def middle(self, name, channels):
        self.block(f"{name}.block_1", channels, channels)
        self.norm(f"{name}.attn_1.norm", channels)
        for part in ("q", "k", "v", "proj_out"):
            self.conv(f"{name}.attn_1.{part}", channels, channels, side=1)
        self.block(f"{name}.block_2", channels, channels)


@pytest.fixture(scope="session")
def make_autoencoder():
    """A function of the channels of each level and the blocks a level that gives all weights."""

    def make(channels, blocks, latent=16):
        weights = _Weights()
        last = len(channels) - 1
        weights.conv("encoder.conv_in", 3, channels[0])
        width = channels[0]
        for level, outputs in enumerate(channels):
            for block in range(blocks):
                weights.block(f"encoder.down.{level}.block.{block}", width, outputs)
                width = outputs
            if level != last:
                weights.conv(f"encoder.down.{level}.downsample.conv", width, width)
        weights.middle("encoder.mid", width)
        weights.norm("encoder.norm_out", width)
        weights.conv("encoder.conv_out", width, 2 * latent)
        weights.conv("decoder.conv_in", latent, width)
        weights.middle("decoder.mid", width)
        for level in range(last, -1, -1):
            for block in range(blocks + 1):
                weights.block(f"decoder.up.{level}.block.{block}", width, channels[level])
                width = channels[level]
            if level != 0:
                weights.conv(f"decoder.up.{level}.upsample.conv", width, width)
        weights.norm("decoder.norm_out", width)
        weights.conv("decoder.conv_out", width, 3)
        return dict(weights)

    return make

"""A folder in the layout of the released BAGEL is loaded."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

from agents.models.bagel.config import BagelConfig
from agents.models.bagel.model import Bagel
from agents.models.bagel.release import load_release
from agents.models.bagel.release_files import is_release
from agents.models.bagel.vision import VisionConfig
from agents.models.registry import load_model

FOLDER = Path(__file__).parents[2] / "data" / "bagel_release"
VISION_PREFIXES = ("vit_model.", "connector.", "vit_pos_embed.")
VISION = VisionConfig(
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=3,
    image_size=224,
    patch_size=14,
    max_patches=16,
)
CONFIG = BagelConfig(
    vocab_size=576,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    latent_height=16,
    latent_width=16,
    max_latent_size=16,
    image_start_id=521,
    image_end_id=522,
    vision=VISION,
)
VALID_CONFIG = {"model_type": "bagel", "max_latent_size": 4, "llm_config": {"hidden_size": 1}}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_and_sizes_are_the_folder_s(release_weights, dtype, assert_state):
    model = load_release(FOLDER, dtype=dtype)
    assert isinstance(model, Bagel)
    assert model.config == CONFIG
    assert model.source == str(FOLDER)
    assert_state(model, release_weights)


def test_default_dtype_and_size():
    model = load_model(str(FOLDER))
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    # The largest square of 16 x 16 latent tokens.
    assert model.processor.image_size == (256, 256)
    assert model.latent_shape == model.processor.latent_shape == (256, 64)


def test_class_method_loads_the_same(release_weights):
    model = Bagel.from_release(FOLDER, height=64, width=96, dtype=torch.float32, vision=False)
    assert model.processor.image_size == (64, 96)
    assert model.config.vision is None
    assert torch.equal(model.llm2vae.weight, release_weights["llm2vae.weight"].float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_no_file_holds_is_made_in_full_precision(dtype):
    model = load_release(FOLDER, height=32, width=48, dtype=dtype)
    expected = Qwen2RotaryEmbedding(model.config.qwen2())
    assert model.rotary.inv_freq.dtype == torch.float32
    assert torch.equal(model.rotary.inv_freq, expected.inv_freq)
    assert torch.equal(model.rotary.original_inv_freq, expected.inv_freq)
    assert model.marker_ids.tolist() == [521, 522]
    # Two rows of three tokens in a table with 16 columns.
    assert model.latent_positions.tolist() == [0, 1, 2, 16, 17, 18]
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


@pytest.mark.gpu
def test_weights_are_read_to_the_device(release_weights):
    model = load_release(FOLDER, device="cuda")
    tensors = [*model.parameters(), *model.buffers()]
    assert {tensor.device.type for tensor in tensors} == {"cuda"}
    assert torch.equal(model.llm2vae.weight.cpu(), release_weights["llm2vae.weight"])


def test_position_tables_are_not_trained():
    model = load_release(FOLDER)
    frozen = [name for name, weight in model.named_parameters() if not weight.requires_grad]
    assert frozen == ["latent_pos_embed.pos_embed", "vit_pos_embed.pos_embed"]


def test_image_size():
    model = load_release(FOLDER, height=64, width=96)
    assert (model.config.latent_height, model.config.latent_width) == (4, 6)
    assert model.processor.image_size == (64, 96)
    assert model.latent_shape == model.processor.latent_shape == (24, 64)
    # The vision encoder sees a multiple of 14 pixels a side.
    assert model.processor.pixel_size == (70, 98)


def test_without_vision(release_copy, release_weights, assert_state):
    (release_copy.path / "vit_config.json").unlink()
    model = load_release(release_copy.path, vision=False)
    assert model.config == dataclasses.replace(CONFIG, vision=None)
    assert model.processor.pixel_size is None
    left = {name: w for name, w in release_weights.items() if not name.startswith(VISION_PREFIXES)}
    assert_state(model, left)


def test_weights_without_vision_encoder(release_copy, release_weights):
    lost = [name for name in release_weights if name.startswith(VISION_PREFIXES)]
    release_copy.change_weights(**dict.fromkeys(lost))
    assert load_release(release_copy.path, vision=False).config.vision is None
    with pytest.raises(ValueError, match=r"missing vit_pos_embed\.pos_embed; load it with vision"):
        load_release(release_copy.path)


def test_weights_in_several_files(release_copy, release_weights, assert_state):
    release_copy.split()
    model = load_model(str(release_copy.path))
    assert model.config == CONFIG
    assert_state(model, release_weights)


def test_one_file_comes_before_an_index(release_copy, release_weights, assert_state):
    (release_copy.path / "model.safetensors.index.json").write_text("not read")
    assert_state(load_release(release_copy.path), release_weights)


@pytest.mark.parametrize("text", [None, '{"name": ["x"],}', json.dumps(VALID_CONFIG)])
def test_config_json_makes_no_difference(release_copy, release_weights, text, assert_state):
    (release_copy.path / "config.json").unlink()
    if text is not None:
        (release_copy.path / "config.json").write_text(text)
    model = load_model(str(release_copy.path))
    assert model.config == CONFIG
    assert_state(model, release_weights)


def test_config_json_of_a_saved_model_makes_no_difference(release_copy, small_bagel):
    small_bagel.save_pretrained(release_copy.path)
    assert load_model(str(release_copy.path)).config == CONFIG


@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
def test_rope_theta_under_its_new_key(release_copy, key):
    rope = {"rope_type": "default", "rope_theta": 5e5}
    release_copy.change_json("llm_config.json", rope_theta=None, **{key: rope})
    assert load_release(release_copy.path).config.rope_theta == 5e5


def test_settings_of_the_layers(release_copy):
    release_copy.change_json("llm_config.json", rms_norm_eps=1e-5, hidden_act="gelu")
    release_copy.change_json("vit_config.json", layer_norm_eps=1e-4, hidden_act="relu")
    config = load_release(release_copy.path).config
    assert (config.rms_norm_eps, config.hidden_act) == (1e-5, "gelu")
    assert (config.vision.layer_norm_eps, config.vision.hidden_act) == (1e-4, "relu")


def test_model_runs():
    model = load_release(FOLDER, height=32, width=32)
    with torch.no_grad():
        logits, context = model.append_text(model.empty_context(2), torch.tensor([[513, 5]] * 2))
        velocity = model.predict_velocity(context, torch.randn(2, 4, 64), torch.ones(2))
    assert logits.shape == (2, 2, 576)
    assert velocity.shape == (2, 4, 64)
    assert velocity.isfinite().all()


def test_detection(release_copy, tmp_path):
    assert is_release(release_copy.path)
    (release_copy.path / "llm_config.json").rename(tmp_path / "llm_config.json")
    assert not is_release(release_copy.path)
    assert not is_release(tmp_path)


# Other sizes than those of the folder in the tests' data.

OTHER = BagelConfig(
    vocab_size=600,
    hidden_size=48,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=3,
    rope_theta=2e4,
    latent_height=3,
    latent_width=5,
    max_latent_size=7,
    image_start_id=521,
    image_end_id=522,
    vision=VisionConfig(
        hidden_size=24,
        intermediate_size=20,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=98,
        patch_size=14,
        max_patches=9,
    ),
)


@pytest.fixture
def other(tmp_path, make_autoencoder):
    """Its folder, and the model that the weights were taken from."""
    folder = tmp_path / "other"
    folder.mkdir()
    for name in ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(FOLDER / name, folder)
    save_file(make_autoencoder((32, 64, 64, 64), blocks=2), folder / "ae.safetensors")
    model = Bagel(OTHER).initialise(3, std=0.1).cast_weights(torch.bfloat16)
    with torch.no_grad():
        model.llm2vae.weight.normal_(0, 0.1)
    save_file(model.state_dict(), folder / "ema.safetensors")
    fields = dataclasses.asdict(OTHER)
    (folder / "llm_config.json").write_text(json.dumps(fields | {"vocab_size": 1}))
    fields = dataclasses.asdict(OTHER.vision) | {"num_hidden_layers": 2}
    (folder / "vit_config.json").write_text(json.dumps(fields))
    return folder, model


def test_other_sizes(other, assert_state):
    folder, model = other
    loaded = load_release(folder, height=48, width=80)
    assert loaded.config == OTHER
    assert_state(loaded, model.state_dict())
    image = torch.rand(2, 3, 48, 80)
    latent = loaded.processor.encode_images(image)
    assert latent.shape == (2, 15, 64)
    assert loaded.processor.decode_latents(latent).shape == image.shape
    ids = torch.tensor([[513, 1, 2], [513, 3, 4]])
    outcomes = []
    for each in (model, loaded):
        with torch.no_grad():
            logits, context = each.append_text(each.empty_context(2), ids)
            outcomes += [logits, each.predict_velocity(context, latent, torch.ones(2))]
    assert torch.equal(outcomes[0], outcomes[2])
    assert torch.equal(outcomes[1], outcomes[3])


# Memory.

LARGE = {"hidden_size": 512, "intermediate_size": 8192, "num_hidden_layers": 3}

MEASURE = """
import sys
from pathlib import Path
import torch
from agents.models.bagel.release import load_release

def peak():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024

# Everything is imported and was used once.
load_release(sys.argv[1])
before = peak()
for dtype in (torch.bfloat16, torch.float32):
    model = load_release(sys.argv[2], dtype=dtype)
    print(peak() - before)
    del model
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs Linux")
def test_loading_takes_no_more_than_the_weights(release_copy):
    """Another process, because a process counts its own peak."""
    release_copy.change_json("llm_config.json", **LARGE)
    config = dataclasses.replace(CONFIG, **LARGE)
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in Bagel(config).state_dict().items()}
    # Zeros that were never touched take no memory here.
    zeros = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    save_file(zeros, release_copy.path / "ema.safetensors")
    size = (release_copy.path / "ema.safetensors").stat().st_size
    assert size > 150e6
    command = [sys.executable, "-c", MEASURE, str(FOLDER), str(release_copy.path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    in_bfloat16, in_float32 = map(int, result.stdout.split())
    assert 0.9 * size < in_bfloat16 < 1.1 * size
    assert 1.8 * size < in_float32 < 2.2 * size

"""The aesthetic predictor: its layers are one affine map."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional
from transformers import CLIPModel

from rewards import EpisodeBatch
from rewards.vision.aesthetic import Aesthetic, read_head
from rewards.vision.pixels import Preparation

WIDTH = 24
"""Features of the tiny CLIP model."""


def predictor(width=WIDTH):
    """The layers of the LAION predictor, narrower."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(width, 16),
        nn.Dropout(0.2),
        nn.Linear(16, 12),
        nn.Dropout(0.2),
        nn.Linear(12, 8),
        nn.Dropout(0.1),
        nn.Linear(8, 4),
        nn.Linear(4, 1),
    ).eval()


def tensors_of(layers):
    return {f"layers.{name}": values for name, values in layers.state_dict().items()}


@pytest.fixture
def head(tmp_path):
    """The predictor in a file such as the public one."""
    path = tmp_path / "head.pth"
    torch.save(tensors_of(predictor()), path)
    return str(path)


@pytest.fixture
def images():
    torch.manual_seed(2)
    return (torch.rand(3, 3, 32, 32) * 255).round() / 255


def episodes(images):
    return EpisodeBatch(["a"] * 3, [""] * 3, images, [{}] * 3)


@torch.no_grad()
def test_the_score_is_that_of_the_layers(tiny_clip, head, images):
    prepare = Preparation(
        None, None, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    )
    model = CLIPModel.from_pretrained(tiny_clip)
    features = model.get_image_features(pixel_values=prepare(images)).pooler_output
    expected = predictor()(functional.normalize(features))[:, 0]
    reward = Aesthetic(model=tiny_clip, head=head, device="cpu")
    reward.prepare()
    assert reward(episodes(images)) == pytest.approx(expected, abs=1e-6)
    # No text is read, so that part is not kept.
    assert reward.loaded.network.text_model is None


def test_the_gradient_reaches_the_pixels(tiny_clip, head, images):
    reward = Aesthetic(model=tiny_clip, head=head, device="cpu")
    reward(episodes(images.requires_grad_())).sum().backward()
    assert (images.grad.abs().amax((1, 2, 3)) > 0).all()


def test_a_safetensors_file_may_hold_the_layers_or_the_map(head, tmp_path):
    weight, bias = read_head(head)
    save_file(tensors_of(predictor()), tmp_path / "layers.safetensors")
    save_file({"weight": weight[None], "bias": bias[None]}, tmp_path / "map.safetensors")
    for name in ("layers", "map"):
        again = read_head(tmp_path / f"{name}.safetensors")
        assert torch.equal(again[0], weight)
        assert torch.equal(again[1], bias)


def test_a_predictor_with_activations_is_refused(tmp_path):
    layers = nn.Sequential(nn.Linear(WIDTH, 8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 1))
    torch.save(tensors_of(layers), tmp_path / "relu.pth")
    with pytest.raises(ValueError, match=r"got layers \[0, 3\]"):
        read_head(tmp_path / "relu.pth")


def test_a_file_is_read_without_running_its_code(tmp_path):
    torch.save({"layers.0.weight": predictor()}, tmp_path / "object.pth")
    with pytest.raises(Exception, match="Weights only load failed"):
        read_head(tmp_path / "object.pth")


def test_a_missing_head_is_asked_for(tiny_clip):
    with pytest.raises(ValueError, match=r"needs its option 'head'.*linearMSE\.pth"):
        Aesthetic(model=tiny_clip).prepare()
    with pytest.raises(FileNotFoundError):
        Aesthetic(model=tiny_clip, head="nowhere.pth").prepare()


def test_a_head_of_another_model_is_refused(tiny_clip, tmp_path):
    torch.save(tensors_of(predictor(20)), tmp_path / "head.pth")
    reward = Aesthetic(model=tiny_clip, head=str(tmp_path / "head.pth"), device="cpu")
    with pytest.raises(ValueError, match=r"the 24 features of .*, but it takes 20"):
        reward.prepare()

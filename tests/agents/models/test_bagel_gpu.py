"""What only a GPU can show: low precision there, and that no attention stores its scores."""

import copy

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

pytestmark = pytest.mark.gpu

IDS = torch.tensor([[1, 9, 2, 7], [4, 5, 6, 8]])
MASK = torch.tensor([[True, True, True, True], [True, True, False, False]])
FUSED = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
]


def read(model, mask, device):
    """Text, an image, one token and a velocity; returns logits and velocity."""
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(2, 36, 48, generator=generator).to(device)
    pixels = torch.rand(2, 3, 16, 16, generator=generator).to(device) * 2 - 1
    times = torch.tensor([0.3, 0.9], device=device)
    ids = IDS.to(device)
    if mask is not None:
        mask = mask.to(device)
    _, context = model.append_text(model.empty_context(2), ids, mask)
    context = model.append_image(context, latent, pixels)
    logits, context = model.append_text(context, ids[:, :1])
    return logits, model.predict_velocity(context, latent.flip(1), times)


def relative(found, expected):
    return (found.float().cpu() - expected).norm() / expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask", [None, MASK], ids=["dense", "ragged"])
@pytest.mark.parametrize("grad", [False, True], ids=["cache", "training"])
def test_fused_attention_gives_the_numbers_of_the_cpu(vision_bagel, dtype, mask, grad):
    """Without the kernel that stores all scores, forwards and backwards."""
    expected = read(vision_bagel, mask, "cpu")
    model = copy.deepcopy(vision_bagel).cast_weights(dtype).cuda()
    with sdpa_kernel(FUSED), torch.set_grad_enabled(grad):
        logits, velocity = read(model, mask, "cuda")
        if grad:
            (logits.float().square().mean() + velocity.square().mean()).backward()
    tolerance = {torch.float32: 1e-3, torch.bfloat16: 0.03}[dtype]
    assert logits.dtype == dtype
    assert velocity.dtype == torch.float32
    assert relative(logits, expected[0]) < tolerance
    assert relative(velocity, expected[1]) < tolerance
    if grad:
        weight = model.language_model.model.layers[0].self_attn.k_proj_moe_gen.weight
        assert torch.isfinite(weight.grad).all()
        assert weight.grad.any()

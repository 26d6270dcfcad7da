"""Reading images and drawing after them, against the public reference implementation."""

import pytest
import torch

from unigrpo_env.flow_time import time_grid

TOLERANCE = {"atol": 1e-4, "rtol": 0}


@pytest.mark.parametrize("grad", [False, True], ids=["cache", "training"])
def test_context_of_an_edit(editing_oracle, read_editing, grad):
    with torch.set_grad_enabled(grad):
        logits, _ = read_editing("system", "src", "vit", "instr")
        torch.testing.assert_close(logits[0], editing_oracle["out.instr.logits"], **TOLERANCE)
        logits, context = read_editing("system", "src", "vit", "instr", "thought")
    torch.testing.assert_close(logits[0], editing_oracle["out.thought.logits"], **TOLERANCE)
    # Our contexts hold both markers before an image's tokens, the reference has one on each side.
    latents = [8, *range(10, 34), 9]
    patches = [34, *range(36, 71), 35]
    order = [*range(8), *latents, *patches, *range(71, 90)]
    assert sorted(order) == list(range(90))
    for layer in range(2):
        for name, stored in (("k", context.keys), ("v", context.values)):
            found = stored[layer][0, :, : context.size].transpose(0, 1)[torch.tensor(order)]
            expected = editing_oracle[f"out.context.{name}.{layer}"]
            torch.testing.assert_close(found, expected, **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "segments"),
    [
        ("gen", ("system", "src", "vit", "instr", "thought")),
        ("novit", ("system", "src", "novit_instr")),
    ],
)
def test_velocities_after_a_source(editing_model, editing_oracle, read_editing, name, segments):
    _, context = read_editing(*segments)
    velocity = editing_model.predict_velocity(
        context.repeat_interleave(5),
        editing_oracle[f"in.{name}.x_t"],
        editing_oracle[f"in.{name}.t"],
    )
    torch.testing.assert_close(velocity, editing_oracle[f"out.{name}.v"], **TOLERANCE)
    expected = editing_oracle[f"out.{name}.sample_x"]
    times = time_grid(6, shift=3.0)
    x = editing_oracle[f"in.{name}.noise"][None]
    for step in range(6):
        torch.testing.assert_close(x[0], expected[step], **TOLERANCE)
        velocity = editing_model.predict_velocity(context, x, times[step : step + 1])
        x = x + velocity * (times[step + 1] - times[step])
    torch.testing.assert_close(x[0], expected[6], **TOLERANCE)


@torch.no_grad()
def test_rows_outside_the_mask_read_no_image(small_bagel):
    ids = torch.tensor([[1, 7, 8], [1, 9, 5]])
    more = torch.tensor([[10], [11]])
    latent = torch.randn(2, 36, 48)
    mask = torch.tensor([True, False])
    _, context = small_bagel.append_text(small_bagel.empty_context(2), ids)
    context = small_bagel.append_image(context, latent, mask=mask)
    logits, _ = small_bagel.append_text(context, more)
    for row in range(2):
        one = slice(row, row + 1)
        _, alone = small_bagel.append_text(small_bagel.empty_context(1), ids[one])
        if mask[row]:
            alone = small_bagel.append_image(alone, latent[one])
        own, _ = small_bagel.append_text(alone, more[one])
        torch.testing.assert_close(own[0], logits[row], atol=2e-5, rtol=0)


def test_image_without_gradient_keeps_text_gradient(small_bagel):
    _, context = small_bagel.append_text(small_bagel.empty_context(1), torch.tensor([[1, 9, 2]]))
    context = small_bagel.append_image(context, torch.randn(1, 36, 48), with_grad=False)
    logits, _ = small_bagel.append_text(context, torch.tensor([[5]]))
    logits.square().sum().backward()
    embedding = small_bagel.language_model.model.embed_tokens.weight
    assert embedding.grad[9].any(), "the text before the image keeps its gradient"
    assert small_bagel.vae2llm.weight.grad is None


def test_neither_latent_nor_pixels(small_bagel):
    with pytest.raises(ValueError, match="got neither"):
        small_bagel.append_image(small_bagel.empty_context(1))

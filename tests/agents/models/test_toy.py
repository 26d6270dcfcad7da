"""The smallest model."""

import torch

from agents.models.toy import ToyModel, gaussian_velocity


def test_velocity_of_a_point_is_noise_minus_image():
    mean = torch.full((2, 1, 3), 2.0)
    noise = torch.randn(2, 1, 3)
    t = torch.tensor([0.3, 0.8])
    x = (1 - t)[:, None, None] * mean + t[:, None, None] * noise
    torch.testing.assert_close(gaussian_velocity(x, t, mean, 0.0), noise - mean)


def test_marks_are_no_words():
    model = ToyModel()
    _, context = model.append_text(model.empty_context(1), torch.tensor([[4, 1]]))
    assert context.word.tolist() == [4]
    assert context.last.tolist() == [1]


def test_new_model_is_uniform_and_grey():
    model = ToyModel()
    logits, context = model.append_text(model.empty_context(1), torch.tensor([[4, 1]]))
    assert not logits.any()
    x = torch.zeros(1, *model.latent_shape)
    assert not model.predict_velocity(context, x, torch.tensor([0.5])).any()

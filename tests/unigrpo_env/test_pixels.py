"""Images as a vision encoder sees them, beside their latents."""

import pytest
import torch
from torch.nn.functional import interpolate

from agents.policy.segments import image_inputs
from unigrpo_env.env import InterleavedGenEnv
from unigrpo_env.tasks.shapes.processor import ShapesProcessor
from unigrpo_env.tasks.task import Prompt
from unigrpo_env.variants.variant import make_variant
from unigrpo_env.vector_env import InterleavedGenVectorEnv


class SeeingProcessor(ShapesProcessor):
    """A vision encoder sees images at half their size; sources of any size are taken."""

    pixel_size = (12, 12)
    scenario_defaults = {"text_budget": 7, "turn_budget": 9, "image_steps": 2}

    def fit_source(self, image):
        return interpolate(image[None], self.image_size)[0]

    def view_images(self, images):
        return (interpolate(images, self.pixel_size) * 255).byte()

    def system_prompt(self, *, thinks, draws):
        if not thinks:
            return ""
        return "a red circle" if draws else "a blue square"


def seen(name, **settings):
    return make_variant(name, processor=SeeingProcessor(), prompt_budget=32, **settings)


def test_a_source_is_fitted_read_and_seen():
    env = InterleavedGenVectorEnv(seen("edit"), 2)
    processor = env.episodes.processor
    prompt = Prompt("remove the circle", sources=(torch.rand(3, 40, 30),))
    observation, infos = env.reset(seed=0, options={"prompts": [prompt, prompt]})
    fitted = infos["prompts"][0].sources[0]
    assert fitted.shape == (3, 24, 24)
    assert torch.equal(observation["images"][1], processor.encode_images(fitted[None]))
    assert torch.equal(observation["pixels"][1], processor.view_images(fitted[None]))


def test_a_drawn_image_is_seen():
    env = InterleavedGenVectorEnv(seen("story", text_budget=0), 2)
    observation, _ = env.reset(seed=0)
    for _ in range(2):
        latent = observation["latent"] * 0.5
        actions = {"token": torch.zeros(2, dtype=torch.long), "next_latent": latent}
        observation, *_ = env.step(actions, torch.tensor([True, False]))
    processor = env.episodes.processor
    expected = processor.view_images(processor.decode_latents(latent))
    assert torch.equal(observation["pixels"][0, 0], expected[0])
    assert not observation["pixels"][1].any()


def test_an_image_that_is_only_understood_has_no_latent():
    env = InterleavedGenVectorEnv(seen("edit", image_budget=0), 1)
    prompt = Prompt("a circle", sources=(torch.rand(3, 24, 24),))
    observation, _ = env.reset(seed=0, options={"prompts": [prompt]})
    assert observation["images"].shape == (1, 1, 0, 48)
    latent, pixels = image_inputs(observation["images"][:, 0], observation["pixels"][:, 0])
    assert latent is None
    assert pixels.shape == (1, 3, 12, 12)
    assert pixels.min() >= -1
    assert pixels.max() <= 1
    assert env.episodes.all_images([0])[0].shape == (0, 3, 24, 24)
    assert env.render() is None


def test_spaces_hold_the_pixels():
    env = InterleavedGenEnv(seen("edit"))
    prompt = Prompt("a circle", sources=(torch.rand(3, 24, 24),))
    observation, _ = env.reset(seed=0, options={"prompt": prompt})
    assert observation in env.observation_space
    assert observation["pixels"].dtype.name == "uint8"


def test_a_backbone_brings_budgets_and_system_text():
    variant = seen("dialogue")
    assert variant.rules.text_budget == 7
    assert variant.rules.turn_budget == 9
    assert variant.rules.image_steps == 2
    assert variant.system_prompt == "a red circle"
    assert seen("edit").rules.turn_budget == 0, "no user speaks"
    assert seen("edit", text_budget=3).rules.text_budget == 3, "the user's setting wins"
    assert seen("edit", text_budget=0).system_prompt == ""
    assert seen("edit", image_budget=0).system_prompt == "a blue square"
    assert seen("edit", system_prompt="").system_prompt == ""


def test_spaces_are_made_when_they_are_asked_for():
    env = InterleavedGenVectorEnv("text_to_image", 2)
    assert "observation_space" not in vars(env)
    assert env.observation_space is env.observation_space


def test_a_processor_without_resizing_refuses_other_sizes():
    env = InterleavedGenVectorEnv("edit", 1)
    prompt = Prompt("a circle", sources=(torch.rand(3, 40, 30),))
    with pytest.raises(ValueError, match=r"\[3, 24, 24\].*got \[3, 40, 30\]"):
        env.reset(seed=0, options={"prompts": [prompt]})

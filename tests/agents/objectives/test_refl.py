"""ReFL's reward: the gradient leads back to latents, and what has no score is left out."""

import pytest
import torch

from agents.objectives.refl import LatentScore
from rewards import REWARDS, Failures, Scores, UnscoredError
from unigrpo_env.tasks.task import Prompt
from unigrpo_env.variants.variant import make_variant

PROMPTS = [Prompt("dark"), Prompt("light")]


def make_score(reward, max_unscored=0.5):
    variant = make_variant("toy", reward=reward)
    score = LatentScore(variant, "", max_unscored)
    score.prompts = PROMPTS
    return score


def random_latents(rows=4):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, 1, 12, generator=generator).requires_grad_()


def brightness(episodes):
    return episodes.images.mean((1, 2, 3))


def every_other(episodes):
    rows = torch.arange(len(episodes))
    return torch.where(rows % 2 == 0, torch.nan, 1) * brightness(episodes)


def test_gradient_is_that_of_the_reward():
    latents = random_latents()
    found = make_score(brightness)(latents, torch.tensor([0, 0, 1, 1]))
    images = make_variant("toy").processor.decode_latents(latents)
    torch.testing.assert_close(found, images.mean((1, 2, 3)))
    (gradient,) = torch.autograd.grad(found.sum(), latents, retain_graph=True)
    (expected,) = torch.autograd.grad(images.mean((1, 2, 3)).sum(), latents)
    torch.testing.assert_close(gradient, expected)


def test_prompts_are_those_of_the_groups():
    seen = []

    def note_prompts(episodes):
        seen.append((list(episodes.prompts), list(episodes.texts)))
        return brightness(episodes)

    make_score(note_prompts)(random_latents(3), torch.tensor([1, 0, 1]))
    assert seen == [(["light", "dark", "light"], [""] * 3)]


def test_what_has_no_score_counts_zero():
    def half(episodes):
        value = brightness(episodes)
        return torch.where(value > 0.5, torch.nan, 1) * value

    latents = random_latents()
    found = make_score(half, max_unscored=0.9)(latents, torch.zeros(4, dtype=torch.long))
    found.sum().backward()
    assert found.isfinite().all()
    assert latents.grad.isfinite().all()
    unscored = found == 0
    assert unscored.any()
    assert not unscored.all()
    assert not latents.grad[unscored].any()
    assert latents.grad[~unscored].any()


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_too_many_without_a_score(share):
    reward = every_other if share < 1 else lambda episodes: [torch.nan] * len(episodes)
    score = make_score(reward, max_unscored=share)
    with pytest.raises(UnscoredError, match="of 4 images could not be scored by refl's reward"):
        score(random_latents(), torch.zeros(4, dtype=torch.long))


def test_reward_without_a_gradient():
    variant = make_variant("text_to_image")
    score = LatentScore(variant, "shapes_score", 1.0)
    score.prompts = variant.task.prompts("train", 1, 0)
    latents = torch.rand(2, 36, 48).requires_grad_()
    with pytest.raises(ValueError, match="differentiable reward for refl, got 'shapes_score'"):
        score(latents, torch.zeros(2, dtype=torch.long))


def test_named_reward_comes_first():
    variant = make_variant("text_to_image", reward="shapes")
    assert LatentScore(variant, "soft_shapes", 1.0).name == "soft_shapes"
    assert LatentScore(variant, "", 1.0).name == "shapes"


def failing(episodes):
    values = every_other(episodes)
    errors = [TimeoutError("no answer")] * int(values.isnan().sum())
    return Scores(values, failures=Failures.of(errors))


def test_failures_are_the_cause():
    score = make_score(failing, max_unscored=0.4)
    groups = torch.zeros(4, dtype=torch.long)
    message = "2 of 4 images could not be scored .* 2 x failing: TimeoutError; the first: no answer"
    with pytest.raises(UnscoredError, match=message) as error:
        score(random_latents(), groups)
    assert isinstance(error.value.__cause__, TimeoutError)
    score.begin(8)
    score(random_latents(3), groups[:3])
    with pytest.raises(UnscoredError, match=r"4 of 8 .* 4 x failing: TimeoutError"):
        score(random_latents(4), groups)
    score.begin(8)
    score(random_latents(4), groups)


def test_refl_reward_has_the_options_of_the_variant(monkeypatch):
    class Scaled:
        def __init__(self, *, factor=1.0):
            self.factor = factor

        def __call__(self, episodes):
            return self.factor * brightness(episodes)

    monkeypatch.setattr(REWARDS, "_entries", {**REWARDS._entries, "scaled": Scaled})
    variant = make_variant("toy", reward_options={"scaled": {"factor": 0.0}})
    score = LatentScore(variant, "scaled", 1.0)
    score.prompts = PROMPTS
    assert not score(random_latents(), torch.zeros(4, dtype=torch.long)).any()

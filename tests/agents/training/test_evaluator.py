"""A model is measured without anything that only training needs."""

import pytest
import torch

from agents.config.loading import load_config
from agents.training.evaluator import Evaluator
from agents.training.trainer import Trainer

WORDS = ["env=toy", "model=toy", "env.text_budget=2", "evaluation.prompts=6"]


def test_evaluator_measures_what_a_trainer_measures():
    found = Evaluator(load_config(WORDS)).evaluate()
    expected = Trainer(load_config(WORDS)).evaluate()
    assert torch.equal(found.reward, expected.reward)
    assert found.thoughts == expected.thoughts


def test_evaluator_holds_the_model_alone():
    """A large model fits where its copies do not."""
    evaluator = Evaluator(load_config([*WORDS, "model.dtype=bfloat16"]))
    assert {"model", "processor", "variant"} <= vars(evaluator).keys()
    assert not {"optimization", "reference", "loss"} & vars(evaluator).keys()


def test_batch_size_changes_no_result(small_bagel):
    words = ["evaluation.prompts=5", "env.text_budget=4", "env.image_steps=3"]
    found = []
    for size in (256, 2):
        evaluator = Evaluator(load_config([*words, f"evaluation.batch_size={size}"]), small_bagel)
        found.append(evaluator.evaluate())
    assert found[0].thoughts == found[1].thoughts
    for one, other in zip(found[0].all_images, found[1].all_images, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


def test_batch_size_is_that_of_the_settings(small_bagel, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "agents.training.evaluator.evaluate",
        lambda *arguments, **options: seen.append(options["batch_size"]),
    )
    Evaluator(load_config(["evaluation.batch_size=7"]), small_bagel).evaluate()
    assert seen == [7]


def test_model_must_fit():
    words = ["model=toy", "env.processor=shapes"]
    with pytest.raises(ValueError, match="ToyModel does not fit the scenario"):
        Evaluator(load_config(words))

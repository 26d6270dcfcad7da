"""Held-out accuracy."""

import pytest
import torch

from agents.evaluation import accuracy
from agents.evaluation.accuracy import Evaluation, evaluate
from agents.policy.actor import Actor
from unigrpo_env.episodes import Episodes
from unigrpo_env.tasks.task import Prompt
from unigrpo_env.variants.variant import make_variant


def two_episodes():
    """The first drew two images, the second none; the second could not be scored."""
    prompts = [Prompt("a", {"kind": "one"}), Prompt("b", {"kind": "two"})]
    images = [torch.stack([torch.zeros(3, 4, 4), torch.ones(3, 4, 4)]), torch.zeros(0, 3, 4, 4)]
    reward = torch.tensor([0.5, torch.nan])
    thoughts = [["first", "second"], ["only"]]
    return Evaluation(prompts, thoughts, images, reward, {"part": reward})


def test_accuracy_leaves_out_unscored_episodes():
    found = two_episodes()
    assert found.accuracy == 0.5
    assert found.by("kind")["one"] == 0.5


def test_last_image_or_black():
    images = two_episodes().images
    assert images.shape == (2, 3, 4, 4)
    assert images[0].min() == 1
    assert images[1].max() == 0


def test_means_are_of_several_parts():
    found = two_episodes()
    assert found.means == {}
    found.components["other"] = torch.tensor([1.0, 0.0])
    assert found.means == {"part": 0.5, "other": 0.5}


def test_by_a_missing_key_is_empty():
    assert two_episodes().by("colour") == {}


def test_texts_join_thoughts():
    first, second = two_episodes().texts
    assert "first" in first
    assert "second" in first
    assert second == "only"


def test_no_prompts_are_refused(small_bagel):
    with pytest.raises(ValueError, match="at least one prompt"):
        evaluate(small_bagel, make_variant("text_to_image"), [])


@pytest.mark.parametrize("name", ["text_to_image", "edit", "reflect", "story", "dialogue"])
def test_batch_size_changes_no_episode(small_bagel, name):
    variant = make_variant(name, text_budget=5, image_steps=2)
    prompts = variant.task.prompts("test", 6, 0)
    whole = evaluate(small_bagel, variant, prompts, seed=5)
    parts = evaluate(small_bagel, variant, prompts, seed=5, batch_size=4)
    assert whole.thoughts == parts.thoughts
    assert whole.prompts == parts.prompts
    for first, second in zip(whole.all_images, parts.all_images, strict=True):
        torch.testing.assert_close(first, second, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(whole.reward, parts.reward, equal_nan=True)


def test_image_steps_replace_the_variant_own(small_bagel):
    variant = make_variant("text_to_image", text_budget=3, image_steps=2)
    prompts = variant.task.prompts("test", 2, 0)
    own = evaluate(small_bagel, variant, prompts)
    same = evaluate(small_bagel, variant, prompts, image_steps=2)
    more = evaluate(small_bagel, variant, prompts, image_steps=5)
    assert torch.equal(own.images, same.images)
    assert not torch.equal(own.images, more.images)


def test_seed_changes_the_episodes(small_bagel):
    variant = make_variant("text_to_image", text_budget=5, image_steps=2)
    prompts = variant.task.prompts("test", 2, 0)
    first = evaluate(small_bagel, variant, prompts, seed=1)
    again = evaluate(small_bagel, variant, prompts, seed=1)
    other = evaluate(small_bagel, variant, prompts, seed=2)
    assert torch.equal(first.images, again.images)
    assert not torch.equal(first.images, other.images)


def test_greedy_text_depends_on_no_seed(small_bagel):
    variant = make_variant("text_to_image", text_budget=5, image_steps=2)
    prompts = variant.task.prompts("test", 3, 0)
    texts = [evaluate(small_bagel, variant, prompts, temperature=0.0, seed=s).texts for s in (1, 2)]
    assert texts[0] == texts[1]


def test_the_context_is_gone_when_images_are_decoded(small_bagel, monkeypatch):
    variant = make_variant("story", text_budget=5, image_steps=2)
    prompts = variant.task.prompts("test", 3, 0)
    actors = []
    is_gone = []
    all_images = Episodes.all_images

    def make_actor(*arguments, **settings):
        actors.append(Actor(*arguments, **settings))
        return actors[-1]

    def note(episodes, rows):
        is_gone.append(actors[-1].cache.context is None)
        return all_images(episodes, rows)

    monkeypatch.setattr(accuracy, "Actor", make_actor)
    monkeypatch.setattr(Episodes, "all_images", note)
    evaluate(small_bagel, variant, prompts)
    # The reward decodes while the episodes are played; the last call is for the result.
    assert is_gone[-1]

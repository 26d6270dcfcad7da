"""Lessons of every scenario: what they show, and that supervised training reads them as the env would lay them out."""

import re

import pytest
import torch

from agents.actor import Actor
from agents.evaluation import evaluate
from agents.models import load_model
from agents.supervised import COURSES, SupervisedSettings, supervised_losses, teach, teacher, train_supervised
from rewards import WeightedReward
from rewards.shapes import RIGHT, WRONG, read, read_words
from unigrpo_env.mdp import Phase
from unigrpo_env.shapes_world import shapes_tokenizer
from unigrpo_env.tasks import episodes_of
from unigrpo_env.variants import make_variant
from unigrpo_env.vector import InterleavedGenVectorEnv

SCENARIOS = ["text_to_image", "edit", "reflect", "story", "dialogue"]


def measure(name):
    variant = make_variant(name)
    return variant, WeightedReward("reflect" if name == "reflect" else variant.reward)


@pytest.mark.parametrize("name", SCENARIOS)
def test_clean_lessons_are_right_and_habits_are_not(name):
    variant, reward = measure(name)
    clean, habitual = (reward(episodes_of(teacher(variant).lessons(300, 7, clean=clean))).reward.mean() for clean in (True, False))
    assert clean == 1
    assert 0.05 < habitual < (0.95 if name == "reflect" else 0.55)
    drills = teacher(variant).drills(50, 7)
    if name != "text_to_image":  # free layouts under an open prompt: nothing is asked that could be judged
        assert reward(episodes_of(drills)).reward.mean() == 1


@pytest.mark.parametrize("name", SCENARIOS)
def test_lessons_fit_the_budgets_and_are_in_words_that_are_known(name):
    variant, tokenizer = make_variant(name), shapes_tokenizer()
    rules = variant.rules
    for lesson in teacher(variant).lessons(200, 1):
        assert 1 <= len(lesson.pictures) <= rules.image_budget
        assert len(lesson.thoughts) - len(lesson.pictures) in ((0, 1) if rules.end_id else (0,))
        for text in (lesson.prompt.text, *lesson.prompt.turns, *lesson.thoughts):
            ids = tokenizer.encode(text, add_special_tokens=False)
            assert tokenizer.unk_token_id not in ids
        for text in lesson.thoughts:
            ids = tokenizer.encode(text, add_special_tokens=False)
            assert len(ids) < rules.text_budget
            assert not set(ids) & set(rules.forbidden_ids)


def test_a_habit_of_reflection_is_to_be_content_with_what_was_planned():
    lessons = teacher(make_variant("reflect")).lessons(500, 3)
    parts = WeightedReward("reflect")(episodes_of(lessons)).components
    first, kept, content = (parts[f"reflect/{name}"] == 1 for name in ("first", "kept", "content"))
    assert 0.15 < content.sum() / (~first).sum() < 0.4, "many wrong pictures are called right"
    assert 0.8 < kept.sum() / first.sum() < 1, "and few right ones wrong"
    as_planned = [
        read_words(lesson.thoughts[-2]) == read(lesson.pictures[-1:])[0].tolist() for lesson, it in zip(lessons, content, strict=True) if it
    ]
    assert sum(as_planned) > 0.8 * len(as_planned)
    assert parts["reflect"].mean() > parts["reflect/first"].mean() + 0.15


def test_drills_of_reflection_tell_right_from_wrong():
    drills = teacher(make_variant("reflect")).drills(500, 3)
    parts = WeightedReward("reflect")(episodes_of(drills)).components
    assert 0.3 < parts["reflect/first"].mean() < 0.7, "both are seen"
    assert parts["reflect"].mean() == 1
    assert torch.equal(parts["reflect/kept"], parts["reflect/first"])
    for drill in drills:
        for words, seen in zip(drill.thoughts[1:], read(drill.pictures).tolist(), strict=False):
            told = re.split(f"{RIGHT}|{WRONG}", words)[0].strip()
            assert read_words(told) == (seen if any(seen) else None), "what it says of a picture is what the picture shows"


@torch.no_grad()
def walk(model, variant, lesson, t, noise):
    """A lesson forced through the env: cross-entropy of its words, by the actor's own logits, and the velocity error at (t, noise)."""
    env = InterleavedGenVectorEnv(variant, 1)
    actor = Actor(model)
    observation, _ = env.reset(seed=0, options={"prompts": [lesson.prompt]})
    actor.start([0])
    tokenizer = variant.tokenizer
    words = [tokenizer.encode(text, add_special_tokens=False) for text in lesson.thoughts if text is not None]
    words = [ids + [tokenizer.eos_token_id] * (number < len(lesson.pictures)) for number, ids in enumerate(words)]
    spoken = iter(token for ids in words for token in ids)
    losses, errors = [], []
    while observation["phase"] != Phase.DONE:
        number = int(env.episodes.state.images_drawn)
        actor.act(observation)
        token, latent = 0, variant.decode.encode(lesson.pictures[min(number, len(lesson.pictures) - 1)][None])
        if observation["phase"] == Phase.TEXT:
            token = next(spoken)
            losses.append(-actor._logits[0, 0].log_softmax(-1)[token])
        elif observation["step"] == 0:
            level = t[number]
            noisy = (1 - level) * latent + level * noise[number]
            velocity = model.velocity(actor._context, noisy, level[None])
            errors.append(((velocity - (noise[number] - latent)) ** 2).mean())
        observation, *_ = env.step({"token": torch.tensor([token]), "latent": latent})
    assert next(spoken, None) is None
    return losses, errors


@pytest.mark.parametrize(
    ("name", "part", "least"),
    [("text_to_image", "", 0.3), ("edit", "", 0.2), ("reflect", "", 0.5), ("story", "", 0.2), ("dialogue", "dialogue/score", 0.4)],
)
def test_the_shipped_weights_know_every_scenario(name, part, least):
    """A guard, well below what they reach: other weights, or a change of the numbers, would fall through."""
    variant = make_variant(name)
    found = evaluate(load_model("tiny"), variant, variant.task.prompts("test", 64, 1_000_000), temperature=0.0)
    assert (found.means[part] if part else found.accuracy) > least


@pytest.mark.parametrize(
    ("name", "thinking"),
    [(name, thinking) for thinking in (True, False) for name in SCENARIOS if thinking or name != "reflect"],  # without words nobody stops
)
def test_a_batch_of_ragged_lessons_is_what_the_env_would_have_shown(name, thinking):
    model, variant = load_model("tiny"), make_variant(name, image_steps=1, **({} if thinking else {"text_budget": 0}))
    lessons = teacher(variant).lessons(5, 2)
    if not thinking:
        lessons = [lesson.silent() for lesson in lessons]
    latents = variant.decode.encode(torch.cat([lesson.pictures for lesson in lessons]))
    generator = torch.Generator().manual_seed(0)
    t, noise = torch.rand(len(latents), generator=generator), torch.randn(latents.shape, generator=generator)
    with torch.no_grad():
        text, image = supervised_losses(model, variant, lessons, latents, t, noise)
    losses, errors, at = [], [], 0
    for lesson in lessons:
        end = at + len(lesson.pictures)
        words, pictures = walk(model, variant, lesson, t[at:end], noise[at:end])
        losses, errors, at = losses + words, errors + pictures, end
    torch.testing.assert_close(text, torch.stack(losses).mean() if thinking else torch.tensor(0.0), atol=1e-4, rtol=0)
    torch.testing.assert_close(image, torch.stack(errors).mean(), atol=1e-4, rtol=0)


def test_scenarios_side_by_side_are_one_batch(small_bagel):
    """The gradient of a mixed batch is that of its parts, weighted by their tokens and pictures."""
    variants = [make_variant(name) for name in SCENARIOS]
    lessons = [lesson for variant in variants for lesson in teacher(variant).lessons(2, 0)]
    lessons[0], lessons[3] = lessons[0].unprompted(), lessons[3].silent()
    latents = variants[0].decode.encode(torch.cat([lesson.pictures for lesson in lessons]))
    t, noise = torch.rand(len(latents)), torch.randn(latents.shape)
    _, image = supervised_losses(small_bagel, variants[0], lessons, latents, t, noise)
    parts, at = [], 0
    for lesson in lessons:
        here = slice(at, at + len(lesson.pictures))
        parts.append(supervised_losses(small_bagel, variants[0], [lesson], latents[here], t[here], noise[here])[1] * len(lesson.pictures))
        at = here.stop
    torch.testing.assert_close(image, torch.stack(parts).sum() / len(latents), atol=1e-5, rtol=0)


def test_training_lowers_both_losses_in_every_scenario(small_bagel):
    scenarios = [(make_variant(name), share) for name, share in COURSES["rounds"].scenarios.items()]
    generator = torch.Generator().manual_seed(0)

    def losses(variant):
        with torch.no_grad():
            return torch.stack(teach(small_bagel, variant, teacher(variant).lessons(8, 999), generator.manual_seed(0), 3.0))

    before = [losses(variant) for variant, _ in scenarios]
    train_supervised(small_bagel, scenarios, SupervisedSettings(steps=25, batch_size=16, warmup=5))
    for variant, old in zip([variant for variant, _ in scenarios], before, strict=True):
        assert (losses(variant) < 0.9 * old).all()


def test_what_cannot_teach_says_so():
    variant = make_variant("text_to_image", task=type("Silent", (), {"prompts": None})())
    with pytest.raises(ValueError, match="expected a task with lessons"):
        train_supervised(load_model("tiny"), [(variant, 1.0)], SupervisedSettings(steps=1))

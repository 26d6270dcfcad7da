"""Supervised training in stages, and the weights that came of it."""

import pytest
import torch

from agents.evaluation.accuracy import evaluate
from agents.models.registry import load_model
from agents.models.toy import ToyModel
from agents.training.pretraining import SHIPPED, STAGES, SupervisedSettings, train_supervised
from agents.training.supervised import sample_losses
from unigrpo_env.tasks.task import Demonstration, Prompt
from unigrpo_env.variants.variant import make_variant

# Well below what the shipped weights reach: other weights, or a change of the numbers, would fall
# through. Without a name it is the accuracy, else that part of the reward.
ACCURACY = [
    ("text_to_image", "", 0.3),
    ("edit", "", 0.2),
    ("reflect", "", 0.5),
    ("story", "", 0.2),
    ("dialogue", "dialogue/score", 0.4),
]


class CountingTask:
    """Notes what it is asked for; its demonstrations are numbered by their prompts."""

    def __init__(self):
        self.asked = []

    def prompts(self, split, count, seed):
        return [Prompt("dark")] * count

    def demonstrations(self, count, seed, *, clean=False):
        self.asked.append(("usual", count, seed, clean))
        return [Demonstration(Prompt("dark"), ("dark",), torch.zeros(1, 3, 2, 2))] * count

    def warmup_demonstrations(self, count, seed):
        self.asked.append(("warmup", count, seed))
        return [Demonstration(Prompt("dark"), ("light",), torch.zeros(1, 3, 2, 2))] * count


@pytest.fixture
def batches(monkeypatch):
    """The demonstrations of each update, in place of their losses."""
    found = []

    def note_batch(model, variant, batch, generator, time_shift):
        found.append(list(batch))
        loss = sum(weight.sum() for weight in model.parameters())
        return loss, loss

    monkeypatch.setattr("agents.training.pretraining.sample_losses", note_batch)
    return found


def settings(**changes):
    return SupervisedSettings(**({"steps": 4, "batch_size": 8, "warmup": 2} | changes))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "part", "least"), ACCURACY)
def test_shipped_weights_know_every_scenario(name, part, least):
    variant = make_variant(name)
    prompts = variant.task.prompts("test", 32, 1_000_000)
    found = evaluate(load_model("tiny"), variant, prompts, temperature=0.0)
    accuracy = found.means[part] if part else found.accuracy
    assert accuracy > least


@pytest.mark.slow
def test_training_lowers_both_losses(small_bagel):
    scenarios = []
    for name, share in STAGES["rounds"].scenarios.items():
        scenarios.append((make_variant(name), share))

    @torch.no_grad()
    def losses(variant):
        generator = torch.Generator().manual_seed(0)
        demonstrations = variant.task.demonstrations(8, 999)
        return torch.stack(sample_losses(small_bagel, variant, demonstrations, generator, 3.0))

    before = [losses(variant) for variant, _ in scenarios]
    train_supervised(small_bagel, scenarios, settings(steps=25, batch_size=16, warmup=5))
    for (variant, _), loss in zip(scenarios, before, strict=True):
        assert (losses(variant) < 0.9 * loss).all(), variant.reward


def test_warmup_demonstrations_come_first(batches):
    task = CountingTask()
    variant = make_variant("toy", task=task)
    options = settings(warmup_share=0.5, condition_dropout=0.0, clean=True, seed=3)
    train_supervised(ToyModel(), [(variant, 1.0)], options, first_demonstration=100)
    number = 3_000_100
    assert task.asked == [
        ("usual", 2, number, True),
        ("warmup", 6, number),
        ("usual", 2, number + 1, True),
        ("warmup", 6, number + 1),
        ("usual", 8, number + 2, True),
        ("usual", 8, number + 3, True),
    ]
    assert [len(batch) for batch in batches] == [8] * 4


def test_scenarios_have_their_shares(batches):
    tasks = [CountingTask(), CountingTask(), CountingTask()]
    scenarios = []
    for task, share in zip(tasks, (0.7, 0.3, 0.01), strict=True):
        scenarios.append((make_variant("toy", task=task), share))
    train_supervised(ToyModel(), scenarios, settings(batch_size=10, warmup_share=0.0))
    counts = [task.asked[0][1] for task in tasks]
    assert counts == [7, 3, 1], "at least one of each"


@pytest.mark.parametrize(
    ("change", "prompts", "thoughts"),
    [
        ({"condition_dropout": 1.0}, {None}, {None}),
        ({"condition_dropout": 0.0, "text_dropout": 1.0}, {"dark"}, {None}),
        ({"condition_dropout": 0.0}, {"dark"}, {"dark"}),
    ],
)
def test_dropout_of_prompt_and_text(batches, change, prompts, thoughts):
    variant = make_variant("toy", task=CountingTask())
    train_supervised(ToyModel(), [(variant, 1.0)], settings(warmup_share=0.0, **change))
    shown = [demonstration for batch in batches for demonstration in batch]
    assert {each.prompt and each.prompt.text for each in shown} == prompts
    assert {thought for each in shown for thought in each.thoughts} == thoughts


def test_warmup_demonstrations_keep_their_text(batches):
    variant = make_variant("toy", task=CountingTask())
    options = settings(warmup_share=1.0, condition_dropout=0.0, text_dropout=1.0)
    train_supervised(ToyModel(), [(variant, 1.0)], options)
    thoughts = [demonstration.thoughts for demonstration in batches[0]]
    assert thoughts == [(None,)] * 2 + [("light",)] * 6


def test_after_step_gets_the_losses():
    variant = make_variant("toy")
    seen = []
    train_supervised(
        ToyModel(),
        [(variant, 1.0)],
        settings(),
        lambda step, losses: seen.append((step, sorted(losses))),
    )
    assert seen == [(step, ["image_loss", "text_loss"]) for step in (1, 2, 3, 4)]


def test_same_seed_gives_the_same_weights():
    found = []
    for seed in (0, 0, 1):
        model = ToyModel()
        train_supervised(model, [(make_variant("toy"), 1.0)], settings(seed=seed))
        found.append(model.images.detach().clone())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_task_without_demonstrations(small_bagel):
    task = type("Silent", (), {"prompts": None})()
    variant = make_variant("text_to_image", task=task)
    before = small_bagel.llm2vae.weight.clone()
    with pytest.raises(ValueError, match="expected a task with demonstrations"):
        train_supervised(small_bagel, [(variant, 1.0)], settings(steps=1))
    assert torch.equal(small_bagel.llm2vae.weight, before)


def test_stages_share_no_demonstration():
    """The number of a batch is that of the first batch and the update."""
    ends = []
    # A model of its own goes through other stages.
    for stage in map(STAGES.get, SHIPPED):
        ends.append((stage.first_demonstration, stage.first_demonstration + stage.settings.steps))
    for (_, end), (start, _) in zip(ends[:-1], ends[1:], strict=True):
        assert end <= start
    for stage in STAGES.values():
        assert sum(stage.scenarios.values()) == pytest.approx(1)

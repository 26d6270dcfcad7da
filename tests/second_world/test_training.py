"""The settings of a run name this backbone's model and any scenario."""

import dataclasses
import math

import pytest
import torch
from chat_world import CASES, CHAT_CONFIG, SIDE, ChatProcessor, chat_model, write_prompts

from agents.config import load_config
from agents.models.bagel.model import Bagel
from agents.training.build import build_variant
from agents.training.checkpoint import latest_checkpoint
from agents.training.supervised import lay_out, sample_losses
from agents.training.trainer import Trainer
from unigrpo_env.tasks.task import Demonstration, Prompt

pytestmark = pytest.mark.slow

SCENARIOS = ("text_to_image", "edit", "reflect", "story", "dialogue")


def config(name, folder, *overrides):
    case = CASES[name]
    prompts = write_prompts(folder, case.sources, case.turns)
    return load_config(
        [
            "model.name=chat",
            f"env.variant={case.variant}",
            f"env.prompts={prompts}",
            f"env.reward={case.reward}",
            "env.prompt_budget=48",
            "env.text_budget=5",
            "env.image_steps=7",
            "trainer.groups=2",
            "trainer.group_size=3",
            "trainer.iterations=2",
            "evaluation.prompts=2",
            f"output.folder={folder / 'run'}",
            *overrides,
        ]
    )


def weights_of(model):
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
def test_one_update(name, tmp_path):
    trainer = Trainer(config(name, tmp_path))
    assert isinstance(trainer.variant.processor, ChatProcessor)
    before = weights_of(trainer.model)
    metrics = trainer.iterate()
    assert metrics["text_log_ratio"] < 1e-5
    assert metrics["image_log_ratio"] < 1e-5
    assert metrics["frac_groups_with_signal"] == 1
    for expert in ("text_grad_norm", "image_grad_norm"):
        assert math.isfinite(metrics[expert])
        assert metrics[expert] > 0
    after = weights_of(trainer.model)
    assert any(not torch.equal(after[key], before[key]) for key in before)
    assert 0 < trainer.evaluate(greedy=True).accuracy < 1


@pytest.mark.slow
def test_resume_is_bit_exact(tmp_path):
    """A checkpoint finds the processor by the name in the model's config."""
    trainer = Trainer(config("edit", tmp_path))
    trainer.iterate()
    trainer.save()
    trainer.iterate()
    resumed = Trainer.resume(latest_checkpoint(tmp_path / "run" / "checkpoints"))
    assert isinstance(resumed.processor, ChatProcessor)
    resumed.iterate()
    expected = weights_of(trainer.model)
    for name, weight in weights_of(resumed.model).items():
        assert torch.equal(weight, expected[name]), name


def test_scenario_needs_a_task_and_a_reward(tmp_path):
    """What was made for the shapes world is not silently played by another backbone."""
    settings = config("edit", tmp_path).env
    settings.prompts = None
    with pytest.raises(ValueError, match=r"env\.prompts.* for ChatProcessor"):
        build_variant(settings, ChatProcessor())
    settings = config("edit", tmp_path).env
    settings.reward = ""
    with pytest.raises(ValueError, match=r"env\.reward.* for ChatProcessor"):
        build_variant(settings, ChatProcessor())


def test_other_model_is_refused(tmp_path):
    """The shipped model does not fit this processor, and the message says so."""
    with pytest.raises(ValueError, match="Bagel does not fit the scenario"):
        Trainer(config("edit", tmp_path, "model.name=tiny", "env.processor=chat"))


def test_other_vocabulary_is_refused(tmp_path):
    """A model with more tokens than the processor names is told what to do, before a rollout."""
    model = Bagel(dataclasses.replace(CHAT_CONFIG, vocab_size=400))
    with pytest.raises(ValueError, match="a vocabulary of 400, expected 320"):
        Trainer(config("text_to_image", tmp_path), model)


def test_refl_names_the_decoder(tmp_path):
    """ReFL needs a gradient through `decode_latents`, which this processor does not give."""
    overrides = ["algorithm=refl", "algorithm.refl_reward=brightness", "env.image_steps=10"]
    trainer = Trainer(config("text_to_image", tmp_path, *overrides))
    with pytest.raises(ValueError, match="decode_latents keeps the gradient"):
        trainer.iterate()


def demonstrations():
    """An edit, a dialogue and a story, with and without thoughts."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, SIDE, SIDE, generator=generator)
    source = torch.rand(3, SIDE, SIDE, generator=generator)
    edit = Prompt("make the image brighter", sources=(source, source))
    dialogue = Prompt("paint the sky", turns=("make it darker",))
    story = Prompt("paint the sea")
    return [
        Demonstration(edit, ("brighter",), images[:1]),
        Demonstration(dialogue, ("a sky", "darker"), images),
        Demonstration(story, (None, "the same"), images),
        Demonstration(edit, ("brighter",), images[:1]).without_text(),
        Demonstration(edit, ("brighter",), images[:1]).unconditional(),
    ]


def test_demonstrations_are_laid_out_like_episodes(processor, tmp_path):
    """A demonstration's tokens are those that the env would have written."""
    variant = CASES["dialogue"].make(tmp_path)
    shown = demonstrations()[1]
    stream = lay_out(processor, shown)
    assert stream.prompt == processor.encode_prompt(shown.prompt.text)
    first = [*processor.encode_text("a sky"), processor.open_image_id]
    turn = [processor.image_id, *processor.encode_turn("make it darker")]
    second = [*processor.encode_text("darker"), processor.open_image_id]
    assert stream.tokens == [*first, *turn, *second]
    assert stream.chosen == [True] * len(first) + [False] * len(turn) + [True] * len(second)
    assert stream.image_positions == [len(stream.prompt) + len(first)]
    assert variant.rules.turn_slots >= len(turn) - 1


def test_supervised_losses(processor, tmp_path):
    """Supervised training takes the same layouts; both losses have a gradient."""
    model = chat_model()
    variant = CASES["edit"].make(tmp_path)
    generator = torch.Generator().manual_seed(0)
    text, image = sample_losses(model, variant, demonstrations(), generator, 1.0)
    (text + image).backward()
    assert torch.isfinite(text)
    assert torch.isfinite(image)
    for weights in model.parameters_by_expert().values():
        assert any(weight.grad is not None and weight.grad.any() for weight in weights)

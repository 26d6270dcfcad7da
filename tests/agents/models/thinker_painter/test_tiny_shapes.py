"""The thinker-painter of the shapes world: its parts, its files, and the commands."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from diffusers import SanaPipeline
from transformers import Qwen3ForCausalLM

from agents.cli import main
from agents.models.registry import load_model
from agents.models.thinker_painter.tiny_shapes import TOLD_TOKENS, make_painter
from agents.training.pretraining import SupervisedSettings, train_supervised
from unigrpo_env.mdp.rules import Role
from unigrpo_env.tasks.shapes.processor import ShapesProcessor
from unigrpo_env.variants.variant import make_variant


@pytest.fixture(scope="module")
def built():
    return load_model("tiny_painter")


@pytest.fixture
def model(built):
    """A copy, because tests train it."""
    return copy.deepcopy(built)


@pytest.fixture(scope="module")
def demonstrations():
    task = make_variant("text_to_image").task
    return task.demonstrations(16, 0) + task.warmup_demonstrations(16, 0)


def velocity_of(model, prompt, thought):
    """The velocity after a prompt and a thought, at one point."""
    context = model.empty_context(1)
    texts = {Role.USER: model.processor.encode_prompt(prompt)}
    texts[Role.MODEL] = model.processor.encode_text(thought)
    for role, ids in texts.items():
        row = torch.tensor([ids])
        _, context = model.append_hidden(context, row, roles=torch.full_like(row, role))
    x = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.predict_velocity(context, x, torch.tensor([0.6]))


def test_parts(model):
    assert isinstance(model.thinker, Qwen3ForCausalLM)
    assert isinstance(model.painter.pipeline, SanaPipeline)
    # The painter reads with the thinker, so an image teaches it.
    assert model.shares_encoder
    assert model.painter.pipeline.text_encoder is model.thinker.model
    assert sum(weight.numel() for weight in model.parameters()) < 1_000_000


def test_weights_come_from_the_seed():
    random = torch.random.get_rng_state()
    first, same, other = (make_painter(seed).transformer for seed in (0, 0, 1))
    assert torch.equal(random, torch.random.get_rng_state())
    name = "transformer_blocks.0.attn1.to_q.weight"
    weights = [part.state_dict()[name] for part in (first, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_latents_are_squares_of_pixels(model, demonstrations):
    images = torch.cat([each.images for each in demonstrations])
    latents = model.processor.encode_images(images)
    assert latents.shape == (len(images), *model.latent_shape)
    torch.testing.assert_close(model.processor.decode_latents(latents), images)
    # The value of a token stays in its square: the first one is the upper left.
    changed = images.clone()
    changed[:, :, :4, :4] = 1 - changed[:, :, :4, :4]
    moved = (model.processor.encode_images(changed) != latents).any(2)
    assert moved.sum(1).tolist() == [1] * len(images)
    assert moved[:, 0].all()


def test_untrained_velocity_is_about_the_latent(model):
    x = torch.randn(8, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    context = model.empty_context(8)
    with torch.no_grad():
        velocity = model.predict_velocity(context, x, torch.ones(8))
    similarity = torch.nn.functional.cosine_similarity(velocity.flatten(1), x.flatten(1))
    assert similarity.min() > 0.8


def test_painter_reads_the_whole_thought_alone(model, demonstrations):
    base = velocity_of(model, "two red circles", "red circle top , red circle left")
    assert torch.equal(base, velocity_of(model, "a circle", "red circle top , red circle left"))
    other = velocity_of(model, "two red circles", "red circle top , red circle right")
    assert not torch.equal(base, other)
    processor = model.processor
    lengths = [len(processor.encode_text(each.thoughts[0])) for each in demonstrations]
    # With the token that ends it.
    assert max(lengths) + 1 <= processor.scenario_defaults["text_budget"] < TOLD_TOKENS


def test_last_layer_is_not_read_for_the_painter(model):
    words = ("a red circle", "red circle top")
    before = velocity_of(model, *words)
    with torch.no_grad():
        model.thinker.model.layers[-1].mlp.down_proj.weight.add_(1)
    assert torch.equal(before, velocity_of(model, *words))
    with torch.no_grad():
        model.thinker.model.layers[-2].mlp.down_proj.weight.add_(1)
    assert not torch.equal(before, velocity_of(model, *words))


def test_it_plays_the_shapes_world(model):
    variant = make_variant("text_to_image", processor=model.processor)
    own = make_variant("text_to_image", processor=ShapesProcessor())
    assert type(variant.task) is type(own.task)
    assert variant.rules.prompt_budget == own.rules.prompt_budget
    for kept, expected in zip(variant.rules.times, own.rules.times, strict=True):
        assert kept == pytest.approx(expected, abs=2e-3)
    prompts = variant.task.prompts("test", 64, 0)
    lengths = [len(model.processor.encode_prompt(prompt.text)) for prompt in prompts]
    assert max(lengths) <= variant.rules.prompt_budget


def test_lessons_lower_both_losses(model):
    variant = make_variant("text_to_image", processor=model.processor)
    found = []
    settings = SupervisedSettings(steps=8, batch_size=4, warmup=1)
    train_supervised(model, [(variant, 1.0)], settings, lambda step, losses: found.append(losses))
    # An image begins near its latent, so its loss falls at once.
    assert found[-1]["image_loss"] < 0.7 * found[0]["image_loss"]
    assert found[-1]["text_loss"] < 0.95 * found[0]["text_loss"]


def test_saved_and_loaded(model, tmp_path):
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.01)
    model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    assert loaded.shares_encoder
    assert loaded.config == replace(model.config, base=loaded.config.base)
    assert loaded.processor.scenario_defaults == model.processor.scenario_defaults
    words = ("a red circle", "red circle top")
    torch.testing.assert_close(velocity_of(loaded, *words), velocity_of(model, *words))


def test_stage_that_it_cannot_play_is_refused_at_once(tmp_path, capsys):
    words = ["--model", "tiny_painter", "--stages", "words", "reading", "--out", str(tmp_path)]
    assert main(["pretrain", *words]) != 0
    assert "'reading' needs the scenario 'edit'" in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
@pytest.mark.usefixtures("no_curves")
def test_lessons_and_training_by_command(tmp_path):
    folder = tmp_path / "lessons"
    words = ["--model", "tiny_painter", "--stages", "words", "--prompts", "2", "--out", str(folder)]
    assert main(["pretrain", *words, "--steps", "1", "--batch-size", "4"]) == 0
    run = tmp_path / "run"
    small = ["trainer.groups=2", "trainer.group_size=2", "trainer.iterations=1"]
    small += ["evaluation.prompts=2", "evaluation.every=0", "output.samples_every=0"]
    small += ["env.image_steps=6", "output.tensorboard=false", f"output.folder={run}"]
    assert main(["train", f"model.name={folder}", *small]) == 0
    assert json.loads((run / "summary.json").read_text())["iterations"] == 1

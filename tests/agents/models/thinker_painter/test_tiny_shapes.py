"""The thinker-painter of the shapes world: its parts, its files, and the commands."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from diffusers import Flux2KleinPipeline
from transformers import Qwen3ForCausalLM

from agents.cli import main
from agents.models.registry import load_model
from agents.models.thinker_painter.tiny_shapes import KLEIN_CALL, make_painter, make_thinker
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
    assert isinstance(model.painter.pipeline, Flux2KleinPipeline)
    # The text encoder is a third network, and it never learns.
    assert not model.shares_encoder
    assert model.painter.pipeline.text_encoder is not model.thinker
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert trained < 1_200_000


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda seed: make_painter(seed).transformer, "x_embedder.weight"),
        (lambda seed: make_painter(seed).text_encoder, "model.embed_tokens.weight"),
        (lambda seed: make_thinker(seed)[0], "model.embed_tokens.weight"),
    ],
)
def test_weights_come_from_the_seed(make, name):
    random = torch.random.get_rng_state()
    first, same, other = (make(seed).state_dict()[name] for seed in (0, 0, 1))
    assert torch.equal(random, torch.random.get_rng_state())
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_state_of_a_place_tells_its_colour_and_shape(model):
    encode = model.painter.pipeline.encode_prompt
    thought = "red circle top , {} square left"

    def states(colour):
        return encode(thought.format(colour), **KLEIN_CALL)[0][0]

    found = states("red")
    # Between the two marks of the template stand the words; behind them, padding of zeros.
    torch.testing.assert_close(found[:10].square().mean(1), torch.ones(10))
    changed = (found - states("blue")).square().mean(1)
    assert (changed > 0.1).nonzero().flatten().tolist() == [5, 6, 7]
    assert changed[[0, 1, 2, 3, 4, 8, 9]].max() < 1e-9


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


def test_painter_reads_the_whole_thought_alone(model, demonstrations):
    base = velocity_of(model, "two red circles", "red circle top , red circle left")
    assert torch.equal(base, velocity_of(model, "a circle", "red circle top , red circle left"))
    other = velocity_of(model, "two red circles", "red circle top , red circle right")
    assert not torch.equal(base, other)
    processor = model.processor
    lengths = [len(processor.encode_text(each.thoughts[0])) for each in demonstrations]
    # With the token that ends it.
    budget = processor.scenario_defaults["text_budget"]
    assert max(lengths) + 1 <= budget
    # The template adds three marks.
    assert budget - 1 + 3 <= KLEIN_CALL["max_sequence_length"]


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
    settings = SupervisedSettings(steps=8, batch_size=8, warmup=1, learning_rate=4e-3)
    train_supervised(model, [(variant, 1.0)], settings, lambda step, losses: found.append(losses))
    for name in ("text_loss", "image_loss"):
        assert found[-1][name] < 0.9 * found[0][name]


def test_saved_and_loaded(model, tmp_path):
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.01)
    model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    assert loaded.config == replace(model.config, base=loaded.config.base)
    assert loaded.processor.scenario_defaults == model.processor.scenario_defaults
    words = ("a red circle", "red circle top")
    torch.testing.assert_close(velocity_of(loaded, *words), velocity_of(model, *words))


def test_stage_that_it_cannot_play_is_refused_at_once(tmp_path, capsys):
    words = ["--model", "tiny_painter", "--stages", "pair", "reading", "--out", str(tmp_path)]
    assert main(["pretrain", *words]) != 0
    assert "'reading' needs the scenario 'edit'" in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
@pytest.mark.usefixtures("no_curves")
def test_lessons_and_training_by_command(tmp_path):
    folder = tmp_path / "lessons"
    words = ["--model", "tiny_painter", "--stages", "pair", "--prompts", "2", "--out", str(folder)]
    assert main(["pretrain", *words, "--steps", "1", "--batch-size", "4"]) == 0
    run = tmp_path / "run"
    small = ["trainer.groups=2", "trainer.group_size=2", "trainer.iterations=1"]
    small += ["evaluation.prompts=2", "evaluation.every=0", "output.samples_every=0"]
    small += ["env.image_steps=6", "output.tensorboard=false", f"output.folder={run}"]
    assert main(["train", f"model.name={folder}", *small]) == 0
    assert json.loads((run / "summary.json").read_text())["iterations"] == 1

"""Scenarios with images that are read: a rollout, and a loss that starts at ratio 1."""

import dataclasses

import pytest
import tiny_parts
import torch
from tiny import FAMILIES, make_model, make_thinker
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from agents.config.schema import AlgorithmSettings
from agents.models.lora import add_adapters
from agents.models.thinker_painter.model import ThinkerPainter
from agents.models.thinker_painter.painter import Painter
from agents.models.thinker_painter.vision import Vision
from agents.objectives.loss import UniGRPOLoss
from unigrpo_env.tasks.task import Prompt
from unigrpo_env.variants.variant import make_variant


def thinker_that_sees():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return tiny_parts.qwen25_vl().eval()


def joined(name, thinker=None, **sizes):
    """A family's painter with a thinker; without one its text encoder thinks."""
    pipeline, call = FAMILIES[name]()
    thinker = thinker or pipeline.text_encoder
    vision = Vision.of(thinker.config, tuple(OPENAI_CLIP_MEAN), tuple(OPENAI_CLIP_STD))
    painter = Painter(pipeline, **call | sizes)
    return ThinkerPainter(thinker, painter, tiny_parts.chat_tokenizer(), vision=vision)


class Sketches:
    """Prompts with two random images each, of which a scenario may use fewer."""

    def __init__(self, model, sources):
        self.size = model.painter.image_size
        self.sources = sources

    def prompts(self, split, count, seed):
        generator = torch.Generator().manual_seed(seed)
        words = ("two red circles", "a blue square left of a green cross", "a cross")
        return [
            Prompt(
                words[number % 3],
                sources=tuple(torch.rand(self.sources(number), 3, *self.size, generator=generator)),
            )
            for number in range(count)
        ]


def uneven(episodes):
    letters = torch.tensor([sum(map(ord, text)) % 7 for text in episodes.texts])
    return letters + episodes.images.mean((1, 2, 3))


def variant_of(name, model, sources=lambda number: 0, **settings):
    defaults = {"text_budget": 5, "image_steps": 4, "prompt_budget": 60, "system_prompt": ""}
    return make_variant(
        name,
        processor=model.processor,
        task=Sketches(model, sources),
        reward=uneven,
        **(defaults | settings),
    )


def edit_inside():
    """A painter that edits; its text encoder thinks, and sees nothing."""
    model = joined("klein", height=64, width=64)
    return model, variant_of("edit", model, lambda number: 1)


def edit_some():
    """The same, but some prompts have no source and some have two; the thinker sees them."""
    model = joined("klein", thinker_that_sees(), height=64, width=64)
    settings = {"source_images": 2, "min_source_images": 0}
    return model, variant_of("edit", model, lambda number: number % 3, **settings)


def reflect():
    """A thinker that sees what a plain painter drew; some rows stop early."""
    model = joined("zimage", thinker_that_sees())
    return model, variant_of("reflect", model, image_budget=2)


def reflect_inside():
    """The text encoder thinks, and sees what it had drawn."""
    model = joined("qwen")
    return model, variant_of("reflect", model, image_budget=2)


def edit_seen():
    """Thinker, text encoder and painter all see the source, and the painter needs one."""
    model = joined("qwen_edit")
    return model, variant_of("edit", model, lambda number: 1)


def edit_own():
    """What was drawn is edited next, by a painter beside a thinker that sees nothing."""
    model = joined("kontext", make_thinker())
    return model, variant_of("reflect", model, image_budget=2)


PLAYS = (edit_inside, edit_some, edit_seen, edit_own, reflect, reflect_inside)


@pytest.mark.slow
@pytest.mark.parametrize("play", PLAYS)
def test_a_loss_starts_at_ratio_one(play, collect, prepare):
    model, variant = play()
    episodes = collect(model, variant)
    assert episodes.images_drawn.min() > 0
    settings = AlgorithmSettings(velocity_weight=0.0)
    loss = UniGRPOLoss.for_variant(model, variant, settings)
    episodes = prepare(episodes, variant)
    out = loss(episodes)
    assert out["text_log_ratio"] < 1e-5
    assert out["image_log_ratio"] < 1e-5
    assert out["entropy"] > 0
    (out["loss_text"] + out["loss_image"]).backward()
    for weights in model.parameters_by_expert().values():
        assert any(weight.grad is not None and weight.grad.any() for weight in weights)
    for part in model.painter.frozen:
        if part is not model.thinker:
            assert all(weight.grad is None for weight in part.parameters())


@pytest.mark.slow
def test_rows_that_stop_early(collect, prepare):
    """Episodes of one image and of two side by side."""
    model, variant = reflect()
    episodes = collect(model, variant).flatten(0, 1)
    # What row 0 writes first after its first image ends an episode from now on.
    after = int(episodes.image_positions[0, 0] - episodes.prompt_length[0]) + 1
    after += int(episodes.chosen_mask[0, after:].int().argmax())
    rules = dataclasses.replace(variant.rules, end_id=int(episodes.tokens[0, after]))
    variant = dataclasses.replace(variant, rules=rules)
    episodes = collect(model, variant)
    assert len(episodes.images_drawn.unique()) > 1
    loss = UniGRPOLoss.for_variant(model, variant, AlgorithmSettings(velocity_weight=0.0))
    out = loss(prepare(episodes, variant))
    assert out["text_log_ratio"] < 1e-5
    assert out["image_log_ratio"] < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["reflect", "edit_some"])
def test_other_images_give_another_ratio(name, collect, prepare):
    """The comparison above can fail: what was read counts."""
    model, variant = {"reflect": reflect, "edit_some": edit_some}[name]()
    episodes = prepare(collect(model, variant), variant)
    loss = UniGRPOLoss.for_variant(model, variant, AlgorithmSettings(velocity_weight=0.0))
    with torch.no_grad():
        before = loss(episodes)["image_log_ratio"]
        episodes.pixels = 255 - episodes.pixels
        out = loss(episodes)
    assert out["text_log_ratio"] > 1e-4
    # A plain painter sees nothing of them.
    assert (out["image_log_ratio"] > 10 * before + 1e-7) == (name == "edit_some")


@pytest.mark.slow
@pytest.mark.parametrize("play", [edit_seen, reflect_inside])
def test_checkpointing_changes_no_gradient(play, collect, prepare):
    """Also those of the tower, and with velocities in parts."""
    model, variant = play()
    episodes = prepare(collect(model, variant), variant)
    settings = AlgorithmSettings(velocity_weight=0.0, grad_through_read_images=True)
    loss = UniGRPOLoss.for_variant(model, variant, settings)
    found = []
    for checkpointing, max_rows in ((False, None), (True, 4)):
        model.checkpointing, model.max_rows = checkpointing, max_rows
        model.zero_grad()
        out = loss(episodes)
        (out["loss_text"] + out["loss_image"]).backward()
        weights = dict(model.named_parameters())
        found.append({name: w.grad for name, w in weights.items() if w.grad is not None})
    expected, same = found
    assert any("visual" in name and gradient.any() for name, gradient in same.items())
    assert same.keys() == expected.keys()
    for name, gradient in same.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-3)


def image_gradients(model, episodes, variant, **settings):
    """The thinker's parameters that the image loss reaches."""
    settings = AlgorithmSettings(velocity_weight=0.0, text_weight=0.0, **settings)
    loss = UniGRPOLoss.for_variant(model, variant, settings)
    loss(episodes)["loss_image"].backward()
    found = [w for w in model.thinker.parameters() if w.grad is not None and w.grad.any()]
    model.zero_grad()
    return found


@pytest.mark.parametrize(("name", "inside"), [("zimage", True), ("qwen", True), ("sd3", False)])
def test_when_the_image_loss_reaches_the_thinker(name, inside, collect, prepare):
    """If it is the text encoder and nothing is detached."""
    model = make_model(name)
    variant = variant_of("text_to_image", model)
    episodes = prepare(collect(model, variant), variant)
    assert bool(image_gradients(model, episodes, variant)) is inside
    assert not image_gradients(model, episodes, variant, image_grad_to_text=False)


def test_train_wakes_no_dropout(collect, prepare):
    """Frozen encoders, thinker and transformer say in training what they said in the rollout."""
    model = make_model("sd3")
    assert model.painter.pipeline.text_encoder_3.config.dropout_rate > 0
    for part in (model.thinker, model.transformer, *model.painter.frozen):
        part.register_module("a_dropout", torch.nn.Dropout(0.5))
    variant = variant_of("text_to_image", model)
    episodes = prepare(collect(model, variant), variant)
    assert model.train() is model
    assert model.training
    for part in (model.thinker, model.transformer, *model.painter.frozen):
        assert not any(module.training for module in part.modules())
    loss = UniGRPOLoss.for_variant(model, variant, AlgorithmSettings(velocity_weight=0.0))
    out = loss(episodes)
    assert out["text_log_ratio"] < 1e-5
    assert out["image_log_ratio"] < 1e-5
    (out["loss_text"] + out["loss_image"]).backward()
    for part in model.painter.frozen:
        assert all(weight.grad is None for weight in part.parameters())
    assert not model.eval().training


def test_adapters_leave_the_tower_alone():
    """Also one whose layers have the names of the language model's."""
    thinker = thinker_that_sees()
    tower = torch.nn.Module()
    tower.q_proj = torch.nn.Linear(4, 4)
    thinker.model.visual.add_module("attention", tower)
    model = joined("sd3", thinker)
    add_adapters(model, {"text": 2, "image": 2}, {"text": 4, "image": 4})
    layers = model.adapted_layers["text"]
    assert len(layers) == 4 * thinker.config.get_text_config().num_hidden_layers
    assert not any("visual" in layer for layer in layers)
    assert model.adapted_layers["image"]

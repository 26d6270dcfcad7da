"""Painters that edit: each row has a source of its own, and equals the plain pipeline's call."""

import inspect

import pytest
import torch
from PIL import Image
from tiny import FAMILIES, make_model
from tiny_parts import chat_tokenizer

from agents.models.pixels import scale_pixels
from agents.models.thinker_painter.briefing import row_texts
from agents.models.thinker_painter.model import ThinkerPainter
from agents.models.thinker_painter.painter import Painter

EDITORS = ("klein", "kontext", "qwen_edit")


def make_editor(name):
    """A model of a family; klein takes no small sources, so it draws larger images."""
    if name != "klein":
        return make_model(name)
    pipeline, call = FAMILIES[name]()
    painter = Painter(pipeline, **call | {"height": 64, "width": 80})
    return ThinkerPainter(pipeline.text_encoder, painter, chat_tokenizer())


def pictures(model, count, seed=0):
    """Levels `[count, 3, height, width]` uint8."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 3, *model.painter.image_size), generator=generator).byte()


def as_image(levels):
    return Image.fromarray(levels.permute(1, 2, 0).numpy())


def words(model, rows):
    generator = torch.Generator().manual_seed(3)
    return torch.randint(10, 250, (rows, 4), generator=generator)


def read(model, levels, mask=None):
    """A context of words, one source a row, and words."""
    rows = len(levels)
    ids = words(model, rows)
    _, context = model.append_text(model.empty_context(rows), ids[:, :2])
    context = model.append_image(context, pixels=scale_pixels(levels), mask=mask)
    return model.append_text(context, ids[:, 2:])[1]


def inputs(model, rows):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, *model.latent_shape, generator=generator)
    return x, torch.rand(rows, generator=generator)


def plain_steps(model, text, image, steps=3):
    """What the pipeline itself hands to its scheduler: velocity, time and latent of each step."""
    pipeline = model.painter.pipeline
    own = pipeline.scheduler.step
    found = []

    def step(velocity, t, sample, *args, **kwargs):
        found.append((velocity.clone(), t / 1000, sample.clone()))
        return own(velocity, t, sample, *args, **kwargs)

    step.__signature__ = inspect.signature(own)
    pipeline.scheduler.step = step
    given = {} if image is None else {"image": image}
    try:
        pipeline(
            prompt=text,
            num_inference_steps=steps,
            output_type="latent",
            generator=torch.Generator().manual_seed(5),
            **given,
            **model.painter.call,
        )
    finally:
        del pipeline.scheduler.step
    return found


def told(model, context):
    """The text of each row, as the painter was told."""
    return row_texts(context, model._telling)


@pytest.mark.parametrize("name", EDITORS)
def test_velocities_are_the_pipelines(name):
    """Two sources in one batch, the first of them in two rows."""
    model = make_editor(name)
    levels = pictures(model, 2)[[0, 1, 0]]
    with torch.no_grad():
        context = read(model, levels)
        texts = told(model, context)
        rows = [
            plain_steps(model, text, as_image(source))
            for text, source in zip(texts, levels, strict=True)
        ]
        for step in zip(*rows, strict=True):
            velocity, times, x = (torch.stack(part) for part in zip(*step, strict=True))
            found = model.predict_velocity(context, x[:, 0], times)
            torch.testing.assert_close(found, velocity[:, 0], atol=1e-5, rtol=0)
        # The sources matter.
        swapped = model.predict_velocity(read(model, pictures(model, 2)[[1, 0, 1]]), x[:, 0], times)
        assert ((swapped - found).abs().amax((1, 2)) > 1e-4).all()


@pytest.mark.parametrize("name", ["klein", "kontext"])
def test_rows_with_and_without_a_source(name):
    model = make_editor(name)
    levels = pictures(model, 3)
    mask = torch.tensor([True, False, True])
    with torch.no_grad():
        context = read(model, levels, mask)
        texts = told(model, context)
        for row in range(3):
            image = as_image(levels[row]) if mask[row] else None
            velocity, time, x = plain_steps(model, texts[row], image, steps=1)[0]
            batch, t = inputs(model, 3)
            batch[row], t[row] = x[0], time
            found = model.predict_velocity(context, batch, t)
            torch.testing.assert_close(found[[row]], velocity, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", EDITORS)
def test_the_auto_encoder_runs_once_for_each_source(name):
    model = make_editor(name)
    runs = []
    own = model.painter.pipeline.vae.encode

    def encode(*args, **kwargs):
        runs.append(1)
        return own(*args, **kwargs)

    model.painter.pipeline.vae.encode = encode
    levels = pictures(model, 2)[[0, 1, 0]]
    with torch.no_grad():
        context = read(model, levels)
        for _ in range(2):
            model.predict_velocity(context, *inputs(model, 3))
        model.predict_velocity(context.repeat_interleave(2), *inputs(model, 6))
        _, later = model.append_text(context, words(model, 3))
        model.predict_velocity(later, *inputs(model, 3))
    assert len(runs) == 2


@pytest.mark.parametrize("name", ["klein", "qwen_edit"])
def test_gradients_do_not_depend_on_the_batch(name):
    model = make_editor(name)
    levels = pictures(model, 2)[[0, 1, 0]]
    x, t = inputs(model, 3)

    def gradients(velocity):
        weights = list(model.transformer.parameters())
        return torch.autograd.grad(velocity.square().sum(), weights, allow_unused=True)

    context = read(model, levels)
    whole = gradients(model.predict_velocity(context, x, t))
    parts = [
        model.predict_velocity(context.select(torch.tensor([row])), x[[row]], t[[row]])
        for row in range(3)
    ]
    alone = gradients(torch.cat(parts))
    for first, second in zip(whole, alone, strict=True):
        if first is not None:
            torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-3)


def test_the_last_image_is_edited():
    model = make_editor("klein")
    first, last = pictures(model, 1), pictures(model, 1, seed=1)
    x, t = inputs(model, 1)
    with torch.no_grad():
        _, context = model.append_text(model.empty_context(1), words(model, 1))
        context = model.append_image(context, pixels=scale_pixels(first))
        both = model.append_image(context, pixels=scale_pixels(last))
        _, alone = model.append_text(model.empty_context(1), words(model, 1))
        alone = model.append_image(alone, pixels=scale_pixels(last))
        found = model.predict_velocity(both, x, t)
        torch.testing.assert_close(found, model.predict_velocity(alone, x, t), atol=1e-6, rtol=0)


def test_a_latent_is_decoded_for_the_painter():
    """What the model drew itself comes as a latent, if the caller has no pixels of it."""
    model = make_editor("klein")
    latent, t = inputs(model, 2)
    with torch.no_grad():
        levels = model.processor.view_images(model.processor.decode_latents(latent))
        contexts = []
        for image in ({"latent": latent}, {"pixels": scale_pixels(levels)}):
            _, context = model.append_text(model.empty_context(2), words(model, 2))
            contexts.append(model.append_image(context, **image))
        first, second = (model.predict_velocity(context, latent, t) for context in contexts)
    assert torch.equal(first, second)
    with pytest.raises(ValueError, match="expected a latent, pixels, or both"):
        model.append_image(contexts[0])


def test_an_editor_that_needs_a_source_says_so():
    model = make_model("qwen_edit")
    assert model.painter.needs_source
    context = read(model, pictures(model, 3), torch.tensor([True, False, False]))
    message = "an image to edit in each row.*QwenImageEditPipeline.*2 of 3 rows without"
    with pytest.raises(ValueError, match=message):
        model.predict_velocity(context, *inputs(model, 3))
    # A row that has one is drawn, and no source is needed to decode.
    model.predict_velocity(context.select(torch.tensor([0])), *inputs(model, 1))
    assert model.processor.decode_latents(inputs(model, 2)[0]).shape == (2, 3, 16, 24)


def test_a_model_that_reads_no_images_says_so():
    model = make_model("sd3")
    assert not model.reads_images
    with pytest.raises(NotImplementedError, match="reads no images"):
        model.append_image(model.empty_context(1), pixels=scale_pixels(pictures(model, 1)))

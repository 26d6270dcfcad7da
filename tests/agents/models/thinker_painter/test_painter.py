"""What the painter is asked for is what its pipeline does when it is called whole."""

import copy
import functools
import inspect
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from tiny import FAMILIES

from agents.models.thinker_painter.asked import Source
from agents.models.thinker_painter.latent_layout import to_tokens
from agents.models.thinker_painter.painter import Painter

STEPS = 6
TEXTS = ["two red circles", "a blue square left of a green cross"]
EXACT = {"atol": 1e-5, "rtol": 0}
EDITORS = {"kontext": "kontext", "klein with a source": "klein", "qwen_edit": "qwen_edit"}
"""Cases with a source, and their families."""
CASES = [*(name for name in FAMILIES if name not in EDITORS), *EDITORS]


@dataclass
class Drawn:
    """A painter, and what its pipeline did in a call of its own.

    Attributes:
        painter: of the pipeline.
        texts: what was drawn.
        source: what was edited, if anything.
        velocities: of each step, in the pipeline's own form, like `latents`.
        told: to the transformer at each step, in [0, 1].
        latents: before each step, and at the end.
        images: `[N, 3, height, width]`.
        sigmas: of its scheduler.
        second_order: whether its solver uses two velocities for a step.
    """

    painter: Painter
    texts: list[str]
    source: Source | None
    velocities: list = field(default_factory=list)
    told: list = field(default_factory=list)
    latents: list = field(default_factory=list)
    images: Any = None
    sigmas: Any = None

    @property
    def second_order(self):
        return self.painter.pipeline.scheduler.config.get("solver_order") == 2

    @property
    def times(self):
        # This solver tells its transformer whole numbers of 1000.
        return self.told if self.second_order else self.sigmas[:-1].tolist()

    def conditions(self):
        return self.painter.encode(self.texts, self.source)

    def noise(self):
        return to_tokens(self.latents[0])


@functools.cache
def drawn(case):
    pipeline, call = FAMILIES[EDITORS.get(case, case)]()
    painter = Painter(pipeline, **call)
    texts = TEXTS[:1] if case == "qwen_edit" else TEXTS
    found = Drawn(painter, texts, None)
    if case in EDITORS:
        levels = np.random.default_rng(0).integers(0, 256, (*painter.image_size, 3), "uint8")
        found.source = Source(Image.fromarray(levels))
    scheduler = pipeline.scheduler
    own = scheduler.step

    @functools.wraps(own)
    def step(velocity, time, sample, *args, **kwargs):
        result = own(velocity, time, sample, *args, **kwargs)
        found.velocities.append(velocity)
        found.told.append(float(time) / 1000)
        found.latents.append(sample)
        found.last = result[0]
        return result

    options = {} if found.source is None else {"image": found.source.image}
    options |= {"num_inference_steps": STEPS, "output_type": "pt"}
    scheduler.step = step
    generator = torch.Generator().manual_seed(3)
    # Without guidance, as the painter calls it. The list is a copy: Z-Image writes into it.
    images = pipeline(prompt=list(texts), generator=generator, **painter.call, **options).images
    del scheduler.step
    found.latents.append(found.last)
    found.images = images
    found.sigmas = scheduler.sigmas.clone()
    return found


@pytest.fixture(params=CASES)
def case(request):
    return drawn(request.param)


@pytest.fixture(autouse=True)
def no_gradient():
    with torch.no_grad():
        yield


def test_velocities_are_those_of_the_whole_call(case):
    conditions = case.conditions()
    rows = len(case.texts)
    assert len(case.velocities) == STEPS
    for velocity, time, latents in zip(case.velocities, case.times, case.latents[:-1], strict=True):
        asked = case.painter.predict_velocity(
            conditions, to_tokens(latents), torch.full((rows,), time), case.source
        )
        torch.testing.assert_close(asked, to_tokens(velocity), **EXACT)


def test_velocity_depends_on_all_that_is_asked(case):
    """So that the comparison above can fail."""
    x = case.noise()
    rows = len(x)
    conditions = case.conditions()
    known = case.painter.predict_velocity(conditions, x, torch.full((rows,), 0.5), case.source)
    later = case.painter.predict_velocity(conditions, x, torch.full((rows,), 0.4), case.source)
    assert (known - later).abs().max() > 1e-3
    other = case.painter.encode([f"no {text}" for text in case.texts], case.source)
    if not other.fits(conditions):
        return
    found = case.painter.predict_velocity(other, x, torch.full((rows,), 0.5), case.source)
    assert (known - found).abs().max() > 1e-5
    if case.source is not None:
        black = Source(Image.new("RGB", case.source.image.size))
        found = case.painter.predict_velocity(conditions, x, torch.full((rows,), 0.5), black)
        assert (known - found).abs().max() > 1e-3


def test_euler_steps_on_its_grid_end_in_its_latents(case):
    if case.second_order:
        pytest.skip("Euler steps do not follow its solver")
    conditions = case.conditions()
    x = case.noise()
    grid = case.painter.time_grid(STEPS)
    for time, following in zip(grid[:-1], grid[1:], strict=True):
        t = torch.full((len(x),), time)
        velocity = case.painter.predict_velocity(conditions, x, t, case.source)
        x = x + (following - time) * velocity
    torch.testing.assert_close(x, to_tokens(case.latents[-1]), **EXACT)


def test_grid_is_the_schedulers(case):
    grid = torch.tensor(case.painter.time_grid(STEPS))
    torch.testing.assert_close(grid[1:], case.sigmas[1:], atol=1e-6, rtol=0)
    assert grid[0] == 1
    assert 0.99 < case.sigmas[0] <= 1


def test_flow_time_is_not_what_cogview4_tells():
    """It shifts its schedule, but tells its transformer the time before the shift."""
    case = drawn("cogview4")
    assert case.told[2] == pytest.approx(0.6)
    assert case.sigmas[2] > 0.62


def test_images_are_those_of_the_whole_call(case):
    images = case.painter.decode(to_tokens(case.latents[-1]))
    assert images.shape == (len(case.texts), 3, *case.painter.image_size)
    torch.testing.assert_close(images, case.images, **EXACT)


def test_two_rows_at_two_times_are_each_alone(case):
    painter = case.painter
    conditions = case.conditions()
    if len(case.texts) == 1:
        conditions = conditions.select(torch.tensor([0, 0]))
    x = torch.randn(2, *painter.latent_shape, generator=torch.Generator().manual_seed(1))
    times = torch.tensor([0.83, 0.21])
    both = painter.predict_velocity(conditions, x, times, case.source)
    for row in range(2):
        alone = painter.predict_velocity(
            conditions.select(torch.tensor([row])), x[[row]], times[[row]], case.source
        )
        torch.testing.assert_close(both[[row]], alone, **EXACT)


def test_encoding_undoes_what_comes_before_the_decoder(case, monkeypatch):
    painter = case.painter
    vae = painter.pipeline.vae
    x = torch.randn(2, *painter.latent_shape, generator=torch.Generator().manual_seed(2))
    own = vae.decode
    given = []

    def decode(values, *args, **kwargs):
        given.append(values)
        return own(values, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(vae, "decode", decode)
        images = painter.decode(x)
    distribution = SimpleNamespace(mode=lambda: given[0])
    encoded = SimpleNamespace(latent_dist=distribution, latent=given[0])
    monkeypatch.setattr(vae, "encode", lambda *_, **__: encoded)
    torch.testing.assert_close(painter.encode_images(images), x, **EXACT)


def ask_everything(case, painter):
    conditions = painter.encode(case.texts, case.source)
    x = case.noise()
    painter.predict_velocity(conditions, x, torch.full((len(x),), 0.5), case.source)
    painter.encode_images(painter.decode(x))
    painter.time_grid(STEPS)


def test_global_generator_is_left_alone(case):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    ask_everything(case, case.painter)
    assert torch.equal(torch.get_rng_state(), before)
    Painter(case.painter.pipeline, *case.painter.image_size, **case.painter.given)
    assert torch.equal(torch.get_rng_state(), before)


def members_of(pipeline):
    """All that may be replaced in a call."""
    owners = [pipeline, pipeline.scheduler, pipeline.vae]
    return [dict(vars(owner)) for owner in owners]


def assert_same_members(pipeline, before):
    assert type(pipeline) is getattr(diffusers, type(pipeline).__name__)
    after = members_of(pipeline)
    for own, known in zip(after, before, strict=True):
        assert own.keys() == known.keys()
    assert after[0]["scheduler"] is before[0]["scheduler"]
    for name in ("encode_prompt", "prepare_latents", "set_timesteps", "encode", "decode"):
        assert not any(name in own for own in after)


def test_members_are_back_after_each_question(case):
    pipeline = case.painter.pipeline
    before = members_of(pipeline)
    ask_everything(case, case.painter)
    assert_same_members(pipeline, before)
    config = dict(pipeline.config)
    assert config == dict(case.painter.pipeline.config)


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "scheduler"])
@pytest.mark.parametrize("name", ["sd3", "klein with a source"])
def test_members_are_back_after_an_error(name, part, monkeypatch):
    case = drawn(name)
    pipeline = case.painter.pipeline

    def fail(*args, **kwargs):
        raise RuntimeError("broken")

    broken = {
        "transformer": (pipeline.transformer, "forward"),
        "vae": (pipeline.vae, "decoder"),
        "text_encoder": (pipeline.text_encoder, "forward"),
        "scheduler": (type(pipeline.scheduler), "set_timesteps"),
    }[part]
    own = inspect.getattr_static(*broken, None)
    if broken[1] == "decoder":
        broken = (pipeline.vae.decoder, "forward")
    elif broken[1] == "set_timesteps":
        fail.__signature__ = inspect.signature(own)
    monkeypatch.setattr(*broken, fail)
    before = members_of(pipeline)
    with pytest.raises(RuntimeError, match="broken"):
        ask_everything(case, case.painter)
    assert_same_members(pipeline, before)


def test_gradient_reaches_transformer_and_text_encoder():
    """The pipeline itself would switch it off."""
    pipeline, call = FAMILIES["zimage"]()
    painter = Painter(pipeline, **call)
    pipeline.text_encoder.requires_grad_(True)
    with torch.enable_grad():
        x = torch.randn(2, *painter.latent_shape, requires_grad=True)
        conditions = painter.encode(TEXTS)
        velocity = painter.predict_velocity(conditions, x, torch.tensor([0.3, 0.7]))
        velocity.square().mean().backward()
    assert x.grad.norm() > 0
    embedding = pipeline.text_encoder.get_input_embeddings().weight
    assert embedding.grad.norm() > 0
    assert all(weight.grad is None for weight in pipeline.vae.parameters())


def test_gradient_reaches_the_latents_through_the_image():
    painter = drawn("sd3").painter
    with torch.enable_grad():
        x = torch.randn(1, *painter.latent_shape, requires_grad=True)
        painter.decode(x).mean().backward()
    assert x.grad.norm() > 0


def test_source_is_encoded_once(monkeypatch):
    case = drawn("klein with a source")
    painter = case.painter
    vae = painter.pipeline.vae
    own = vae.encode
    count = []

    def encode(*args, **kwargs):
        count.append(1)
        return own(*args, **kwargs)

    monkeypatch.setattr(vae, "encode", encode)
    source = Source(case.source.image)
    conditions = painter.encode(TEXTS, source)
    x = case.noise()
    first = painter.predict_velocity(conditions, x, torch.full((2,), 0.5), source)
    second = painter.predict_velocity(conditions, x, torch.full((2,), 0.5), source)
    assert len(count) == 1
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", ["sd3", "cogview4"])
def test_copy_has_a_transformer_of_its_own(name):
    painter = drawn(name).painter
    other = copy.deepcopy(painter)
    assert other.transformer is not painter.transformer
    assert other.pipeline.vae is painter.pipeline.vae
    conditions = painter.encode(TEXTS)
    x = drawn(name).noise()
    t = torch.full((2,), 0.5)
    known = painter.predict_velocity(conditions, x, t)
    assert torch.equal(other.predict_velocity(conditions, x, t), known)
    for weight in other.transformer.parameters():
        weight.add_(0.1)
    assert not torch.equal(other.predict_velocity(conditions, x, t), known)
    assert torch.equal(painter.predict_velocity(conditions, x, t), known)

"""Reading pictures and editing against numbers of the public reference implementation (float32, random weights, original names)."""

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from agents.actor import Actor
from agents.collector import Collector
from agents.config import load_config
from agents.flow import Window
from agents.guidance import Guidance, Guided
from agents.loss import replay
from agents.models import Bagel, BagelConfig, ToyModel
from agents.models.vae import VaeDecoder, load_vae
from agents.models.vision import VisionConfig, VisionTower
from agents.supervised import teach
from agents.trainer import CLOCKED, Trainer
from unigrpo_env.flow_time import time_grid
from unigrpo_env.variants import make_variant
from unigrpo_env.vector import InterleavedGenVectorEnv

TOLERANCE = {"atol": 1e-4, "rtol": 0}
DATA = Path(__file__).parents[1] / "data"


@pytest.fixture(scope="module")
def editing():
    return load_file(DATA / "bagel_oracle_editing.safetensors")


@pytest.fixture(scope="module")
def bagel(editing):
    vision = VisionConfig(
        hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=3, image_size=40, patch_size=4, max_patches=10
    )
    config = BagelConfig(
        vocab_size=160, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4,
        max_latent_size=12, latent_height=6, latent_width=4, image_start_id=154, image_end_id=155, vision=vision,
    )  # fmt: skip
    model = Bagel(config)
    model.load_state_dict({name: value for name, value in editing.items() if not name.startswith(("in.", "out."))})
    model.look_with(None)  # the oracle's segments come one by one
    return model


@pytest.fixture
def read(bagel, editing):
    """Read named segments; returns the last text's logits and the context."""
    grid = VaeDecoder(None, 6, 4)

    def read_segments(*segments):
        context, logits = bagel.start(1), None
        for segment in segments:
            if segment == "src":
                latent = editing["in.src.latent"][None]
                tokens = latent.unflatten(3, (4, 2)).unflatten(2, (6, 2)).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
                assert tokens.shape == (1, grid.rows * grid.columns, 64)
                context = bagel.read_image(context, latent=tokens)
            elif segment.endswith("vit"):
                context = bagel.read_image(context, pixels=editing["in.vit.pixels"][None])
            else:
                logits, context = bagel.read_text(context, editing[f"in.{segment}.ids"][None])
        return logits, context

    return read_segments


def test_the_tower_and_the_connector(bagel, editing):
    pixels = editing["in.vit.pixels"][None]
    torch.testing.assert_close(bagel.vit_model.patches(pixels)[0], editing["in.vit.patches"])
    features = bagel.vit_model(pixels)
    torch.testing.assert_close(features[0], editing["out.vit.tower"], **TOLERANCE)
    embedded = bagel.connector(features) + bagel.vit_pos_embed.pos_embed[editing["in.vit.patch_pos"]]
    torch.testing.assert_close(embedded[0], editing["out.vit.embeds"], **TOLERANCE)


@pytest.mark.parametrize("grad", [False, True], ids=["cache", "training"])
def test_the_whole_context_of_an_edit(bagel, editing, read, grad):
    with torch.set_grad_enabled(grad):
        logits, _ = read("system", "src", "vit", "instr")
        torch.testing.assert_close(logits[0], editing["out.instr.logits"], **TOLERANCE)
        logits, context = read("system", "src", "vit", "instr", "thought")
    torch.testing.assert_close(logits[0], editing["out.thought.logits"], **TOLERANCE)
    # Ours keeps both markers of a picture before its tokens; theirs, around them. A set of keys has no order.
    order = [*range(8), 8, *range(10, 34), 9, 34, *range(36, 71), 35, *range(71, 90)]
    assert sorted(order) == list(range(90))
    ours = torch.tensor(order)
    for layer in range(2):
        for name, stored in (("k", context.keys), ("v", context.values)):
            found = stored[layer][0, :, : context.size].transpose(0, 1)[ours]
            torch.testing.assert_close(found, editing[f"out.context.{name}.{layer}"], **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "segments"), [("gen", ("system", "src", "vit", "instr", "thought")), ("novit", ("system", "src", "novit_instr"))]
)
def test_velocities_and_sampling_after_a_source(bagel, editing, read, name, segments):
    _, context = read(*segments)
    velocity = bagel.velocity(context.repeat(5), editing[f"in.{name}.x_t"], editing[f"in.{name}.t"])
    torch.testing.assert_close(velocity, editing[f"out.{name}.v"], **TOLERANCE)
    times, x = time_grid(6, shift=3.0), editing[f"in.{name}.noise"][None]
    for step in range(6):
        torch.testing.assert_close(x[0], editing[f"out.{name}.sample_x"][step], **TOLERANCE)
        x = x + bagel.velocity(context, x, times[step : step + 1]) * (times[step + 1] - times[step])
    torch.testing.assert_close(x[0], editing[f"out.{name}.sample_x"][6], **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize(
    ("after", "expected"), [(("system", "src", "vit", "instr"), "out.greedy.ids"), (("und.vit", "und.question"), "out.und.greedy.ids")]
)
def test_words_about_a_picture(bagel, editing, read, after, expected):
    ids = editing[expected]
    _, context = read(*after)
    found = [ids[0]]
    while len(found) < len(ids):
        logits, context = bagel.read_text(context, found[-1].view(1, 1))
        found.append(logits[0, -1].argmax())
    assert torch.stack(found).tolist() == ids.tolist()


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "guidance"),
    [
        ("text_channel", Guidance(4.0, 2.0, renorm="text_channel")),
        ("global", Guidance(4.0, 1.5, low=0.4, renorm="global")),
        ("channel", Guidance(3.0, 1.5, renorm="channel", renorm_min=0.3)),
        ("img_only", Guidance(1.0, 2.0)),
    ],
)
def test_two_way_guidance(bagel, editing, read, name, guidance):
    contexts = [
        read(*segments)[1] for segments in (("system", "src", "vit", "instr", "thought"), ("system", "src", "vit"), ("system", "instr"))
    ]
    times, x = time_grid(6, shift=3.0), editing["in.gen.noise"][None]
    for step in range(6):
        t = times[step : step + 1]
        velocity, without_text, without_image = (bagel.velocity(context, x, t) for context in contexts)
        guided = guidance.combine(velocity, without_text, t, without_image)
        if step == 0:
            torch.testing.assert_close(guided[0], editing[f"out.cfg.{name}.v0"], **TOLERANCE)
        x = x + guided * (times[step + 1] - t)
    torch.testing.assert_close(x[0], editing[f"out.cfg.{name}.final"], **TOLERANCE)


@torch.no_grad()
def test_rows_that_do_not_read_a_picture_are_as_if_there_was_none(small_bagel):
    ids, latent, pick = torch.tensor([[1, 7, 8], [1, 9, 5]]), torch.randn(2, 36, 48), torch.tensor([True, False])
    _, context = small_bagel.read_text(small_bagel.start(2), ids)
    context = small_bagel.read_image(context, latent, mask=pick)
    logits, _ = small_bagel.read_text(context, torch.tensor([[10], [11]]))
    for row in range(2):
        _, alone = small_bagel.read_text(small_bagel.start(1), ids[row : row + 1])
        if pick[row]:
            alone = small_bagel.read_image(alone, latent[row : row + 1])
        own, _ = small_bagel.read_text(alone, torch.tensor([[10 + row]]))
        torch.testing.assert_close(own[0], logits[row], atol=2e-5, rtol=0)


@torch.no_grad()
def test_a_drawn_picture_is_looked_at_as_if_its_pixels_were_given(bagel):
    """A model with a tower, told how latents look, sees both segments; so do its copies under guidance, and nothing of the decoder is saved."""
    latent, decode = torch.randn(2, 24, 64), torch.nn.Upsample(scale_factor=1)
    decode.forward = lambda latents: latents[:, :3, :63].unflatten(2, (7, 9)).sigmoid()
    fitted = bagel.vit_model.fit(decode(latent))
    told = copy.deepcopy(bagel)
    told.look_with(decode)
    given, _ = bagel.read_text(bagel.read_image(bagel.start(2), latent, fitted), torch.tensor([[1], [2]]))
    blind, _ = bagel.read_text(bagel.read_image(bagel.start(2), latent), torch.tensor([[1], [2]]))
    for reader in (told, Guided(told, Guidance(2.0))):
        seen, _ = reader.read_text(reader.read_image(reader.start(2), latent), torch.tensor([[1], [2]]))
        torch.testing.assert_close(seen, given)
        assert (seen - blind).abs().max() > 1e-3
    assert told.state_dict().keys() == bagel.state_dict().keys()


@pytest.mark.parametrize(
    ("height", "width", "fitted"), [(24, 24, (24, 24)), (10, 30, (16, 40)), (100, 50, (40, 20)), (3, 400, (16, 40)), (25, 27, (24, 28))]
)
def test_pictures_are_brought_to_a_size_that_the_tower_takes(bagel, height, width, fitted):
    tower = VisionTower(dataclasses.replace(bagel.config.vision, min_size=16))
    pixels = tower.fit(torch.rand(1, 3, height, width))
    assert pixels.shape[2:] == fitted
    assert -1 <= pixels.min() < 0 < pixels.max() <= 1
    tower.places(pixels, 10)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_of_a_model_with_a_vision_tower(seeing_bagel, tmp_path, dtype):
    """Policy and reference look alike, so nothing has moved before the first update; a resumed run is the run that was not stopped."""
    seeing_bagel.save_pretrained(tmp_path / "start")
    settings = [
        "env.variant=edit", "env.text_budget=4", "env.image_steps=6", "trainer.groups=2", "trainer.group_size=4", "evaluation.prompts=4",
        "output.tensorboard=false", "output.samples_every=0", "evaluation.every=0", "output.checkpoint_every=1",
        "trainer.minibatches=1", "trainer.iterations=2", f"model.dtype={dtype}", f"model.name={tmp_path / 'start'}", f"output.folder={tmp_path}",
    ]  # fmt: skip
    whole = Trainer(load_config("unigrpo", settings))
    first = whole.iterate()
    assert first["loss_velocity"] < 1e-12
    assert first["image_log_ratio"] < (1e-6 if dtype == "float32" else 1e-3)
    whole.save()
    resumed, expected = Trainer.resume(tmp_path).iterate(), whole.iterate()
    assert all(expected.pop(name) > 0 for name in CLOCKED)
    assert {name: resumed[name] for name in expected} == pytest.approx(expected, nan_ok=True)


def test_two_sources_are_read_alike_in_rollout_training_and_lessons(small_bagel):
    variant = make_variant("edit", source_images=2, text_budget=5, image_steps=4)
    env = InterleavedGenVectorEnv(variant, 8, copy=False)
    prompts = variant.task.prompts("train", 2, 0)
    episodes = Collector(env, Actor(small_bagel, window=Window(2, 0, 3)), 4).collect(prompts, 3).flatten(0, 1)
    assert (episodes["image_places"] == torch.tensor([0, 1])).all()
    said, legal = episodes["chosen_mask"], torch.stack([variant.rules.legal_tokens()] * 2)
    with torch.no_grad():
        found = replay(small_bagel, episodes, legal).log_prob
        torch.testing.assert_close(found[said], episodes["log_prob"][said], atol=1e-4, rtol=0)
        for number in range(2):
            changed = episodes.clone()
            changed["images"][:, number] += 0.5
            assert (replay(small_bagel, changed, legal).log_prob - found)[said].abs().max() > 1e-3, "each source matters"
    text, image = teach(small_bagel, variant, variant.task.lessons(2, 0), torch.Generator().manual_seed(0), 1.0)
    assert (text + image).isfinite()


def test_what_cannot_be_read(small_bagel, bagel):
    with pytest.raises(ValueError, match="without"):
        small_bagel.read_image(small_bagel.start(1), pixels=torch.zeros(1, 3, 28, 28))
    with pytest.raises(ValueError, match="got neither"):
        small_bagel.read_image(small_bagel.start(1))
    for shape in ((1, 3, 30, 28), (1, 3, 44, 28)):
        with pytest.raises(ValueError, match="multiples of 4 up to 40"):
            bagel.read_image(bagel.start(1), pixels=torch.zeros(shape))
    with pytest.raises(ValueError, match=r"look_with\(variant.decode\)"):
        Bagel(bagel.config).read_image(bagel.start(1), torch.zeros(1, 24, 64))
    with pytest.raises(NotImplementedError, match="ToyModel reads no pictures"):
        ToyModel().read_image(ToyModel().start(1), torch.zeros(1, 1, 12))


def test_a_model_with_eyes_is_saved_and_loaded(bagel, tmp_path):
    bagel.save_pretrained(tmp_path)
    again = Bagel.from_pretrained(tmp_path)
    assert again.config == bagel.config
    listed = {id(weight) for weights in again.parameter_lists().values() for weight in weights}
    assert not any(id(table) in listed for table in (again.vit_pos_embed.pos_embed, again.latent_pos_embed.pos_embed))


def test_the_whole_release_adds_up():
    """The published file: 14,607,260,128 values in 1223 tensors."""
    with torch.device("meta"):
        model = Bagel(BagelConfig(vision=VisionConfig()))
    weights = model.state_dict()
    assert len(weights) == 1223
    assert sum(weight.numel() for weight in weights.values()) == 14_607_260_128


@torch.no_grad()
def test_the_auto_encoder():
    oracle = load_file(DATA / "bagel_oracle_vae.safetensors")
    vae = load_vae({name: value for name, value in oracle.items() if not name.startswith(("in.", "out."))}, (32, 64), layers_per_block=1)
    decoder = VaeDecoder(vae, rows=6, columns=4)
    moments = vae.encode(oracle["in.image"]).latent_dist.parameters
    torch.testing.assert_close(moments, oracle["out.moments"], **TOLERANCE)

    def tokens(grid):
        return grid.unflatten(3, (4, 2)).unflatten(2, (6, 2)).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)

    torch.testing.assert_close(decoder.encode(oracle["in.image"] * 0.5 + 0.5, oracle["in.eps"]), tokens(oracle["out.z"]), **TOLERANCE)
    expected = (oracle["out.decoded"] * 0.5 + 0.5).clamp(0, 1)
    torch.testing.assert_close(decoder(tokens(oracle["in.z"])), expected, **TOLERANCE)

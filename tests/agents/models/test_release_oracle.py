"""A tiny folder in the released layout, played through env, actor and processor.

Every case starts from words and, for the edits, from a PNG file. The expected numbers are those of
the public reference implementation, in float32.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import unigrpo_env.mdp.state
from agents.models.bagel.model import Bagel
from agents.policy.actor import Actor
from agents.policy.guidance import Guidance
from rewards.image_bytes import read_image
from unigrpo_env.mdp.rules import Phase
from unigrpo_env.tasks.task import Prompt
from unigrpo_env.variants.variant import Scenario, make_variant
from unigrpo_env.vector_env import InterleavedGenVectorEnv

DATA = Path(__file__).parents[2] / "data"
ORACLE = json.loads((DATA / "bagel_release_oracle.json").read_text())
CASES = ORACLE["cases"]
DRAWING = [name for name in CASES if "drawn" in CASES[name]]
THINKING = [name for name in CASES if "generated_ids" in CASES[name]]
GUIDED = [name for name in DRAWING if CASES[name]["arguments"]["cfg_text_scale"] > 1]
TOLERANCE = {"atol": 1e-4, "rtol": 0}
ROWS = 2
"""The same episode twice: what rows share must serve them all."""


@dataclass
class Played:
    """All that an episode was; each list has one entry a step.

    Attributes:
        tokens: of the whole stream, at the end.
        parts: the contexts behind the velocities, by name.
        logits: before each token, `[ROWS, V]`.
        t: flow times, `[ROWS]`.
        x: before each denoising step, `[ROWS, L, C]`.
        velocities: of each step, guided where there is guidance.
        first: the velocities at the first step that guidance combines, by name.
        latent: the finished one, `[ROWS, L, C]`.
        images: `[ROWS, 3, height, width]`.
    """

    tokens: list = field(default_factory=list)
    parts: dict = field(default_factory=dict)
    logits: list = field(default_factory=list)
    t: list = field(default_factory=list)
    x: list = field(default_factory=list)
    velocities: list = field(default_factory=list)
    first: dict = field(default_factory=dict)
    latent: torch.Tensor | None = None
    images: torch.Tensor | None = None


class Never:
    """A task whose prompts come with the reset."""

    def prompts(self, split, count, seed):
        raise AssertionError("the prompts come with the reset")


def nothing(batch):
    """A reward that pays nothing."""
    return torch.zeros(len(batch))


def make_case_variant(arguments, processor):
    thinks = arguments["think"]
    text_budget = thinks * (arguments["max_think_token_n"] - 1)
    if "understanding_output" in arguments:
        scenario = Scenario(
            prompt_budget=100,
            text_budget=text_budget,
            image_budget=0,
            source_images=1,
            min_source_images=1,
        )
        return scenario.variant(processor, Never(), nothing)
    return make_variant(
        "edit" if "image" in arguments else "text_to_image",
        processor=processor,
        task=Never(),
        reward=nothing,
        text_budget=text_budget,
        image_steps=arguments["num_timesteps"] - 1,
        time_shift=arguments["timestep_shift"],
    )


def make_guidance(arguments):
    if "cfg_text_scale" not in arguments:
        return None
    low, high = arguments["cfg_interval"]
    return Guidance(
        text_scale=arguments["cfg_text_scale"],
        image_scale=arguments["cfg_img_scale"],
        low=low,
        high=high,
        renorm=arguments["cfg_renorm_type"],
        renorm_min=arguments["cfg_renorm_min"],
    )


@torch.no_grad()
def play(model, case, sources):
    arguments = CASES[case]["arguments"]
    env = InterleavedGenVectorEnv(make_case_variant(arguments, model.processor), ROWS)
    prompt = Prompt(arguments["text"], sources=sources)
    observation, _ = env.reset(seed=0, options={"prompts": [prompt] * ROWS})
    actor = Actor(model, temperature=0, guidance=make_guidance(arguments))
    actor.start(range(ROWS))
    played = Played()
    while bool((observation["phase"] != Phase.DONE).all()):
        decision = actor.act(observation)
        if observation["phase"][0] == Phase.TEXT:
            played.logits.append(actor.cache.logits[:, 0])
        else:
            note_step(played, model, actor, observation)
        observation, *_ = env.step(decision.env_action, decision.active)
    length = int(observation["num_tokens"][0])
    assert (observation["tokens"] == observation["tokens"][:1]).all()
    played.tokens = observation["tokens"][0, :length].tolist()
    played.latent = observation["latent"]
    if "drawn" in CASES[case]:
        played.images = env.images()
    return played


def note_step(played, model, actor, observation):
    x = observation["latent"]
    t = observation["t"][:, 0]
    context = actor.cache.context
    played.x.append(x)
    played.t.append(t)
    played.velocities.append(actor.model.predict_velocity(context, x, t))
    if played.parts:
        return
    played.parts = {"full": context}
    if actor.model is not model:
        for name in ("full", "without_text", "without_image"):
            part = getattr(context, name)
            if part is not None:
                played.parts[name] = part
                played.first[name] = model.predict_velocity(part, x, t)


@pytest.fixture(scope="module")
def tensors():
    return load_file(DATA / "bagel_release_oracle.safetensors")


class Episodes(dict):
    """Every case by its name, played when it is first asked for."""

    def __init__(self, model, tensors, source):
        super().__init__()
        self.model = model
        self.tensors = tensors
        self.source = source

    def __missing__(self, case):
        arguments = CASES[case]["arguments"]
        sources = ()
        noise = self.tensors["in.noise"]
        size = arguments.get("image_shapes")
        if "image" in arguments:
            sources = (self.source,)
            noise = self.tensors["in.edit.noise"]
            size = self.model.processor.source_size(*self.source.shape[1:])
        self.model.set_image_size(*size)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(unigrpo_env.mdp.state, "keyed_noise", fixed_noise(noise))
            self[case] = play(self.model, case, sources)
        return self[case]


@pytest.fixture(scope="module")
def episodes(tensors, tmp_path_factory):
    png = tmp_path_factory.mktemp("sources") / "source.png"
    Image.fromarray(tensors["in.source"].numpy()).save(png)
    model = Bagel.from_release(DATA / "bagel_release", dtype=torch.float32)
    model.processor.posterior_noise = lambda image: tensors["in.edit.vae_noise"]
    return Episodes(model, tensors, read_image(png))


def fixed_noise(noise):
    """In place of `keyed_noise`: the same for every key."""
    return lambda keys, shape: noise.view(1, *shape).repeat(len(keys), 1, 1)


def segment_ids(case, name):
    return [
        token
        for segment in CASES[case]["context"]
        if segment["name"] == name
        for token in segment["ids"]
    ]


def expect(found, tensors, name):
    """Compare all rows with a tensor of the oracle, if it has that."""
    if name in tensors:
        torch.testing.assert_close(found, tensors[name].expand_as(found), **TOLERANCE)


@pytest.mark.parametrize("case", CASES)
def test_stream(episodes, case):
    """The words that were read, and the likeliest token of every step."""
    expected = segment_ids(case, "system")
    if "image" in CASES[case]["arguments"]:
        expected += [524]
    expected += segment_ids(case, "prompt")
    # The thought is closed by the model or, if it is cut off, by the env.
    if case in THINKING:
        expected += [*CASES[case]["generated_ids"], 514]
    assert episodes[case].tokens == expected


@pytest.mark.parametrize("case", [name for name in THINKING if name not in GUIDED])
def test_logits(episodes, tensors, case):
    found = torch.stack(episodes[case].logits, 1)
    expected = tensors[f"out.{'think' if case == 'think_cut_off' else case}.logits"]
    steps = found.shape[1]
    assert steps == len(CASES[case]["generated_ids"]) - (case == "think_cut_off")
    torch.testing.assert_close(found, expected[:steps].expand_as(found), **TOLERANCE)


@pytest.mark.parametrize("case", DRAWING)
def test_contexts(episodes, case):
    """How many keys stand before the image, and at which position it begins."""
    parts = episodes[case].parts
    expected = {"full": (CASES[case]["drawn"]["keys_before"], CASES[case]["drawn"]["rope"])}
    for name in ("without_text", "without_image"):
        expected[name] = (CASES[case][name]["keys"], CASES[case][name]["rope"])
    for name, part in parts.items():
        if case in GUIDED or name == "full":
            keys = part.valid[:, : part.size].sum(1)
            assert keys.tolist() == [expected[name][0]] * ROWS, name
            assert part.position.tolist() == [expected[name][1]] * ROWS, name


@pytest.mark.parametrize("case", DRAWING)
def test_velocities(episodes, tensors, case):
    played = episodes[case]
    t = torch.stack(played.t, 1)
    torch.testing.assert_close(t, tensors[f"out.{case}.t"].expand_as(t))
    velocities = torch.stack(played.velocities, 1)
    assert {f"out.{case}.v", f"out.{case}.v0"} & tensors.keys()
    expect(velocities, tensors, f"out.{case}.v")
    expect(velocities[:, 0], tensors, f"out.{case}.v0")
    expect(torch.stack(played.x, 1), tensors, f"out.{case}.x")


@pytest.mark.parametrize("case", GUIDED)
def test_velocities_that_guidance_combines(episodes, tensors, case):
    first = episodes[case].first
    expect(first["full"], tensors, f"out.{case}.v0_plain")
    expect(first["without_text"], tensors, f"out.{case}.v0_without_text")
    name = f"out.{case}.v0_without_image"
    assert ("without_image" in first) == (name in tensors)
    if name in tensors:
        expect(first["without_image"], tensors, name)


@pytest.mark.parametrize("case", DRAWING)
def test_drawn_image(episodes, tensors, case):
    played = episodes[case]
    expect(played.latent, tensors, f"out.{case}.latent")
    name = f"out.{case}.image"
    if name in tensors:
        found = (played.images * 255).byte().permute(0, 2, 3, 1).int()
        apart = (found - tensors[name].int()).abs()
        # Where a value lies on the edge between two bytes it may fall to either side.
        assert apart.max() <= 1
        assert (apart > 0).float().mean() < 0.001

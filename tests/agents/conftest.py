"""Oracles, and short episodes to learn from.

The oracles are small random models that were run through the public reference implementation. All
are float32 with the original weight names. Inputs are stored as `in.*`, results as `out.*`.
"""

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from agents.models.bagel.model import Bagel, BagelConfig
from agents.models.bagel.vision import VisionConfig
from agents.policy.actor import Actor
from agents.policy.sde import Window
from agents.rollout.collector import Collector
from agents.training.comparison import add_advantages
from unigrpo_env.tasks.shapes.editing import EditTask
from unigrpo_env.variants.variant import make_variant
from unigrpo_env.vector_env import InterleavedGenVectorEnv

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture(scope="session")
def oracle():
    """Text to image."""
    return load_file(DATA / "bagel_oracle.safetensors")


@pytest.fixture(scope="session")
def model(oracle):
    """Our model with the oracle's weights."""
    config = BagelConfig(
        vocab_size=160,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_latent_size=12,
        latent_height=8,
        latent_width=8,
        image_start_id=154,
        image_end_id=155,
    )
    return _with_weights_of(oracle, config)


@pytest.fixture
def read(model, oracle):
    """Read named text segments by a model; returns the last logits and the context."""

    def read_segments(*segments, by=model):
        context = by.empty_context(1)
        logits = None
        for segment in segments:
            logits, context = by.append_text(context, oracle[f"in.{segment}.ids"][None])
        return logits, context

    return read_segments


@pytest.fixture(scope="session")
def editing_oracle():
    """Reading images, and editing."""
    return load_file(DATA / "bagel_oracle_editing.safetensors")


@pytest.fixture(scope="session")
def editing_model(editing_oracle):
    """Our model with the weights of the editing oracle; it has a vision encoder, no processor."""
    vision = VisionConfig(
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=3,
        image_size=40,
        patch_size=4,
        max_patches=10,
    )
    config = BagelConfig(
        vocab_size=160,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_latent_size=12,
        latent_height=6,
        latent_width=4,
        image_start_id=154,
        image_end_id=155,
        vision=vision,
    )
    return _with_weights_of(editing_oracle, config)


@pytest.fixture
def source_latent(editing_oracle):
    """The source of the edit as latent tokens."""
    return _tokens(editing_oracle["in.src.latent"][None])


@pytest.fixture
def read_editing(editing_model, editing_oracle):
    """Read named segments of text or image; returns the last text's logits and the context."""

    def read_segments(*segments):
        context = editing_model.empty_context(1)
        logits = None
        for segment in segments:
            if segment == "src":
                latent = _tokens(editing_oracle["in.src.latent"][None])
                context = editing_model.append_latents(context, latent)
            elif segment.endswith("vit"):
                pixels = editing_oracle["in.vit.pixels"][None]
                context = editing_model.append_pixels(context, pixels)
            else:
                ids = editing_oracle[f"in.{segment}.ids"][None]
                logits, context = editing_model.append_text(context, ids)
        return logits, context

    return read_segments


def _with_weights_of(oracle, config):
    names = [name for name in oracle if not name.startswith(("in.", "out."))]
    model = Bagel(config)
    model.load_state_dict({name: oracle[name] for name in names})
    return model


def _tokens(latent):
    """Latents `[N, 16, 12, 8]` as tokens of 2 x 2 squares, `[N, 24, 64]`."""
    squares = latent.unflatten(3, (4, 2)).unflatten(2, (6, 2))
    return squares.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


# What no scenario of the library does by itself.
VARIANTS = {
    "text_alone": ("text_to_image", {"image_budget": 0}),
    "last_text": ("text_to_image", {"text_after_images": True}),
    "mixed_sources": ("edit", {"source_images": 2, "min_source_images": 0}),
}


class MixedSourcesTask(EditTask):
    """Prompts with no source image, one, and two, in turn."""

    def prompts(self, split, count, seed):
        found = []
        for number, prompt in enumerate(super().prompts(split, count, seed)):
            found.append(dataclasses.replace(prompt, sources=prompt.sources[: number % 3]))
        return found


def uneven_reward(episodes):
    """Differs inside groups, whatever was drawn and written; it has a component `red`."""
    brightness = episodes.images.mean((1, 2, 3)) * 100 % 1
    letters = torch.tensor([sum(map(ord, text)) % 7 for text in episodes.texts])
    return {"reward": brightness + letters, "red": episodes.images[:, 0].mean((1, 2))}


@pytest.fixture
def short_variant():
    """Make a variant whose episodes are short: `short_variant(name, **settings)`."""

    def make(name, **settings):
        scenario, own = VARIANTS.get(name, (name, {}))
        defaults = {"text_budget": 5, "image_steps": 4, "reward": uneven_reward}
        if name == "mixed_sources":
            defaults["task"] = MixedSourcesTask(2)
        return make_variant(scenario, **(defaults | own | settings))

    return make


@pytest.fixture
def collect():
    """Collect three groups of three episodes; returns a `Trajectory` of batch size [3, 3].

    Further arguments are those of the actor.
    """

    def play(model, variant, *, prompts=None, seed=3, shared_noise=False, **settings):
        prompts = prompts or variant.task.prompts("train", 3, 0)
        env = InterleavedGenVectorEnv(variant, 3 * len(prompts), copy=False)
        actor = Actor(model, **({"window": Window(2, 0, 3)} | settings))
        collector = Collector(env, actor, 3, shared_noise=shared_noise)
        return collector.collect(prompts, seed)

    return play


@pytest.fixture
def collect_ragged(collect, short_variant):
    """Episodes of `reflect` that draw different numbers of images; the variant comes first."""

    def play(model):
        variant = short_variant("reflect")
        first = collect(model, variant).flatten(0, 1)
        # What row 0 writes first after its first image ends an episode from now on.
        after = first.image_positions[0, 0] - first.prompt_length[0] + 2
        rules = dataclasses.replace(variant.rules, end_id=int(first.tokens[0, after]))
        variant = dataclasses.replace(variant, rules=rules)
        episodes = collect(model, variant)
        assert len(episodes.images_drawn.unique()) > 1
        return variant, episodes

    return play


@pytest.fixture
def prepare():
    """Give collected episodes what the trainer adds; returns a `Trajectory` of N rows."""

    def add(episodes, variant, advantage="episode"):
        add_advantages(episodes, advantage, variant.rules.rounds, max_unscored=1.0)
        flat = episodes.flatten(0, 1)
        flat.episode_weight = torch.full((len(flat),), 1 / len(flat))
        flat.token_weight = flat.episode_weight
        return flat

    return add

"""Speed and memory, one JSON line a figure.

    python tests/benchmarks/bench.py [--pairs 20] [--only a | memory | painter]

(a) collecting through the env against a bare loop of the same model calls; (b) a whole iteration
against that loop with an update written by hand; (c) the share of an iteration inside the model's
forward and backward; (d) bytes kept a trajectory against what training must have; (e) cost against
episodes, denoising steps and thought length; (f) time and memory of a rollout and of a training
pass when the images of an episode double, beside what the arithmetic says: the linear cost of what
a round adds, plus attention to all that stands; (g) memory, see `memory.py`; (h) what asking a
pipeline of diffusers costs, see `painting.py`.

The loops run in turn (one, other, one again). A ratio is the median over such rounds of the mean of
`one`'s two times over `other`'s between them, so that a machine that slows down for a while slows
both; `a_a` is the median of `one` over `one` again: how far from 1 chance alone leads.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import memory
import painting
import torch
from bare_loop import OPEN_IMAGE, Bare, W
from torch import Tensor

from agents.config import load_config
from agents.config.schema import AlgorithmSettings
from agents.models.base import UnifiedModel
from agents.models.registry import load_model
from agents.objectives.advantages import expand_advantage, mask_steps
from agents.objectives.loss import UniGRPOLoss
from agents.policy.actor import Actor, Decision
from agents.policy.sde import Window
from agents.rollout.collector import Collector
from agents.training.trainer import Trainer, derived_seed
from agents.trajectory import Trajectory
from rewards import EpisodeBatch
from unigrpo_env.mdp.rules import Phase
from unigrpo_env.tasks.task import Prompt
from unigrpo_env.variants.variant import make_variant
from unigrpo_env.vector_env import InterleavedGenVectorEnv

Figure = dict[str, Any]
Loop = Callable[[], object]


def timed(function: Loop) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def ratio(one: Loop, other: Loop, pairs: int) -> dict[str, float]:
    """Time of `one` over the time of `other`, and of `one` over itself: medians over neighbours."""
    one()
    other()
    firsts = []
    betweens = []
    ratios = []
    repeats = []
    for _ in range(pairs):
        first = timed(one)
        between = timed(other)
        again = timed(one)
        firsts.append(first)
        betweens.append(between)
        ratios.append((first + again) / 2 / between)
        repeats.append(first / again)
    return {
        "ratio": round(median(ratios), 4),
        "a_a": round(median(repeats), 4),
        "seconds": round(median(firsts), 4),
        "bare_seconds": round(median(betweens), 4),
    }


def make_trainer() -> Trainer:
    return Trainer(
        load_config(
            [
                "trainer.minibatches=1",
                "optimizer.text_lr=1e-9",
                "optimizer.image_lr=1e-9",
                "output.folder=outputs/bench",
            ]
        )
    )


def model_share(trainer: Trainer) -> float:
    """Share of an iteration's wall time inside the model's methods and the backward pass."""
    spent = 0.0

    def clocked(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal spent
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent += time.perf_counter() - began

        return call

    model = type(trainer.model)
    methods = ((model, "append_text"), (model, "predict_velocity"), (Tensor, "backward"))
    originals = [getattr(owner, name) for owner, name in methods]
    for owner, name in methods:
        setattr(owner, name, clocked(getattr(owner, name)))
    try:
        whole = timed(lambda: [trainer.iterate() for _ in range(5)])
    finally:
        for (owner, name), original in zip(methods, originals, strict=True):
            setattr(owner, name, original)
    return spent / whole


NEEDED = (
    "prompt_tokens", "tokens", "text_mask", "chosen_mask", "log_prob", "window_latents",
    "window_means", "latent",
)  # fmt: skip
"""What training must have of an episode."""


def bytes_ratio(trainer: Trainer) -> float:
    """What a collector keeps, over `NEEDED`."""
    collector = trainer.collector
    prompts = trainer.variant.task.prompts("train", collector.groups, 0)
    episodes = collector.collect(prompts, 0)
    least = 0
    for name in NEEDED:
        tensor = getattr(episodes, name)
        least += tensor.numel() * tensor.element_size()
    return episodes.bytes() / least


class Patient(Actor):
    """An actor that never ends a thought: its words are spent by the budget."""

    def act(self, observation: dict[str, Tensor]) -> Decision:
        legal = observation["legal_tokens"].clone()
        legal[:, OPEN_IMAGE] = False
        return super().act({**observation, "legal_tokens": legal})


def play_loop(model: UnifiedModel[Any], rows: int = 32, steps: int = 10, words: int = 8) -> Loop:
    """A rollout of so many episodes, denoising steps and words."""
    variant = make_variant("text_to_image", image_steps=steps, text_budget=words)
    env = InterleavedGenVectorEnv(variant, rows, copy=False)
    actor = Patient(model)
    prompts = variant.task.prompts("train", rows, 0)

    def play() -> None:
        observation, _ = env.reset(seed=0, options={"prompts": prompts})
        actor.start(range(rows))
        while (observation["phase"] != Phase.DONE).any():
            decision = actor.act(observation)
            observation = env.step(decision.env_action, decision.active)[0]

    return play


def scaling(pairs: int) -> Iterator[Figure]:
    """Time when one size doubles, over time before: at most 2, and a little more for attention."""
    model = load_model("tiny")
    sizes: list[tuple[str, dict[str, int], dict[str, int]]] = [
        ("episodes 64 / 32", {"rows": 32}, {"rows": 64}),
        ("denoising steps 20 / 10", {"steps": 10}, {"steps": 20}),
        ("thought length 48 / 24", {"words": 24, "steps": 1}, {"words": 48, "steps": 1}),
    ]
    for name, small, large in sizes:
        found = ratio(play_loop(model, **large), play_loop(model, **small), pairs)
        yield {"figure": "e", "name": name, **found}


def arithmetic(model: Any, rounds: int, words: int, image_passes: int) -> float:
    """Multiplications of an episode.

    Each token goes through its expert's weights, and attends to what stands before it.
    """
    config = model.config
    image = config.latent_height * config.latent_width + 2
    layers = model.language_model.model.layers
    weights = sum(weight.numel() for weight in layers.parameters()) / 2
    context = 4
    total = 0.0

    def cost(tokens: int, seen: int) -> float:
        return tokens * (weights + 2 * seen * config.hidden_size * config.num_hidden_layers)

    for number in range(rounds):
        total += cost(words + 1, context)
        context += words + 1
        total += image_passes * cost(image, context + image)
        if number < rounds - 1:
            total += cost(image, context + image)
            context += image
    return total


@dataclass
class RoundParts:
    """The loops of figure (f) for one number of images, and what they hold in bytes."""

    collect: Loop
    train: Loop
    sizes: dict[str, int]


def random_reward(episodes: EpisodeBatch) -> Tensor:
    return torch.rand(len(episodes))


def round_parts(model: UnifiedModel[Any], images: int, rows: int, words: int) -> RoundParts:
    """Episodes of so many images, every thought of the same length."""
    variant = make_variant("story", images=images, text_budget=words, reward=random_reward)
    env = InterleavedGenVectorEnv(variant, rows, copy=False)
    actor = Patient(model, window=Window(W, 0, 5))
    collector = Collector(env, actor, rows)

    def collect() -> Trajectory:
        return collector.collect([Prompt("draw")], 0).flatten(0, 1)

    episodes = collect()
    assert (episodes.images_drawn == images).all()
    add_weights(episodes)
    settings = AlgorithmSettings(velocity_weight=0.0)
    loss = UniGRPOLoss(model, None, variant.rules.legal_by_round(), settings)

    def forward() -> Tensor:
        out = loss(episodes)
        return out["loss_text"] + out["loss_image"]

    sizes = {
        "context": context_bytes(actor.cache.context),
        "trajectory": episodes.bytes(),
        "training pass": kept_bytes(forward, model),
    }
    return RoundParts(collect, lambda: forward().backward(), sizes)


def add_weights(episodes: Trajectory) -> None:
    """What the trainer adds to episodes before it updates."""
    rows = len(episodes)
    advantage = torch.linspace(-1, 1, rows)
    episodes.text_advantage, episodes.image_advantage = expand_advantage(episodes, advantage)
    episodes.step_mask = mask_steps(episodes)
    episodes.episode_weight = torch.full((rows,), 1 / rows)
    episodes.token_weight = episodes.episode_weight


def context_bytes(context: Any) -> int:
    held = 0
    for tensor in (*context.keys, *context.values):
        held += tensor[:, :, : context.size].numel() * tensor.element_size()
    return held


def kept_bytes(forward: Callable[[], Tensor], model: UnifiedModel[Any]) -> int:
    """Bytes that a forward keeps for its way back, the model's own aside."""
    storages = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        # Held, so that no other one takes its place.
        storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        forward()
    own = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept = [storage for pointer, storage in storages.items() if pointer not in own]
    return sum(storage.nbytes() for storage in kept)


def rounds(pairs: int, rows: int = 16, words: int = 8) -> Iterator[Figure]:
    """Episodes of 1, 2, 4 and 8 images."""
    model = load_model("tiny")
    known = {count: round_parts(model, count, rows, words) for count in (1, 2, 4, 8)}
    for count in (1, 2, 4):
        small = known[count]
        large = known[2 * count]
        loops = (
            ("rollout", large.collect, small.collect, 10),
            ("training pass", large.train, small.train, W),
        )
        for name, one, other, passes in loops:
            more = arithmetic(model, 2 * count, words, passes)
            limit = round(more / arithmetic(model, count, words, passes), 3)
            title = f"{name}, images {2 * count} / {count}"
            yield {"figure": "f", "name": title, "limit": limit, **ratio(one, other, pairs)}
        title = f"bytes, images {2 * count} / {count}"
        memory = {}
        for name, size in large.sizes.items():
            memory[name] = round(size / small.sizes[name], 3)
        yield {"figure": "f", "name": title, "limit": limit, **memory}


def figures(only: str, pairs: int) -> Iterator[Figure]:
    """The figures whose letters are in `only`."""
    if set(only) & set("abcdef"):
        yield from speed(only, pairs)
    if "g" in only:
        yield from memory.figures()
    if "h" in only:
        yield from painting.figures(pairs)


def speed(only: str, pairs: int) -> Iterator[Figure]:
    """All but memory."""
    trainer = make_trainer()
    seed = derived_seed(0, 0)
    bare = Bare(trainer, seed)

    def collect() -> None:
        trainer.collector.collect(bare.prompts, seed)

    def iterate() -> None:
        trainer.iteration = 0
        trainer.iterate()

    if "a" in only:
        found = ratio(collect, bare.collect, pairs)
        yield {"figure": "a", "name": "collecting / bare loop", "limit": 1.03, **found}
    if "b" in only:
        found = ratio(iterate, bare.iterate, pairs)
        yield {"figure": "b", "name": "iteration / bare iteration", "limit": 1.08, **found}
    if "c" in only:
        share = round(model_share(trainer), 4)
        yield {"figure": "c", "name": "share inside the model", "limit": 0.85, "share": share}
    if "d" in only:
        kept = round(bytes_ratio(trainer), 4)
        yield {"figure": "d", "name": "bytes kept / bytes needed", "limit": 1.1, "ratio": kept}
    if "e" in only:
        yield from scaling(pairs)
    if "f" in only:
        yield from rounds(pairs)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument(
        "--only", default="abcdefgh", help="letters of the figures; memory is g, painter is h"
    )
    arguments = parser.parse_args()
    only = arguments.only.replace("memory", "g").replace("painter", "h")
    for figure in figures(only, arguments.pairs):
        print(json.dumps({**figure, "threads": torch.get_num_threads()}), flush=True)


if __name__ == "__main__":
    main()

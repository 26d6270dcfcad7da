"""Memory against what is needed, one figure each; `bench.py --only memory` prints them.

A BAGEL of half a billion random weights in the layout of the release is loaded, plays and learns,
each in a process of its own. Its resident memory at most, less what the same process held after a
run of the tiny model, is divided by a sum that `Needed` writes out. Images are not decoded: what an
auto-encoder takes does not depend on the model, nor on the number of episodes.

All runs but the loading compute in float32: CPUs without bfloat16 units are some 40 times slower in
it. In bfloat16 every term of the sum but the trajectory's and the logits' is half as large.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from agents.config import load_config
from agents.models.bagel.config import BagelConfig
from agents.models.bagel.model import Bagel
from agents.models.registry import load_model
from agents.policy.actor import Actor, Decision
from agents.policy.tokens import LOGITS_AT_ONCE
from agents.storage import write_json, write_tensors
from agents.training.trainer import Trainer
from agents.trajectory import Trajectory

Figure = dict[str, Any]

RELEASE = Path(__file__).parents[1] / "data" / "bagel_release"
"""Tokenizer and auto-encoder of tiny size."""
SIZES = {
    "vocab_size": 152064,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
}
PIXELS = 512
"""Side of an image: 32 x 32 latent tokens of 64 values."""
PROMPT = {"rollout": 900, "update": 100}
"""Words of a prompt, one token each."""
SYSTEM = 60
"""Tokens of the system text, and of the marks."""
THOUGHT = {"rollout": 60, "update": 150}
"""Tokens of a thought, all of which are used. Those of an update need several chunks of logits."""
ROWS = 2
"""Episodes of a rollout, and half of those of the larger one."""
MAX_ROWS = 1
"""Images that are denoised at once."""
RANK = 64
FLOAT = 4
"""Bytes of a float32."""


@dataclass
class Needed:
    """What must be in memory at once, in bytes.

    Attributes:
        weights: all of the model.
        cache: keys and values of all that the model has read.
        trajectory: what is kept of the episodes.
        sampling: the logits of the next token of each row, masked, as log-probabilities, and as
            probabilities in float64.
        activations: of one chunk.
        training: gradients and both moments of AdamW, of what is trained.
    """

    weights: int = 0
    cache: int = 0
    trajectory: int = 0
    sampling: int = 0
    activations: int = 0
    training: int = 0

    @property
    def total(self) -> int:
        return sum(vars(self).values())


def cache_bytes(rows: int, slots: int) -> int:
    """Of every layer; a noisy image needs none."""
    width = SIZES["hidden_size"] // SIZES["num_attention_heads"] * SIZES["num_key_value_heads"]
    return rows * slots * SIZES["num_hidden_layers"] * 2 * width * FLOAT


def image_tokens() -> int:
    """Of an image and the two markers around it."""
    return (PIXELS // 16) ** 2 + 2


def velocity_bytes(rows: int) -> int:
    """A forward: in the MLP of a layer the gate, what it multiplies and the product live at once.

    Beside them are the layer's input, what it has become after attention, and its norm.
    """
    width = 3 * SIZES["intermediate_size"] + 3 * SIZES["hidden_size"]
    return rows * image_tokens() * width * FLOAT


def update_bytes(rows: int) -> int:
    """A forward and backward with checkpoints, or the logits of a part of a text.

    Each layer's input is kept. One layer is computed again and keeps all: norms, queries, keys,
    values and the result of attention, some 12 hidden states, and of its MLP the gate, its
    activation, what it multiplies, the product, and the gradients of two. Logits, masked logits,
    their exponentials and their gradient are four tables.
    """
    hidden = SIZES["num_hidden_layers"] * SIZES["hidden_size"]
    layer = 12 * SIZES["hidden_size"] + 6 * SIZES["intermediate_size"]
    image = rows * image_tokens() * (hidden + layer) * FLOAT
    return max(image, 4 * LOGITS_AT_ONCE * FLOAT)


class Peak:
    """The most resident memory of this process since the last `begin`, in bytes. Linux alone."""

    def begin(self) -> None:
        # Documented in proc(5): the kernel forgets the peak.
        Path("/proc/self/clear_refs").write_text("5")

    def read(self, name: str = "VmHWM") -> int:
        status = Path("/proc/self/status").read_text()
        found = re.search(rf"{name}:\s+(\d+) kB", status)
        assert found is not None
        return int(found[1]) * 1024


class LongThoughts(Actor):
    """An actor that never ends a thought: its words are spent by the budget."""

    closing: int

    def act(self, observation: dict[str, Tensor]) -> Decision:
        legal = observation["legal_tokens"].clone()
        legal[:, self.closing] = False
        return super().act({**observation, "legal_tokens": legal})


def make_trainer(folder: Path, run: str, rows: int, *changes: str) -> Trainer:
    """A trainer of one group; its model is that of the folder."""
    trainer = Trainer(
        load_config(
            [
                f"model.name={folder}",
                f"env.prompts={folder / run}.txt",
                f"output.folder={folder / 'run'}",
                f"trainer.group_size={rows}",
                # No room for longer prompts, because the model makes all that the budgets allow.
                f"env.prompt_budget={PROMPT[run] + SYSTEM}",
                f"env.text_budget={THOUGHT[run]}",
                "env.reward=brevity",
                "env.image_steps=2",
                "algorithm.window_size=1",
                "algorithm.window_high=1",
                "trainer.groups=1",
                "trainer.minibatches=1",
                f"model.max_rows={MAX_ROWS}",
                "model.vision=false",
                *changes,
            ]
        )
    )
    actor = trainer.collector.actor
    actor.__class__ = LongThoughts
    actor.closing = trainer.variant.rules.open_image_id  # type: ignore[attr-defined]
    trainer.processor.decode_latents = no_images  # type: ignore[method-assign]
    return trainer


def no_images(latents: Tensor) -> Tensor:
    return torch.zeros(len(latents), 3, PIXELS, PIXELS)


def needed_of(trainer: Trainer, episodes: Trajectory, rows: int) -> Needed:
    """What a rollout needs, without activations; `rows` contexts are held."""
    weights = sum(weight.numel() * weight.element_size() for weight in trainer.model.parameters())
    slots = int(episodes.prompt_length.max()) + int(episodes.text_mask.sum(-1).max())
    return Needed(weights, cache_bytes(rows, slots), episodes.bytes())


def rollout(folder: Path, peak: Peak, rows: int) -> Needed:
    # The reference would be a second model.
    trainer = make_trainer(folder, "rollout", rows, "algorithm.velocity_weight=0")
    prompts = trainer.variant.task.prompts("train", 1, 0)
    peak.begin()
    needed = needed_of(trainer, trainer.collector.collect(prompts, 0), rows)
    needed.sampling = rows * SIZES["vocab_size"] * (3 * FLOAT + 8)
    needed.activations = velocity_bytes(MAX_ROWS)
    return needed


def update(folder: Path, peak: Peak) -> Needed:
    """A rollout and an update by adapters in both experts, one episode at a time."""
    trainer = make_trainer(
        folder,
        "update",
        2,
        "model.checkpointing=true",
        f"model.lora.text.rank={RANK}",
        f"model.lora.image.rank={RANK}",
        "trainer.micro_batches=2",
    )
    peak.begin()
    trainer.iterate()
    episodes = next(iter(trainer.buffer))
    needed = needed_of(trainer, episodes, 1)
    needed.activations = update_bytes(MAX_ROWS)
    for parameters in trainer.optimization.experts.values():
        needed.training += 3 * sum(weight.numel() for weight in parameters) * FLOAT
    return needed


def load(folder: Path, peak: Peak) -> Needed:
    """Load as the release is loaded: in the dtype of the file."""
    model = load_model(str(folder), vision=False, dtype=torch.bfloat16)
    assert model.latent_shape == ((PIXELS // 16) ** 2, 64)
    return Needed(weights=(folder / "ema.safetensors").stat().st_size)


RUNS: dict[str, Callable[..., Needed]] = {"rollout": rollout, "update": update, "load": load}


def measure(name: str, folder: Path, *rows: int) -> Figure:
    """Run one of `RUNS` in this process."""
    # What the libraries load, and keep for good, is no part of it.
    Trainer(load_config([f"output.folder={folder / 'tiny'}", "trainer.groups=2"])).iterate()
    peak = Peak()
    before = peak.read("VmRSS")
    peak.begin()
    needed = RUNS[name](folder, peak, *rows)
    found = peak.read() - before
    return {"bytes": found, "needed": needed.total, "parts": vars(needed)}


def measure_apart(name: str, folder: Path, *rows: int) -> Figure:
    """The same in a new process, whose freed memory goes back at once."""
    settings = {
        "MALLOC_TRIM_THRESHOLD_": "65536",
        "MALLOC_MMAP_THRESHOLD_": "65536",
        # Threads that wait in a loop would slow each other down on a busy machine.
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    done = subprocess.run(
        [sys.executable, __file__, name, str(folder), *map(str, rows)],
        env={**os.environ, **settings},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def write_folder(folder: Path) -> None:
    """A folder like the release's, with random weights in bfloat16."""
    shutil.copytree(RELEASE, folder, dirs_exist_ok=True)
    sizes = json.loads((RELEASE / "llm_config.json").read_text())
    write_json({**sizes, **SIZES}, folder / "llm_config.json")
    for run, words in PROMPT.items():
        prompt = " ".join(["red"] * words)
        (folder / f"{run}.txt").write_text(f"{prompt}\n{prompt} too\n")
    with torch.device("meta"):
        model = Bagel(BagelConfig(**SIZES, max_latent_size=PIXELS // 16))
    weights = {}
    for name, weight in model.named_parameters():
        weights[name] = torch.empty(weight.shape).uniform_(-0.03, 0.03).bfloat16()
    write_tensors(weights, folder / "ema.safetensors")


def figures() -> Iterator[Figure]:
    """All figures, with the goal of each as its `limit`."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_folder(folder)
        found = measure_apart("load", folder)
        yield _figure("loading / file", 1.1, found)
        small = measure_apart("rollout", folder, ROWS)
        yield _figure(f"rollout of {ROWS} / needed", 1.3, small)
        large = measure_apart("rollout", folder, 2 * ROWS)
        yield _figure(f"rollout of {2 * ROWS} / needed", 1.3, large)
        # Beyond the rows of a chunk an episode costs what is kept of it, and nothing else.
        kept = {part: small["parts"][part] for part in ("cache", "trajectory", "sampling")}
        more = {"bytes": large["bytes"] - small["bytes"], "needed": sum(kept.values())}
        yield _figure(f"{ROWS} more episodes / what is kept of them", 1.3, {**more, "parts": kept})
        yield _figure("update / needed", 1.3, measure_apart("update", folder))


def _figure(name: str, limit: float, found: Figure) -> Figure:
    ratio = round(found["bytes"] / found["needed"], 3)
    mib = {part: round(size / 2**20) for part, size in found["parts"].items() if size}
    used = round(found["bytes"] / 2**20)
    return {"figure": "g", "name": name, "limit": limit, "ratio": ratio, "mib": used, "parts": mib}


if __name__ == "__main__":
    run, target, *counts = sys.argv[1:]
    print(json.dumps(measure(run, Path(target), *map(int, counts))), flush=True)

"""Speed, one JSON line a figure.

    python tests/benchmarks/bench.py [--pairs 20] [--only a]

(a) collecting through the env against a bare loop of the same model calls; (b) a whole iteration against that loop with a hand-written update;
(c) the share of an iteration inside the model's forward and backward; (d) bytes kept a trajectory against what training must have;
(e) cost against episodes, denoising steps and thought length; (f) time and memory of a rollout and of a training pass when the pictures of an episode
double, beside what the arithmetic says: the linear cost of what a round adds, plus attention to all that stands.

The loops run in turn (one, other, one again). A ratio is the median over such rounds of the mean of `one`'s two times over `other`'s between them, so
that a machine that slows down for a while slows both; `a_a` is the median of `one` over `one` again: how far from 1 chance alone leads.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F

from agents.actor import Actor, Decision
from agents.collector import Collector
from agents.config import AlgorithmSettings, load_config
from agents.flow import Window
from agents.loss import UniGRPOLoss
from agents.models import load_model
from agents.trainer import Trainer, derived_seed
from rewards import REWARDS, EpisodeBatch
from unigrpo_env.mdp import Phase
from unigrpo_env.tasks import Prompt
from unigrpo_env.variants import make_variant
from unigrpo_env.vector import InterleavedGenVectorEnv

W, A = 3, 0.8


def timed(function: Callable[[], object]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def ratio(one: Callable[[], object], other: Callable[[], object], pairs: int) -> dict[str, float]:
    """Time of `one` over the time of `other`, and of `one` over itself: medians over neighbours in time."""
    one(), other()
    turns = [tuple(map(timed, (one, other, one))) for _ in range(pairs)]
    return {
        "ratio": round(median((first + again) / 2 / between for first, between, again in turns), 4),
        "a_a": round(median(first / again for first, _, again in turns), 4),
        "seconds": round(median(first for first, _, _ in turns), 4),
        "bare_seconds": round(median(between for _, between, _ in turns), 4),
    }


class Bare:
    """The same model calls written out by hand: no env, no actor, no collector, no trainer."""

    def __init__(self, trainer: Trainer, seed: int) -> None:
        self.model, self.reference = trainer.model, trainer.reference
        self.groups, self.size = trainer.config.trainer.groups, trainer.config.trainer.group_size
        variant = trainer.variant
        self.legal, self.times, self.budget = variant.rules.legal_tokens(), variant.rules.times(), variant.rules.text_budget
        self.variant, self.prompts = variant, variant.task.prompts("train", self.groups, seed)
        encoded = [trainer.env.episodes.encode(p) for p in self.prompts]
        longest = max(map(len, encoded))
        self.ids = torch.tensor([row + [0] * (longest - len(row)) for row in encoded])
        self.mask = torch.arange(longest) < torch.tensor([[len(row)] for row in encoded])
        # The draws that the actor made for these episodes, so that both loops write the same words.
        trainer.collector.collect(self.prompts, seed)
        actor = trainer.collector.actor
        at = trainer.env.episodes.state.prompt_length[:, None] + torch.arange(self.budget)
        self.uniform, self.starts = actor._uniform.gather(1, at).double(), actor.window_start
        self.optimizer = torch.optim.AdamW(
            [{"params": p, "lr": 1e-9} for p in self.model.parameter_lists().values()], betas=(0.9, 0.99), eps=1e-12, weight_decay=0
        )

    @torch.no_grad()
    def collect(self) -> dict[str, torch.Tensor]:
        model, n = self.model, self.groups * self.size
        logits, context = model.read_text(model.start(self.groups), self.ids, self.mask, last_only=True)
        rows = torch.arange(self.groups).repeat_interleave(self.size)
        logits, context = logits[rows], context.select(rows)
        tokens = torch.zeros(n, self.budget + 1, dtype=torch.long)
        log_probs, said = torch.zeros(n, self.budget + 1), torch.zeros(n, self.budget + 1, dtype=torch.bool)
        open_rows = torch.ones(n, dtype=torch.bool)
        for k in range(self.budget + 1):
            lp = logits[:, 0].masked_fill(~self.legal, -torch.inf).log_softmax(-1)
            if k == self.budget:
                token = torch.full((n,), 2)
            else:
                mass = lp.double().exp().cumsum(-1)
                token = (mass < self.uniform[:, k : k + 1] * mass[:, -1:]).sum(-1)
            tokens[:, k], said[:, k] = torch.where(open_rows, token, 0), open_rows
            log_probs[:, k] = lp.gather(1, token[:, None])[:, 0]
            still = open_rows & (token != 2)
            if not still.any():
                break
            # As the actor: a token is read when the next is wanted, and the opening token when the image begins.
            logits, context = model.read_text(context, token[:, None], still[:, None], last_only=True)
            open_rows = still
        _, context = model.read_text(context, torch.full((n, 1), 2), torch.ones(n, 1, dtype=torch.bool), last_only=True)
        x = torch.randn(n, 36, 48)
        noise = torch.randn(n, W, 36, 48)
        latents, means, seen = torch.zeros(n, W + 1, 36, 48), torch.zeros(n, W, 36, 48), torch.zeros(n, W + 1)
        for i in range(len(self.times) - 1):
            t, nt = self.times[i], self.times[i + 1]
            v = model.velocity(context, x, t.expand(n))
            w = i - self.starts
            inside = (w >= 0) & (w < W)
            if inside.any():
                clamped = nt if t == 1 else t
                var = (A * inside) ** 2 * clamped / (1 - clamped)
                dt = nt - t
                mean = (1 + var / (2 * t) * dt)[:, None, None] * x + ((1 + var * (1 - t) / (2 * t)) * dt)[:, None, None] * v
                rows = inside.nonzero()[:, 0]
                latents[rows, w[rows]], means[rows, w[rows]], seen[rows, w[rows]] = x[rows], mean[rows], t
                x = mean + (var * -dt).sqrt()[:, None, None] * noise[torch.arange(n), w.clamp(0, W - 1)]
                last = (w == W - 1).nonzero()[:, 0]
                latents[last, W], seen[last, W] = x[last], nt
            else:
                x = x + v * (nt - t)
        texts = [self.variant.tokenizer.decode(row, skip_special_tokens=True) for row in tokens.tolist()]
        prompts = [p for p in self.prompts for _ in range(self.size)]
        batch = EpisodeBatch([p.text for p in prompts], texts, self.variant.decode(x), [p.metadata for p in prompts])
        reward = REWARDS["shapes"](batch)["reward"]
        return {"tokens": tokens, "said": said, "log_prob": log_probs, "x": latents, "mean": means, "t": seen, "reward": reward}

    def forward(self, model, e: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        n, longest = self.groups * self.size, int(e["said"].sum(1).max())
        logits, context = model.read_text(model.start(self.groups), self.ids, self.mask, last_only=True)
        rows = torch.arange(self.groups).repeat_interleave(self.size)
        later, context = model.read_text(context.select(rows), e["tokens"][:, :longest], e["said"][:, :longest])
        lp = torch.cat([logits[rows], later[:, :-1]], 1).masked_fill(~self.legal, -torch.inf).log_softmax(-1)
        lp = F.pad(lp.gather(2, e["tokens"][:, :longest, None])[..., 0], (0, self.budget + 1 - longest))
        v = model.velocity(context.repeat(W), e["x"][:, :W].flatten(0, 1), e["t"][:, :W].flatten())
        return lp, v.unflatten(0, (n, W))

    def iterate(self) -> None:
        e = self.collect()
        r = e["reward"].view(self.groups, self.size)
        adv = ((r - r.mean(1, keepdim=True)) / r.std(1, keepdim=True, correction=0).clamp(min=1e-6)).flatten()
        lp, v = self.forward(self.model, e)
        rt = (lp - e["log_prob"]).exp()
        text = -(torch.minimum(rt * adv[:, None], rt.clamp(0.8, 1.2) * adv[:, None]) * e["said"]).sum(1) / e["said"].sum(1)
        t, nt = e["t"][:, :W], e["t"][:, 1:]
        clamped = torch.where(t < 1, t, nt)
        var, dt = A**2 * clamped / (1 - clamped), nt - t
        mean = (1 + var / (2 * t) * dt)[..., None, None] * e["x"][:, :W] + ((1 + var * (1 - t) / (2 * t)) * dt)[..., None, None] * v
        rl = (-((e["mean"] - mean) * (e["x"][:, 1:] - e["mean"])).mean((2, 3)) / (var * -dt).sqrt()).exp()
        image = -torch.minimum(rl * adv[:, None], rl.clamp(1 - 1e-4, 1 + 1e-4) * adv[:, None]).mean(1)
        loss = text + image
        if self.reference is not None:
            with torch.no_grad():
                _, anchor = self.forward(self.reference, e)
            loss = loss + 1e-9 * ((v - anchor) ** 2).mean((1, 2, 3))
        self.optimizer.zero_grad()
        loss.mean().backward()
        for parameters in self.model.parameter_lists().values():
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        self.optimizer.step()


def make_trainer(**overrides: object) -> Trainer:
    settings = {
        "trainer.minibatches": 1,
        "optimizer.text_lr": 1e-9,
        "optimizer.image_lr": 1e-9,
        "output.folder": "outputs/bench",
    } | overrides
    return Trainer(load_config("unigrpo", [f"{name}={value}" for name, value in settings.items()]))


def model_share(trainer: Trainer) -> float:
    """Share of an iteration's wall time inside the model's verbs and the backward pass."""
    spent = 0.0

    def clocked(function):
        def call(*args, **kwargs):
            nonlocal spent
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent += time.perf_counter() - began

        return call

    kind = type(trainer.model)
    originals = kind.read_text, kind.velocity, torch.Tensor.backward
    kind.read_text, kind.velocity, torch.Tensor.backward = map(clocked, originals)  # type: ignore[method-assign]
    try:
        whole = timed(lambda: [trainer.iterate() for _ in range(5)])
    finally:
        kind.read_text, kind.velocity, torch.Tensor.backward = originals  # type: ignore[method-assign]
    return spent / whole


def bytes_ratio(trainer: Trainer) -> float:
    """What a collector keeps against tokens, masks, log-probs, the window's latents and means and the final image."""
    episodes = trainer.collector.collect(trainer.variant.task.prompts("train", trainer.collector.groups, 0), 0)
    needed = ("prompt_tokens", "tokens", "text_mask", "chosen_mask", "log_prob", "window_latents", "window_means", "latent")
    least = sum(episodes[name].numel() * episodes[name].element_size() for name in needed)
    return episodes.bytes() / least


def scaling(pairs: int) -> list[dict[str, object]]:
    """Time when one size doubles, over time before: at most 2, and a little more for attention."""
    model = load_model("tiny")

    def rollout(rows: int = 32, steps: int = 10, words: int = 8) -> Callable[[], object]:
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

    figures: list[dict[str, object]] = []
    for name, small, large in (
        ("episodes 64 / 32", {"rows": 32}, {"rows": 64}),
        ("denoising steps 20 / 10", {"steps": 10}, {"steps": 20}),
        ("thought length 48 / 24", {"words": 24, "steps": 1}, {"words": 48, "steps": 1}),
    ):
        figures.append({"figure": "e", "name": name, **ratio(rollout(**large), rollout(**small), pairs)})
    return figures


def arithmetic(model: Any, rounds: int, words: int, image_passes: int) -> float:
    """Multiplications of an episode: each token through its expert's weights, and its attention to what stands before it."""
    config, image = model.config, model.config.latent_height * model.config.latent_width + 2
    weights = sum(p.numel() for p in model.language_model.model.layers.parameters()) / 2
    context, total = 4, 0.0

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


def rounds(pairs: int, rows: int = 16, words: int = 8) -> list[dict[str, object]]:
    """Episodes of 1, 2, 4 and 8 pictures, every thought of the same length."""
    model = load_model("tiny")
    window = Window(W, 0, 5)

    def parts(count: int) -> tuple[Callable[[], object], Callable[[], object], dict[str, int]]:
        variant = make_variant("story", pictures=count, text_budget=words, reward=lambda episodes: torch.rand(len(episodes)))
        env, rules = InterleavedGenVectorEnv(variant, rows, copy=False), variant.rules
        actor = Patient(model, window=window)
        collector = Collector(env, actor, rows)
        episodes = collector.collect([Prompt("draw")], 0).flatten(0, 1)
        assert (episodes["images_drawn"] == count).all()
        context = actor._context
        held = sum(t[:, :, : context.size].numel() * t.element_size() for t in (*context.keys, *context.values))
        episodes["advantage"] = torch.linspace(-1, 1, rows)
        episodes["weight"] = episodes["text_share"] = torch.full((rows,), 1 / rows)
        legal = torch.stack([rules.legal_tokens(), rules.legal_tokens(after_image=True)])
        loss = UniGRPOLoss(model, None, legal, AlgorithmSettings(velocity_weight=0.0))

        def forward() -> torch.Tensor:
            out = loss(episodes)
            return out["loss_text"] + out["loss_image"]

        sizes = {"context": held, "trajectory": episodes.bytes(), "training pass": kept(forward, model)}
        return lambda: collector.collect([Prompt("draw")], 0), lambda: forward().backward(), sizes

    figures: list[dict[str, object]] = []
    known = {count: parts(count) for count in (1, 2, 4, 8)}
    for count in (1, 2, 4):
        small, large = known[count], known[2 * count]
        for place, name, passes in ((0, "rollout", 10), (1, "training pass", W)):
            limit = arithmetic(model, 2 * count, words, passes) / arithmetic(model, count, words, passes)
            found = ratio(large[place], small[place], pairs)
            figures.append({"figure": "f", "name": f"{name}, pictures {2 * count} / {count}", "limit": round(limit, 3), **found})
        memory = {name: round(size / small[2][name], 3) for name, size in large[2].items()}
        figures.append({"figure": "f", "name": f"bytes, pictures {2 * count} / {count}", "limit": round(limit, 3), **memory})
    return figures


def kept(forward: Callable[[], torch.Tensor], model: Any) -> int:
    """Bytes that a forward keeps for its way back, the model's own aside."""
    storages = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage  # held, so that no other one takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        forward()
    own = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    return sum(storage.nbytes() for pointer, storage in storages.items() if pointer not in own)


class Patient(Actor):
    """An actor that never ends a thought: its words are spent by the budget."""

    def act(self, observation: dict[str, torch.Tensor]) -> Decision:
        legal = observation["legal_tokens"].clone()
        legal[:, 2] = False
        return super().act({**observation, "legal_tokens": legal})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--only", default="abcdef", help="letters of the figures to take")
    args = parser.parse_args()
    trainer, seed = make_trainer(), derived_seed(0, 0)
    bare = Bare(trainer, seed)

    def report(**figure: object) -> None:
        print(json.dumps({**figure, "threads": torch.get_num_threads()}), flush=True)

    if "a" in args.only:
        report(
            figure="a",
            name="collecting / bare loop",
            limit=1.03,
            **ratio(lambda: trainer.collector.collect(bare.prompts, seed), bare.collect, args.pairs),
        )
    if "b" in args.only:

        def iterate() -> None:
            trainer.iteration = 0
            trainer.iterate()

        report(figure="b", name="iteration / bare iteration", limit=1.08, **ratio(iterate, bare.iterate, args.pairs))
    if "c" in args.only:
        report(figure="c", name="share inside the model", limit=0.85, share=round(model_share(trainer), 4))
    if "d" in args.only:
        report(figure="d", name="bytes kept / bytes needed", limit=1.1, ratio=round(bytes_ratio(trainer), 4))
    if "e" in args.only:
        for figure in scaling(args.pairs):
            report(**figure)
    if "f" in args.only:
        for figure in rounds(args.pairs):
            report(**figure)


if __name__ == "__main__":
    main()

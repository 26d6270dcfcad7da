"""A whole UniGRPO loop on the public API, without the trainer.

    python examples/unigrpo_loop.py --iterations 40

N episodes = B prompts x G members; W stochastic image steps; L x C latent (36 x 48 here); K token
slots after the prompt; P token slots of the prompt; V tokens of the vocabulary. Equation numbers
are those of arXiv 2603.23500. Flow time t = 1 is noise, t = 0 is the image.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from agents.evaluation.accuracy import evaluate
from agents.models.base import UnifiedModel
from agents.models.registry import load_model
from agents.objectives.advantages import group_advantage
from agents.objectives.equations import image_loss, ratio_norm, text_loss, velocity_mse
from agents.policy.actor import Actor
from agents.policy.prefill import read_prompts
from agents.policy.sde import Window, sde_step
from agents.policy.tokens import token_log_probs
from unigrpo_env.mdp.rules import Phase
from unigrpo_env.tasks.task import Prompt
from unigrpo_env.vector_env import InterleavedGenVectorEnv

B = 8
G = 8
N = B * G
W = 3
NOISE_LEVEL = 0.8
TEXT_CLIP = 0.2
IMAGE_CLIP = 1e-4
VELOCITY_WEIGHT = 1e-3


@dataclass
class Episodes:
    """What an update needs of N episodes."""

    prompt_tokens: Tensor  # [N, P], 0 beyond each prompt
    prompt_length: Tensor  # [N]
    tokens: Tensor  # [N, K], all that follows the prompt
    text_mask: Tensor  # [N, K], which of them count, forced ones included
    chosen_mask: Tensor  # [N, K], which of them the policy chose
    log_prob: Tensor  # [N, K], by the policy that wrote them
    latents: Tensor  # [N, W + 1, L, C], around the stochastic steps
    means: Tensor  # [N, W, L, C], of these steps, by the policy that drew
    times: Tensor  # [N, W + 1]
    reward: Tensor  # [N]


class Loop:
    """Model, env and optimiser."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = load_model("tiny")
        # v_ref of equation (8)
        self.reference = self.model.reference()
        self.experts = self.model.parameters_by_expert()
        self.optimizer = torch.optim.AdamW(
            [
                {"params": self.experts["text"], "lr": 3e-4},
                {"params": self.experts["image"], "lr": 2e-4},
            ],
            betas=(0.9, 0.99),
            eps=1e-12,
            weight_decay=0,
        )
        # Observations are views of the state, so they are read before the next step.
        self.env = InterleavedGenVectorEnv("text_to_image", N, copy=False)
        self.variant = self.env.episodes.variant
        # [V] bool
        self.legal_tokens = self.variant.rules.legal_tokens()
        self.window = Window(W, low=0, high=5)
        self.actor = Actor(self.model, window=self.window, noise_level=NOISE_LEVEL)

    def rollout(self, prompts: Sequence[Prompt], seed: int) -> Episodes:
        """Play one episode for each of the G members of each of the B prompts."""
        members = [prompt for prompt in prompts for _ in range(G)]
        observation, _ = self.env.reset(seed=seed, options={"prompts": members})
        # One window a group: [N].
        generator = torch.Generator().manual_seed(seed)
        starts = self.window.draw(B, generator).repeat_interleave(G)
        self.actor.start(range(seed, seed + N), starts)
        episodes = self._empty_episodes()
        while (observation["phase"] != Phase.DONE).any():
            # Rows that have finished their thought wait for the others.
            decision = self.actor.act(observation)
            if decision.log_prob is not None:
                rows = decision.active.nonzero()[:, 0]
                slot = (observation["num_tokens"] - observation["prompt_length"])[rows]
                episodes.log_prob[rows, slot] = decision.log_prob[rows]
                episodes.chosen_mask[rows, slot] = True
            else:
                record_image_step(episodes, observation, decision.mean, starts)
            observation, reward, _, _, _ = self.env.step(decision.env_action, decision.active)
            # Paid in the step that ends a row, 0 before.
            episodes.reward += reward
        record_tokens(episodes, observation)
        return episodes

    def _empty_episodes(self) -> Episodes:
        rules = self.variant.rules
        K = rules.max_tokens - rules.prompt_budget
        nothing = torch.zeros(N, K, dtype=torch.int64)
        return Episodes(
            prompt_tokens=nothing,
            prompt_length=nothing[:, 0],
            tokens=nothing,
            text_mask=nothing.bool(),
            chosen_mask=nothing.bool(),
            log_prob=torch.zeros(N, K),
            latents=torch.zeros(N, W + 1, *rules.latent_shape),
            means=torch.zeros(N, W, *rules.latent_shape),
            times=torch.zeros(N, W + 1),
            reward=torch.zeros(N),
        )

    def evaluate_actions(
        self, model: UnifiedModel[Any], episodes: Episodes
    ) -> tuple[Tensor, Tensor]:
        """Log-probs of all tokens `[N, K]` and velocities `[N, W, L, C]`, from one context."""
        # Each different prompt is read once; logits [N, 1, V].
        logits, context = read_prompts(model, episodes.prompt_tokens, episodes.prompt_length)
        # [N, K, V]
        later, context = model.append_text(context, episodes.tokens, episodes.text_mask)
        logits = torch.cat([logits, later[:, :-1]], 1)
        log_probs = token_log_probs(logits, self.legal_tokens, temperature=1.0)
        log_prob = log_probs.gather(2, episodes.tokens[..., None])[..., 0]
        # The W steps of an episode share its context: [N W, L, C] and [N W].
        x = episodes.latents[:, :W].flatten(0, 1)
        t = episodes.times[:, :W].flatten()
        velocity = model.predict_velocity(context.repeat_interleave(W), x, t)
        return log_prob, velocity.unflatten(0, (N, W))

    def update(self, episodes: Episodes) -> None:
        """One step on equation (7): text, image and penalty, under one advantage."""
        group = torch.arange(B).repeat_interleave(G)
        # (1), [N]
        advantage = group_advantage(episodes.reward, group)
        log_prob, velocity = self.evaluate_actions(self.model, episodes)
        # (2), [N]
        text = text_loss(log_prob, episodes.log_prob, advantage, episodes.chosen_mask, TEXT_CLIP)
        # (6), [N]
        image = image_loss(image_log_ratio(episodes, velocity), advantage, IMAGE_CLIP)
        with torch.no_grad():
            _, reference_velocity = self.evaluate_actions(self.reference, episodes)
        # (8), [N]
        penalty = velocity_mse(velocity, reference_velocity)
        self.optimizer.zero_grad()
        (text + image + VELOCITY_WEIGHT * penalty).mean().backward()
        for parameters in self.experts.values():
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        self.optimizer.step()

    def accuracy(self, held_out: int) -> float:
        """The mean reward on held-out prompts."""
        prompts = self.variant.task.prompts("test", held_out, 0)
        return evaluate(self.model, self.variant, prompts).accuracy


def record_image_step(
    episodes: Episodes, observation: dict[str, Tensor], mean: Tensor | None, starts: Tensor
) -> None:
    """Keep x, t and the mean of a denoising step where it lies in a row's window."""
    assert mean is not None
    # Which step of the window each row takes, [N]; W is the one behind its end.
    index = observation["step"] - starts
    for number in range(W + 1):
        rows = index == number
        episodes.latents[rows, number] = observation["latent"][rows]
        episodes.times[rows, number] = observation["t"][rows, 0]
        if number < W:
            episodes.means[rows, number] = mean[rows]


def record_tokens(episodes: Episodes, observation: dict[str, Tensor]) -> None:
    """Split the token buffer of the last observation into prompts and what follows them."""
    tokens = observation["tokens"]
    length = observation["prompt_length"]
    slots = torch.arange(episodes.log_prob.shape[1])
    episodes.tokens = tokens.gather(1, length[:, None] + slots)
    episodes.text_mask = slots < (observation["num_tokens"] - length)[:, None]
    longest = int(length.max())
    beyond = torch.arange(longest) >= length[:, None]
    episodes.prompt_tokens = tokens[:, :longest].masked_fill(beyond, 0)
    episodes.prompt_length = length.clone()


def image_log_ratio(episodes: Episodes, velocity: Tensor) -> Tensor:
    """Equations (3) and (5): the log ratio of each stochastic step, `[N, W]`."""
    step = sde_step(
        episodes.latents[:, :W].flatten(0, 1),
        velocity.flatten(0, 1),
        episodes.times[:, :W].flatten(),
        episodes.times[:, 1:].flatten(),
        NOISE_LEVEL,
    )
    mean = step.mean.unflatten(0, (N, W))
    std = step.std.unflatten(0, (N, W))
    return ratio_norm(episodes.latents[:, 1:], mean, episodes.means, std)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--iterations", type=int, default=40)
    parser.add_argument(
        "--held-out", type=int, default=128, help="prompts to measure on, before and after"
    )
    arguments = parser.parse_args()
    loop = Loop()
    print(f"held-out accuracy before: {loop.accuracy(arguments.held_out):.3f}")
    for iteration in range(arguments.iterations):
        prompts = loop.variant.task.prompts("train", B, seed=iteration)
        episodes = loop.rollout(prompts, seed=1000 * iteration)
        loop.update(episodes)
        if iteration % 5 == 4:
            reward = float(episodes.reward.mean())
            print(f"iteration {iteration + 1:3d}  reward {reward:.3f}", flush=True)
    print(f"held-out accuracy after: {loop.accuracy(arguments.held_out):.3f}")


if __name__ == "__main__":
    main()

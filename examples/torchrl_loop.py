"""UniGRPO in TorchRL's own loop: collector, buffer, loss module, optimiser.

python examples/torchrl_loop.py --iterations 5

P prompts, G members of each group, N = P x G rows, T steps a batch; L x C latent (36 x 48 here), V
tokens. See `agents.trajectory.Trajectory` for the shapes of all its fields.
"""

from __future__ import annotations

import argparse

import torch
from tensordict import TensorDictBase
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, ReplayBuffer
from torchrl.data.replay_buffers.samplers import SamplerWithoutReplacement

from agents.config.schema import AlgorithmSettings
from agents.models.registry import load_model
from agents.objectives.loss import UniGRPOLoss
from agents.policy.actor import Actor
from agents.policy.sde import Window
from agents.policy.torchrl_policy import ActorPolicy
from agents.rollout.from_torchrl import trajectory_from_rollout
from agents.training.comparison import add_advantages
from agents.trajectory import Trajectory
from unigrpo_env.torchrl_env import InterleavedGenTorchRLEnv

Experts = dict[str, list[torch.nn.Parameter]]


def read_arguments() -> argparse.Namespace:
    """Small numbers by default, for a look at how it runs."""
    parser = argparse.ArgumentParser(description="UniGRPO in TorchRL's own loop.")
    parser.add_argument("--iterations", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=4, help="P, prompts an iteration")
    parser.add_argument("--members", type=int, default=4, help="G, episodes a prompt")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    """Collect, compare, learn."""
    arguments = read_arguments()
    torch.manual_seed(arguments.seed)
    rows = arguments.prompts * arguments.members
    settings = AlgorithmSettings()
    window = Window(settings.window_size, settings.window_low, settings.window_high)
    model = load_model("tiny")
    env = InterleavedGenTorchRLEnv("text_to_image", rows, group_size=arguments.members)
    rules = env.episodes.rules
    actor = Actor(
        model,
        temperature=settings.temperature,
        window=window,
        noise_level=settings.noise_level,
        kernel=settings.kernel,
    )
    policy = ActorPolicy(actor, rules, arguments.members)
    # All rows begin together, so T = max_steps holds a whole episode of each. Rows that end sooner
    # begin another one, which nobody reads.
    collector = Collector(
        env,
        policy,
        frames_per_batch=rows * rules.max_steps,
        total_frames=rows * rules.max_steps * arguments.iterations,
        reset_at_each_iter=True,
        auto_register_policy_transforms=False,
    )
    collector.set_seed(arguments.seed)
    buffer = make_buffer(arguments.prompts)
    loss = UniGRPOLoss.for_variant(model, env.episodes.variant, settings)
    experts = model.parameters_by_expert()
    optimizer = make_optimizer(experts)
    # steps: [N, T]; token, log_prob, window_start [N, T]; next_latent, mean [N, T, L, C]
    for iteration, steps in enumerate(collector, 1):
        # [P, G], one episode a row
        episodes = trajectory_from_rollout(steps, rules, window, arguments.members)
        # Adds text_advantage [P, G, K], image_advantage and step_mask [P, G, R, W], is_scored.
        _, metrics = add_advantages(episodes, "episode", rules.rounds, max_unscored=0.25)
        buffer.empty()
        buffer.extend(episodes)
        for groups in buffer:
            # Whole groups [P / 2, G], as N / 2 episodes.
            update(loss, optimizer, experts, groups.flatten(0, 1))
        print(f"iteration {iteration:3d}  reward {metrics['reward']:.3f}", flush=True)
    collector.shutdown()


def make_buffer(prompts: int) -> ReplayBuffer:
    """It gives each group once, in random order, half of them at a time."""
    return ReplayBuffer(
        storage=LazyTensorStorage(prompts),
        sampler=SamplerWithoutReplacement(),
        batch_size=max(prompts // 2, 1),
    )


def make_optimizer(experts: Experts) -> torch.optim.Optimizer:
    """AdamW with a learning rate for each of the two experts."""
    groups = [
        {"params": experts["text"], "lr": 3e-4},
        {"params": experts["image"], "lr": 2e-4},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.99), eps=1e-12, weight_decay=0.0)


def update(
    loss: UniGRPOLoss,
    optimizer: torch.optim.Optimizer,
    experts: Experts,
    batch: TensorDictBase,
) -> None:
    """One optimiser step on equation (7)."""
    episodes = Trajectory.of(batch)
    # Shares in the mean, [N / 2]; an episode without a score has none.
    scored = episodes.is_scored.float()
    episodes.episode_weight = scored / scored.sum().clamp(min=1)
    episodes.token_weight = episodes.episode_weight
    out = loss(episodes)
    losses = [value for name, value in out.items() if name.startswith("loss_")]
    optimizer.zero_grad()
    torch.stack(losses).sum().backward()
    for parameters in experts.values():
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


if __name__ == "__main__":
    main()

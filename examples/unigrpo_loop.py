"""A whole UniGRPO loop on the public API, without the trainer.

    python examples/unigrpo_loop.py --iterations 40

N episodes = B prompts x G members; W stochastic image steps; L x C latent (36 x 48 here); K token slots; V tokens.
Equation numbers are those of arXiv 2603.23500. Flow time t = 1 is noise, t = 0 the image.
"""

import argparse
import copy

import torch

from agents.actor import Actor, read_prompts, token_log_probs
from agents.evaluation import evaluate
from agents.flow import Window, sde_step
from agents.models import load_model
from agents.objectives import group_advantage, image_loss, ratio_norm, text_loss, velocity_mse
from unigrpo_env.mdp import Phase
from unigrpo_env.vector import InterleavedGenVectorEnv

parser = argparse.ArgumentParser()
parser.add_argument("--iterations", type=int, default=40)
parser.add_argument("--held-out", type=int, default=128, help="prompts to measure on, before and after")
args = parser.parse_args()

B, G, W, A = 8, 8, 3, 0.8  # prompts, members of a group, stochastic steps, noise level
TEXT_CLIP, IMAGE_CLIP, MSE_WEIGHT = 0.2, 1e-4, 1e-3
N = B * G
torch.manual_seed(0)

# The verbs of a model: start, read_text, velocity, and parameter_lists to tell the two experts apart.
model = load_model("tiny")
reference = copy.deepcopy(model).requires_grad_(False)  # v_ref of equation (8)
experts = model.parameter_lists()
optimizer = torch.optim.AdamW(
    [{"params": experts["text"], "lr": 3e-4}, {"params": experts["image"], "lr": 2e-4}], betas=(0.9, 0.99), eps=1e-12, weight_decay=0
)

# N episodes side by side; observations are views of the state, so we read them before the next step.
env = InterleavedGenVectorEnv("text_to_image", N, copy=False)
task, legal = env.episodes.variant.task, env.episodes.rules.legal_tokens()  # legal: [V] bool
window = Window(W, low=0, high=5)
actor = Actor(model, window=window, noise_level=A)


def rollout(prompts, seed):
    """Play every group once; keep what the update needs."""
    observation, _ = env.reset(seed=seed, options={"prompts": [p for p in prompts for _ in range(G)]})
    starts = window.draw(B, torch.Generator().manual_seed(seed)).repeat_interleave(G)  # [N], one window a group
    actor.start(range(seed, seed + N), starts)
    K = env.episodes.rules.text_budget + 1
    log_prob, chosen = torch.zeros(N, K), torch.zeros(N, K, dtype=torch.bool)
    x = torch.zeros(N, W + 1, 36, 48)  # latents around the stochastic steps
    mean, times = torch.zeros(N, W, 36, 48), torch.zeros(N, W + 1)
    reward = torch.zeros(N)
    while (observation["phase"] != Phase.DONE).any():
        decision = actor.act(observation)  # rows that finished their thought wait for the others
        rows = decision.active.nonzero()[:, 0]
        if decision.log_prob is not None:  # a token a row
            k = (observation["num_tokens"] - observation["prompt_length"])[rows]
            log_prob[rows, k], chosen[rows, k] = decision.log_prob[rows], True
        else:  # a denoising step a row
            w = observation["step"] - starts
            for j in range(W + 1):
                at = w == j
                x[at, j], times[at, j] = observation["latent"][at], observation["t"][at]
                if j < W:
                    mean[at, j] = decision.mean[at]
        observation, paid, _, _, _ = env.step(decision.env_action, decision.active)
        reward += paid  # sparse: paid in the step that ends a row
    P = observation["prompt_length"]  # [N]
    tokens = torch.stack([row[p : p + K] for row, p in zip(env.episodes.state.tokens, P.tolist(), strict=True)])  # [N, K]
    said = torch.arange(K) < (observation["num_tokens"] - P)[:, None]  # [N, K], a forced token included
    prompt = observation["tokens"][:, : int(P.max())].clone()
    prompt[torch.arange(prompt.shape[1]) >= P[:, None]] = 0
    return {"prompt": prompt, "P": P.clone(), "tokens": tokens, "said": said, "chosen": chosen, "log_prob": log_prob,
            "x": x, "mean": mean, "times": times, "reward": reward}  # fmt: skip


def read_and_look(which, episodes):
    """Teacher-forced: log-probs of all tokens [N, K] and velocities at all stochastic steps [N, W, L, C] from one context."""
    logits, context = read_prompts(which, episodes["prompt"], episodes["P"])  # [N, 1, V]; each prompt is read once
    later, context = which.read_text(context, episodes["tokens"], episodes["said"])  # [N, K, V]
    log_probs = token_log_probs(torch.cat([logits, later[:, :-1]], 1), legal, temperature=1.0)
    log_prob = log_probs.gather(2, episodes["tokens"][..., None])[..., 0]  # [N, K]
    velocity = which.velocity(context.repeat(W), episodes["x"][:, :W].flatten(0, 1), episodes["times"][:, :W].flatten())
    return log_prob, velocity.unflatten(0, (N, W))


def update(episodes):
    """One step on equation (7): text + image + penalty, one advantage for all."""
    advantage = group_advantage(episodes["reward"], torch.arange(B).repeat_interleave(G))  # (1), [N]
    log_prob, velocity = read_and_look(model, episodes)
    text = text_loss(log_prob, episodes["log_prob"], advantage, episodes["chosen"], TEXT_CLIP)  # (2), [N]
    times = episodes["times"]
    step = sde_step(episodes["x"][:, :W].flatten(0, 1), velocity.flatten(0, 1), times[:, :W].flatten(), times[:, 1:].flatten(), A)  # (3)
    mean, std = step.mean.unflatten(0, (N, W)), step.std.unflatten(0, (N, W))
    log_ratio = ratio_norm(episodes["x"][:, 1:], mean, episodes["mean"], std)  # (5), [N, W]
    image = image_loss(log_ratio, advantage, IMAGE_CLIP)  # (6), [N]
    with torch.no_grad():
        _, anchor = read_and_look(reference, episodes)
    penalty = velocity_mse(velocity, anchor)  # (8), [N]
    optimizer.zero_grad()
    (text + image + MSE_WEIGHT * penalty).mean().backward()
    for parameters in experts.values():
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


def accuracy():
    return evaluate(model, env.episodes.variant, task.prompts("test", args.held_out, 0)).accuracy


print(f"held-out accuracy before: {accuracy():.3f}")
for iteration in range(args.iterations):
    episodes = rollout(task.prompts("train", B, seed=iteration), seed=1000 * iteration)
    update(episodes)
    if iteration % 5 == 4:
        print(f"iteration {iteration + 1:3d}  reward {episodes['reward'].mean():.3f}", flush=True)
print(f"held-out accuracy after: {accuracy():.3f}")

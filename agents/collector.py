"""Env times actor: complete episodes as TensorDicts. The loop is `env.step(actor.act(obs))`, the one users write."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor

from agents.actor import Actor, Decision
from unigrpo_env.mdp import Phase
from unigrpo_env.tasks import Prompt
from unigrpo_env.vector import InterleavedGenVectorEnv


@dataclass
class Played:
    """How N episodes ended; R = image_budget.

    Attributes:
        observation: the last one.
        reward: `[N]` float32, paid at the end; NaN: unscored.
        components: its named parts, `[N]` float32.
        on_the_way: `thought_reward` and `round_reward`, `[N, R]` float32, what each thought and each picture was paid; 0 where nothing was.
    """

    observation: dict[str, Tensor]
    reward: Tensor
    components: dict[str, Tensor]
    on_the_way: dict[str, Tensor]


def play(
    env: InterleavedGenVectorEnv,
    actor: Actor,
    observation: dict[str, Tensor],
    watch: Callable[[dict[str, Tensor], Decision], None] = lambda observation, decision: None,
) -> Played:
    """Play all rows to their end.

    Args:
        env: reset, with `observation` its first.
        actor: the policy.
        watch: called with each observation and decision before the step.
    """
    actor.model.look_with(env.episodes.variant.decode)
    reward, rows = torch.zeros(env.num_envs), torch.arange(env.num_envs)
    components: dict[str, Tensor] = {}
    rounds = env.episodes.rules.image_budget
    on_the_way = {name: torch.zeros(env.num_envs, rounds) for name in ("thought_reward", "round_reward")}
    over = bool((observation["phase"] == Phase.DONE).all())
    while not over:
        decision = actor.act(observation)
        watch(observation, decision)
        observation, _, terminated, _, infos = env.step(decision.env_action, decision.active)
        for name, paid in infos.get("paid", {}).items():
            if name == "reward":
                reward += paid
            else:  # a picture is counted by now, a thought's is not
                number = env.episodes.state.images_drawn.cpu() - int(name == "round_reward")
                on_the_way[name][rows, number.clamp(0, rounds - 1)] += paid
        over = bool(terminated.all())
        for name, values in infos.get("components", {}).items():
            components.setdefault(name, torch.full_like(values, torch.nan))[infos["ended"]] = values[infos["ended"]]
    return Played(observation, reward, components, on_the_way)


class Collector:
    """Collects groups of episodes.

    A trajectory TensorDict has batch size `[groups, group_size]`; R = image_budget pictures an episode at most, K tokens after the prompt at most (text_budget + 1 where R = 1),
    W = window size, L x C the latent, P = prompt_budget, M pictures that may be read:

    | key | shape, dtype | meaning |
    |---|---|---|
    | `prompt_tokens`, `prompt_length` | `[P]` int64, int64 | what the model was given, padded with 0 |
    | `tokens` | `[K]` int64 | the stream after it: thoughts with their opening tokens and, between pictures, what the env said |
    | `text_mask` | `[K]` bool | which of `tokens` count |
    | `chosen_mask` | `[K]` bool | which of them the policy chose; forced ones and the env's words are not |
    | `log_prob` | `[K]` float32 | of the chosen tokens, by the policy that wrote them; 0 elsewhere |
    | `window_latents` | `[R (W + 1), L, C]` float32 | x before each stochastic step, and after the last, picture by picture |
    | `window_means` | `[R W, L, C]` float32 | mean of each step's Gaussian, by the policy that drew |
    | `window_times` | `[R (W + 1)]` float32 | flow times of `window_latents`, falling within each picture |
    | `images_drawn` | int64 | pictures of the episode; the entries of further ones hold nothing |
    | `latent` | `[L, C]` float32 | the last finished picture |
    | `images`, `image_places` | `[M, L, C]` float32, `[M]` int64 | where M > 0: clean latents that were read, and where in prompt and tokens; -1: none |
    | `reward` | float32 | paid at the end; NaN where the episode could not be scored |
    | `thought_reward`, `round_reward` | `[R]` float32 | what each thought and each picture was paid; 0 where nothing was |
    | `group`, `seed` | int64 | group's id; what the actor's noise was drawn from, and x_1 unless `shared_noise` |
    | `components` | TensorDict | named parts of the reward, float32 |

    Rows are written once into their final place.

    Args:
        env: a vector env; its `copy` may be False.
        actor: the policy, with a window.
        group_size: episodes a prompt; `env.num_envs` must be a multiple of it.
        shared_noise: start the images of a group from the same x_1.

    Raises:
        ValueError: a group size that does not divide the env's rows, a group of one, an actor without a window, or a window that could touch the last image step.
    """

    def __init__(self, env: InterleavedGenVectorEnv, actor: Actor, group_size: int, *, shared_noise: bool = False) -> None:
        if group_size < 2:
            raise ValueError(f"expected group_size >= 2, got {group_size}: an episode is judged against the others of its group")
        if env.num_envs % group_size:
            raise ValueError(f"expected num_envs to be a multiple of {group_size=}, got {env.num_envs}")
        if actor.window is None:
            raise ValueError("expected an actor with a window of stochastic steps, got None; an ODE leaves nothing to learn from")
        actor.window.check(env.episodes.rules.image_steps)
        self.env, self.actor, self.window = env, actor, actor.window
        self.group_size, self.shared_noise = group_size, shared_noise

    @property
    def groups(self) -> int:
        """Prompts a call."""
        return self.env.num_envs // self.group_size

    def collect(self, prompts: Sequence[Prompt], seed: int, iteration: int = 0) -> TensorDict:
        """Play one episode for each member of each prompt's group; the same arguments and weights give the same trajectories. `iteration`: where a sliding window stands."""
        if len(prompts) != self.groups:
            raise ValueError(f"expected {self.groups} prompts, one a group, got {len(prompts)}")
        env, size = self.env, self.group_size
        seeds = np.random.SeedSequence(seed).generate_state(env.num_envs).astype(np.int64)
        image_seeds = seeds.reshape(-1, size)[:, :1].repeat(size, 1).ravel() if self.shared_noise else seeds
        starts = self.window.draw(self.groups, torch.Generator().manual_seed(int(seeds[0])), iteration).repeat_interleave(size)
        device = env.episodes.state.phase.device
        observation, _ = env.reset(seed=image_seeds.tolist(), options={"prompts": [p for p in prompts for _ in range(size)]})
        self.actor.start(seeds.tolist(), starts.to(device))
        record, words = self._empty(observation), list[tuple[Tensor, Tensor, Tensor]]()
        played = play(env, self.actor, observation, partial(self._write, record, words))
        self._finish(record, words, played.observation)
        record |= {name: paid.to(device) for name, paid in played.on_the_way.items()}
        record["reward"], record["seed"] = played.reward.to(device), torch.as_tensor(seeds, device=device)
        record["group"] = torch.arange(self.groups, device=device).repeat_interleave(size)
        episodes = TensorDict(record, [env.num_envs])
        episodes["components"] = TensorDict({name: values.to(device) for name, values in played.components.items()}, [env.num_envs])
        return episodes.unflatten(0, (self.groups, size))

    def _empty(self, observation: dict[str, Tensor]) -> dict[str, Tensor]:
        rules, rows = self.env.episodes.rules, self.env.num_envs
        device = observation["phase"].device
        words, size, rounds = rules.max_tokens - rules.prompt_budget, self.window.size, rules.image_budget
        return {
            "log_prob": torch.zeros(rows, words, device=device),
            "chosen_mask": torch.zeros(rows, words, dtype=torch.bool, device=device),
            "window_latents": torch.zeros(rows, rounds * (size + 1), *rules.latent_shape, device=device),
            "window_means": torch.zeros(rows, rounds * size, *rules.latent_shape, device=device),
            # Any falling times will do until the real ones are written: they keep an episode without an image from dividing by zero.
            "window_times": torch.linspace(0.9, 0.5, size + 1, device=device).repeat(rows, rounds),
        }

    def _write(
        self, record: dict[str, Tensor], words: list[tuple[Tensor, Tensor, Tensor]], observation: dict[str, Tensor], decision: Decision
    ) -> None:
        """Keep what training needs of one decision: image steps in their final place, words in a list, to be placed all at once."""
        if decision.log_prob is not None:
            words.append((observation["num_tokens"] - observation["prompt_length"], decision.active, decision.log_prob))
            return
        assert decision.mean is not None
        assert self.actor.window_start is not None
        index = observation["step"] - self.actor.window_start
        rows = (decision.active & (index >= 0) & (index < self.window.size)).nonzero()[:, 0]
        if len(rows) == 0:
            return
        size, at = self.window.size, index[rows]
        # Where the picture's own window begins, among the rows of all episodes.
        picture = rows * self.env.episodes.rules.image_budget + self.env.episodes.state.images_drawn[rows]
        place, times = picture * (size + 1) + at, record["window_times"].view(-1)
        record["window_latents"].flatten(0, 1).index_copy_(0, place, observation["latent"].index_select(0, rows))
        record["window_means"].flatten(0, 1).index_copy_(0, picture * size + at, decision.mean.index_select(0, rows))
        times.index_copy_(0, place, observation["t"][rows])
        last = at == size - 1
        if last.any():
            record["window_latents"].flatten(0, 1).index_copy_(0, place[last] + 1, decision.latent.index_select(0, rows[last]))
            times.index_copy_(0, place[last] + 1, observation["next_t"][rows[last]])

    def _finish(self, record: dict[str, Tensor], words: list[tuple[Tensor, Tensor, Tensor]], observation: dict[str, Tensor]) -> None:
        """Place the words' log-probs, and split the token buffer into prompt and thought, once, at the end."""
        if words:
            at, active, log_prob = (torch.stack(parts) for parts in zip(*words, strict=True))  # [steps, N] each
            step, row = active.nonzero(as_tuple=True)
            record["log_prob"][row, at[step, row]] = log_prob[step, row]
            record["chosen_mask"][row, at[step, row]] = True
        lengths, tokens = observation["prompt_length"], observation["tokens"]
        prompt_budget = self.env.episodes.rules.prompt_budget
        places = torch.arange(prompt_budget, device=tokens.device)
        record["prompt_tokens"] = tokens[:, :prompt_budget].masked_fill(places >= lengths[:, None], 0)
        record["prompt_length"] = lengths.clone()
        slots = torch.arange(record["log_prob"].shape[1], device=tokens.device)
        said = (observation["num_tokens"] - lengths)[:, None]
        record["text_mask"] = slots < said
        record["tokens"] = tokens.gather(1, (lengths[:, None] + slots).clamp_(max=tokens.shape[1] - 1)).masked_fill(slots >= said, 0)
        record["latent"] = observation["latent"].clone()
        record["images_drawn"] = self.env.episodes.state.images_drawn.clone()
        if "images" in observation:
            record["images"], record["image_places"] = observation["images"].clone(), observation["image_places"].clone()

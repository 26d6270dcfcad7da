"""Trajectories from the step records of TorchRL's rollouts and collectors."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from torch import Tensor

from agents.policy.actor import Decision
from agents.policy.sde import Window
from agents.policy.segments import image_contents, stored_images
from agents.rollout.collector import INTERMEDIATE, Recorder, RolloutResult
from agents.trajectory import Trajectory
from unigrpo_env.mdp.rules import Phase, Rules

OBSERVED = (
    "phase", "tokens", "roles", "num_tokens", "prompt_length", "latent", "step", "images_drawn",
    "t", "next_t", "seed",
)  # fmt: skip
"""Entries of the env that are read of each step."""
WRITTEN = ("token", "next_latent", "active", "log_prob", "mean", "window_start")
"""Entries of `ActorPolicy` that are read of each step."""

Records = dict[str, Tensor]


def trajectory_from_rollout(
    steps: TensorDictBase,
    rules: Rules,
    window: Window,
    group_size: int,
    *,
    time_dim: int | None = None,
) -> Trajectory:
    """The first whole episode of each row, as the trainer's `Collector` records it.

    The steps are those of `InterleavedGenTorchRLEnv` under an `ActorPolicy`, of T steps of N rows.
    What comes before and after that episode is ignored.

    Args:
        steps: batch size [N, T] or [T, N].
        rules: of the episodes.
        window: of the actor.
        group_size: consecutive rows of one prompt.
        time_dim: which dimension T is. If left out it is the one with the name "time", which
            TorchRL gives it, or else the last.

    Returns:
        Batch size [N / group_size, group_size].

    Raises:
        ValueError: steps of another shape or without a needed entry, a row without a whole episode,
            or a group whose rows have different prompts.
    """
    steps = _rows_first(steps, time_dim)
    rows = steps.batch_size[0]
    if group_size < 1 or rows % group_size:
        raise ValueError(f"expected a multiple of {group_size=} rows, got {rows}")
    records = _read(steps, rules)
    start, end = _first_episodes(records, steps["next", "done"][..., 0], rules)
    final = _final_observation(steps, rules, end)
    _check_groups(final, rules, group_size)
    recorder = Recorder(rules, window, rows, start.device)
    result = _empty_result(final, rules)
    paid = _paid(steps)
    images_drawn = steps["next", "images_drawn"]
    for time in range(int(start.min()), int(end.max()) + 1):
        playing = (start <= time) & (time <= end)
        _record_step(recorder, _at(records, time), playing)
        result.add({"paid": _payments(paid, time, playing.cpu())}, images_drawn[:, time])
    _add_components(result, steps, end)
    seeds = records["seed"].gather(1, start[:, None])[:, 0]
    group = torch.arange(rows, device=start.device) // group_size
    # Batch size [N], then [groups, group_size].
    episodes = recorder.finish(result, seeds, group)
    return episodes.unflatten(0, (rows // group_size, group_size))


def _rows_first(steps: TensorDictBase, time_dim: int | None) -> TensorDictBase:
    """The steps as [N, T]."""
    if len(steps.batch_size) != 2:
        raise ValueError(
            "expected steps of batch size [N, T] or [T, N], as a rollout returns them, "
            f"got {list(steps.batch_size)}"
        )
    if time_dim is None:
        time_dim = 1
        if steps.names[0] == "time":
            time_dim = 0
    if time_dim == 0:
        return steps.transpose(0, 1)
    return steps


def _read(steps: TensorDictBase, rules: Rules) -> Records:
    """The entries that are needed of each step, `[N, T, ...]`."""
    outcome = [*INTERMEDIATE, "final_reward", "done", *_kept(rules)]
    missing = {*OBSERVED, *WRITTEN} - set(steps.keys())
    for name in set(outcome) - set(steps.get("next", {}).keys()):
        missing.add(f"next.{name}")
    if missing:
        raise ValueError(
            "expected steps of InterleavedGenTorchRLEnv and ActorPolicy, got some without "
            f"{sorted(missing)[:4]}; take steps with both of them, and no collector with "
            "compact_obs=True"
        )
    return {name: steps[name] for name in (*OBSERVED, *WRITTEN)}


def _kept(rules: Rules) -> list[str]:
    """Entries of the last observation that a trajectory keeps."""
    kept = ["tokens", "roles", "num_tokens", "prompt_length", "latent", "images_drawn"]
    if rules.stored_images:
        kept += ["images", "image_positions"]
    if rules.has_pixels:
        kept.append("pixels")
    return kept


def _first_episodes(records: Records, done: Tensor, rules: Rules) -> tuple[Tensor, Tensor]:
    """First and last step of each row's first whole episode, `[N]` int64 each."""
    first = (
        (records["phase"] != Phase.DONE)
        & (records["num_tokens"] == records["prompt_length"])
        & (records["images_drawn"] == 0)
        & (records["step"] == 0)
    )
    # The first True of a row is the first of its largest values.
    start = first.int().argmax(1)
    time = torch.arange(done.shape[1], device=done.device)
    ends = done & (time >= start[:, None])
    whole = first.any(1) & ends.any(1)
    if not whole.all():
        rows = (~whole).nonzero()[:, 0].tolist()
        raise ValueError(
            f"expected a whole episode of each row, got none of rows {rows[:8]} in "
            f"{done.shape[1]} steps; take more (an episode has at most {rules.max_steps}, and a "
            "row may have to wait for others), and begin all rows together, with "
            "Collector(reset_at_each_iter=True)"
        )
    return start, ends.int().argmax(1)


def _final_observation(steps: TensorDictBase, rules: Rules, end: Tensor) -> Records:
    """What each row's episode led to, `[N, ...]`."""
    rows = torch.arange(len(end), device=end.device)
    return {name: steps["next", name][rows, end] for name in _kept(rules)}


def _check_groups(final: Records, rules: Rules, group_size: int) -> None:
    """Refuse a group whose rows have different prompts or sources."""
    budget = rules.prompt_budget
    length = final["prompt_length"][:, None]
    beyond = torch.arange(budget, device=length.device) >= length
    shared = [final["tokens"][:, :budget].masked_fill(beyond, -1)]
    if rules.source_images:
        contents = image_contents(*stored_images(final))
        shared.append(contents[:, : rules.source_images])
    for values in shared:
        members = values.unflatten(0, (-1, group_size))
        if (members != members[:, :1]).any():
            raise ValueError(
                f"expected the same prompt in each group of {group_size} rows, got different "
                "ones; give the env the same group_size, and begin all rows together, with "
                "Collector(reset_at_each_iter=True)"
            )


def _empty_result(final: Records, rules: Rules) -> RolloutResult:
    rows = len(final["tokens"])
    intermediate = {name: torch.zeros(rows, rules.image_budget) for name in INTERMEDIATE}
    return RolloutResult(final, torch.zeros(rows), {}, intermediate)


def _at(records: Records, time: int) -> Records:
    return {name: values[:, time] for name, values in records.items()}


def _record_step(recorder: Recorder, step: Records, playing: Tensor) -> None:
    """Record the words and the image steps of one time, for the rows `[N]` that play."""
    active = playing & step["active"][:, 0]
    decision = Decision(active, step["token"], step["next_latent"])
    for phase, name in ((Phase.TEXT, "log_prob"), (Phase.IMAGE, "mean")):
        decision.active = active & (step["phase"] == phase)
        if not decision.active.any():
            continue
        # The recorder tells words from image steps by which of the two is there.
        decision.log_prob = None
        decision.mean = None
        setattr(decision, name, step[name])
        recorder.record(step, decision, step["window_start"])


def _paid(steps: TensorDictBase) -> Records:
    """The parts of the reward by their names in the env's infos, `[N, T]` each, on the CPU."""
    # Under "next" stands what the step itself paid.
    paid = {"reward": steps["next", "final_reward"][..., 0].cpu()}
    for name in INTERMEDIATE:
        paid[name] = steps["next", name][..., 0].cpu()
    return paid


def _payments(paid: Records, time: int, playing: Tensor) -> Records:
    """What was paid at one time to the rows that play, `[N]` each, where it was anything."""
    found = {}
    for name, values in paid.items():
        payment = torch.where(playing, values[:, time], 0)
        # NaN is not 0 either.
        if (payment != 0).any():
            found[name] = payment
    return found


def _add_components(result: RolloutResult, steps: TensorDictBase, end: Tensor) -> None:
    parts = steps["next"].get("components", None)
    if parts is None:
        return
    rows = torch.arange(len(end), device=end.device)
    for name, values in parts.items():
        result.components[name] = values[rows, end, 0].cpu()

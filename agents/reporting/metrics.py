"""The names of the numbers that the trainer returns after each iteration."""

from __future__ import annotations

METRICS = {
    "reward": "mean reward of the iteration's episodes, at their end",
    "thought_reward": "mean over episodes of what was paid for thoughts",
    "round_reward": "mean over episodes of what was paid for images before the end",
    "frac_groups_with_signal": "share of groups whose rewards differ; the others have advantage 0",
    "unscored": "share of episodes that the reward could not score",
    "thought_length": "mean number of tokens that the policy chose in an episode",
    "entropy": "mean entropy of the token distribution, in nats; if it falls fast, the text stops "
    "exploring",
    "text_clip_fraction": "share of tokens whose gradient the clip cut off; 0 in the first update "
    "of an iteration",
    "image_clip_fraction": "the same for stochastic image steps",
    "text_log_ratio": "largest |log ratio| of a token before the first update of the iteration: "
    "rounding error alone",
    "image_log_ratio": "the same for image steps",
    "loss_text": "text term of the loss; its gradient matters, not its value",
    "loss_image": "image term of the loss; likewise",
    "loss_velocity": "velocity penalty, weighted: how far the velocity has moved from the "
    "reference",
    "loss_kl": "KL of tokens and of stochastic steps to the reference, weighted",
    "text_grad_norm": "gradient norm of the text expert before clipping",
    "image_grad_norm": "gradient norm of the image expert before clipping",
    "episodes_per_second": "episodes collected and trained on, a second",
    "seconds": "time by the clock for the iteration",
    "cpu_seconds": "time of all processors together",
}
"""What each number of an iteration means, in the order of the columns of `metrics.csv`."""

TIMING_METRICS = ("episodes_per_second", "seconds", "cpu_seconds")
"""The names in `METRICS` whose values the seed does not determine."""


def mean_of_updates(updates: list[dict[str, float]]) -> dict[str, float]:
    """The metrics of an iteration from those of its updates; none where there was no update.

    Args:
        updates: metrics of each update, in order.
    """
    metrics: dict[str, float] = {}
    if not updates:
        return metrics
    for name in updates[0]:
        shown = updates
        if name.endswith("log_ratio"):
            # Ratios are rounding error before an iteration's first update alone.
            shown = updates[:1]
        metrics[name] = sum(update[name] for update in shown) / len(shown)
    return metrics

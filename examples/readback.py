"""Does a model that reads its own images tell right ones from wrong ones?

    python examples/readback.py

The policy draws some images of each held-out prompt, and the verifier of the shapes world says
which are right. The reward `readback` scores images under their own prompt and under others. What
is printed is the share of pairs in which the right image scores higher than the wrong one: 1 is a
perfect order, 0.5 is none at all.
"""

from __future__ import annotations

import argparse

from torch import Tensor

from agents.evaluation.accuracy import evaluate
from agents.models.registry import load_model
from rewards import EpisodeBatch, WeightedReward
from unigrpo_env.tasks.task import Prompt
from unigrpo_env.variants.variant import make_variant


def print_share(name: str, scores: Tensor, is_right: Tensor) -> None:
    """Print the share of ordered pairs within each prompt; both tensors are `[prompts, images]`."""
    won = 0.0
    pairs = 0
    for row, right in zip(scores, is_right, strict=True):
        # [right, wrong]; a tie is half a pair.
        above = row[right][:, None] - row[~right]
        won += float((above > 0).sum() + 0.5 * (above == 0).sum())
        pairs += above.numel()
    print(f"{name}: {won / max(pairs, 1):.3f} of {pairs} pairs")


def score(reward: WeightedReward, prompts: list[Prompt], images: Tensor) -> Tensor:
    """Rewards `[N]` of N images of N prompts."""
    texts = [prompt.text for prompt in prompts]
    metadata = [prompt.metadata for prompt in prompts]
    return reward(EpisodeBatch(texts, [""] * len(texts), images, metadata)).reward


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompts", type=int, default=64, help="held-out prompts")
    parser.add_argument("--samples", type=int, default=4, help="images of each")
    parser.add_argument("--reader", default="tiny", help="the model that reads")
    arguments = parser.parse_args()
    readback = WeightedReward("readback", {"readback": {"model": arguments.reader, "batch": 256}})
    verifier = WeightedReward("shapes")
    readback.prepare()

    variant = make_variant("text_to_image")
    prompts = variant.task.prompts("test", arguments.prompts, 0)
    asked = [prompt for prompt in prompts for _ in range(arguments.samples)]
    images = evaluate(load_model("tiny"), variant, asked).images
    # [prompts, samples]
    own = score(readback, asked, images).view(-1, arguments.samples)
    is_right = score(verifier, asked, images).view(-1, arguments.samples) == 1
    print(f"right images: {is_right.float().mean():.3f} of {len(images)}")
    print_share("images of the same prompt", own, is_right)

    # One image of each prompt that has a right one, under each of these prompts.
    rows = is_right.any(1).nonzero()[:, 0]
    first = rows * arguments.samples + is_right.int().argmax(1)[rows]
    each = [prompts[row] for row in rows for _ in rows]
    chosen = images[first].repeat(len(rows), 1, 1, 1)
    scores = score(readback, each, chosen).view(len(rows), -1)
    fits = score(verifier, each, chosen).view(len(rows), -1) == 1
    print_share("images of other prompts", scores, fits)
    # Two prompts with their images against the same with the images exchanged. This leaves out
    # how likely a prompt is with any image, and how an image changes all prompts alike.
    own = scores.diagonal()
    gain = own + own[:, None] - scores - scores.T
    gain = gain[(~(fits | fits.T)).triu(diagonal=1)]
    print(f"two prompts, exchanged: {(gain > 0).float().mean():.3f} of {len(gain)} pairs")


if __name__ == "__main__":
    main()

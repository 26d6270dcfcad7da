"""The shipped model reads an image and an instruction, thinks, and draws the image anew.

    python examples/edit.py --folder outputs/edit

L x C latent (36 x 48 here), one episode, so N = 1.
"""

import argparse
from pathlib import Path

import torch

from agents.models.registry import load_model
from agents.policy.actor import Actor
from rewards.image_bytes import read_image
from unigrpo_env.rendering import enlarge
from unigrpo_env.tasks.task import Prompt
from unigrpo_env.variants.variant import make_variant
from unigrpo_env.vector_env import InterleavedGenVectorEnv

SIDE = 384
"""Side of the enlarged images, in pixels."""


def held_out_prompt(number: int, path: Path) -> Prompt:
    """A held-out prompt of the edit task, whose source image goes through a file.

    Any image of 24 x 24 pixels will do: `Prompt("remove the circle", sources=(read_image(path),))`.
    Only the reward needs the metadata, which say what the image should look like.
    """
    prompts = make_variant("edit").task.prompts("test", number + 1, seed=0)
    chosen = prompts[number]
    enlarge(chosen.sources[0], 24).save(path)
    # [3, 24, 24] float32 in [0, 1]
    source = read_image(path)
    return Prompt(chosen.text, chosen.metadata, sources=(source,))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--number", type=int, default=0, help="which held-out prompt")
    parser.add_argument("--folder", type=Path, default=Path("outputs/edit"))
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    prompt = held_out_prompt(arguments.number, arguments.folder / "source.png")

    env = InterleavedGenVectorEnv("edit", num_envs=1)
    # Greedy text, and the ODE for the image.
    actor = Actor(load_model("tiny"), temperature=0)
    observation, _ = env.reset(seed=0, options={"prompts": [prompt]})
    ended = False
    while not ended:
        # A token [1], or the next latent [1, L, C], by the phase that the episode is in.
        decision = actor.act(observation)
        observation, reward, terminated, _, _ = env.step(decision.env_action, decision.active)
        ended = bool(terminated.all())

    before = prompt.sources[0]
    # [1, 3, 24, 24], the latent of the last image as the processor decodes it
    after = env.images()[0]
    enlarge(before, SIDE).save(arguments.folder / "before.png")
    enlarge(after, SIDE).save(arguments.folder / "after.png")
    print("instruction:", prompt.text)
    print("thought:", env.texts()[0])
    print(f"reward: {float(reward[0]):.2f}")
    print(f"pixels that changed: {changed_pixels(before, after):.0%}")
    print("images:", arguments.folder)


def changed_pixels(before: torch.Tensor, after: torch.Tensor) -> float:
    """The share of pixels that clearly differ between two images `[3, height, width]`."""
    distance = (before - after).abs().amax(0)
    return float((distance > 0.2).float().mean())


if __name__ == "__main__":
    main()

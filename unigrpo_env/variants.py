"""The registered scenarios. Each is a function that returns a `Variant`: data, not a class."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from rewards.registry import Registry
from unigrpo_env.decoders import PixelDecoder
from unigrpo_env.episodes import Variant
from unigrpo_env.mdp import Rules
from unigrpo_env.rounds_world import DialogueTask, EditTask, ReflectTask, StoryTask
from unigrpo_env.shapes_world import ROUND_WORDS, ShapesTask, shapes_tokenizer
from unigrpo_env.tasks import Task
from unigrpo_env.toy_task import ToyTask, toy_tokenizer

VARIANTS: Registry[Callable[..., Variant]] = Registry("variant", entry_point_group="unigrpo.variants")


def register_variant(name: str) -> Callable[[Callable[..., Variant]], Callable[..., Variant]]:
    """Decorator: make a function that returns a `Variant` known as `name`."""

    def register(maker: Callable[..., Variant]) -> Callable[..., Variant]:
        VARIANTS.add(name, maker)
        return maker

    return register


def make_variant(
    variant: str | Variant, *, reward: Any = None, thought_reward: Any = None, round_reward: Any = None, **arguments: Any
) -> Variant:
    """A variant by name, or as given, with other rewards where some are named; see `Variant`.

    Raises:
        ValueError: an unknown name.
        TypeError: arguments that its maker does not know, or any beside a finished `Variant`.
    """
    if isinstance(variant, str):
        variant = VARIANTS[variant](**arguments)
    elif arguments:
        raise TypeError(f"got {sorted(arguments)} beside a finished Variant; change the Variant itself with dataclasses.replace")
    rewards = {"reward": reward, "thought_reward": thought_reward, "round_reward": round_reward}
    return dataclasses.replace(variant, **{name: value for name, value in rewards.items() if value is not None})


def shapes_variant(
    task: Task,
    *,
    reward: Any,
    rounds: bool = False,
    prompt_budget: int = 16,
    text_budget: int = 24,
    image_steps: int = 10,
    time_shift: float = 3.0,
    **rules: Any,
) -> Variant:
    """A scenario in the shapes world: 24 x 24 pixels, 36 latent tokens of 4 x 4 RGB values, words for tokens.

    Args:
        task: the prompts.
        reward: of a finished episode.
        rounds: whether the words of several pictures may be said.
        prompt_budget, text_budget, image_steps, time_shift: see `Rules`; every variant of this world takes them.
        rules: what else `Rules` takes, beyond this world's own tokens and sizes.
    """
    tokenizer = shapes_tokenizer()
    vocabulary = tokenizer.get_vocab()
    unused = [vocabulary[mark] for mark in ("<pad>", "<bos>", "<unk>", "<image>", "</image>")]
    if not rounds:
        unused += [vocabulary[word] for word in ROUND_WORDS]
    elif rules.get("end_id") is None:
        unused.append(vocabulary["<end>"])
    own = Rules(
        vocab_size=64,
        prompt_budget=prompt_budget,
        text_budget=text_budget,
        image_steps=image_steps,
        time_shift=time_shift,
        latent_shape=(36, 48),
        open_image_id=tokenizer.eos_token_id,
        forbidden_ids=(*unused, *range(len(tokenizer), 64)),
        pad_id=tokenizer.pad_token_id,
        image_id=vocabulary["<image>"],
        next_ids=(tokenizer.bos_token_id,),
        **rules,
    )
    return Variant(own, task, tokenizer, PixelDecoder(24, 24, patch=4), reward=reward)


@register_variant("text_to_image")
def text_to_image(*, task: Task | None = None, **rules: Any) -> Variant:
    """Think, then draw one picture, in the shapes world."""
    return shapes_variant(task or ShapesTask(), reward="shapes", **rules)


@register_variant("edit")
def edit(*, task: Task | None = None, source_images: int = 1, **rules: Any) -> Variant:
    """Look at a picture and an instruction, think, and draw the picture with that one change; of several pictures, the last."""
    rules = {"prompt_budget": 15 + source_images} | rules
    return shapes_variant(task or EditTask(source_images), reward="edit", rounds=True, source_images=source_images, **rules)


@register_variant("reflect")
def reflect(*, task: Task | None = None, image_budget: int = 3, text_budget: int = 36, price: float = 0.05, **rules: Any) -> Variant:
    """Think, draw, look at the picture, say what is there and whether it is right, and draw again or stop: the last picture counts, every further one has a price."""
    end = shapes_tokenizer().get_vocab()["<end>"]
    reward = {"reflect": 1.0, "extra_pictures": -price}
    variant = shapes_variant(
        task or ReflectTask(image_budget),
        reward=reward,
        rounds=True,
        image_budget=image_budget,
        text_budget=text_budget,
        end_id=end,
        end_before_image=False,
        **rules,
    )
    return dataclasses.replace(variant, lowest_reward=-price * (image_budget - 1))


@register_variant("story")
def story(*, pictures: int = 3, **rules: Any) -> Variant:
    """Draw a sequence of pictures with words between them; each adds to the last and must agree with it."""
    rules = {"prompt_budget": max(16, 4 * pictures + 2), "text_budget": max(24, 4 * pictures)} | rules
    return shapes_variant(StoryTask(pictures), reward="story", rounds=True, image_budget=pictures, **rules)


@register_variant("dialogue")
def dialogue(*, task: Task | None = None, **rules: Any) -> Variant:
    """Draw what the user asks for, hear what they want changed, and draw again."""
    rules = {"image_budget": 2, "turn_budget": 10} | rules
    return shapes_variant(task or DialogueTask(), reward="dialogue", rounds=True, **rules)


@register_variant("toy")
def toy(*, prompt_budget: int = 4, text_budget: int = 2, image_steps: int = 8, time_shift: float = 1.0) -> Variant:
    """Say the prompt's word, then paint its grey: two prompts, a best policy that is known, episodes of microseconds."""
    tokenizer = toy_tokenizer()
    rules = Rules(
        vocab_size=len(tokenizer),
        prompt_budget=prompt_budget,
        text_budget=text_budget,
        image_steps=image_steps,
        time_shift=time_shift,
        latent_shape=(1, 12),
        open_image_id=tokenizer.eos_token_id,
        forbidden_ids=(0, 1),
        pad_id=tokenizer.pad_token_id,
    )
    return Variant(rules, ToyTask(), tokenizer, PixelDecoder(2, 2, patch=2), reward="toy")

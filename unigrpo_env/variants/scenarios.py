"""The scenarios that come with the library.

Each is a function that returns a `Variant`. Without a processor it is played in the shapes world,
which has a task and a reward for each of them. With another backbone's processor the task (a
`PromptFile`, say) and the reward must be given.
"""

from __future__ import annotations

from typing import Any

from unigrpo_env.processor import Processor
from unigrpo_env.tasks.shapes.editing import DialogueTask, EditTask
from unigrpo_env.tasks.shapes.multi_image import ReflectTask, StoryTask
from unigrpo_env.tasks.shapes.processor import ShapesProcessor
from unigrpo_env.tasks.shapes.text_to_image import ShapesTask
from unigrpo_env.tasks.shapes.vocabulary import words
from unigrpo_env.tasks.task import Task
from unigrpo_env.variants.variant import RewardSpec, Scenario, Variant


def play(
    scenario: Scenario,
    processor: Processor | None,
    task: Task | None,
    reward: RewardSpec | None,
    *,
    shapes_task: Task,
    shapes_reward: RewardSpec,
) -> Variant:
    """A scenario with the parts that were given, and those of the shapes world for the others.

    Raises:
        ValueError: no task or reward for a processor that does not know the shapes world.
    """
    if processor is None:
        processor = ShapesProcessor()
    if not _knows_shapes(processor):
        for name, part in (("task (env.prompts)", task), ("reward (env.reward)", reward)):
            if part is None:
                raise ValueError(
                    f"expected a {name} for {type(processor).__name__}, got none; "
                    "the scenario's own is made for the shapes world"
                )
    if task is None:
        task = shapes_task
    if reward is None:
        reward = shapes_reward
    return scenario.variant(processor, task, reward)


def _knows_shapes(processor: Processor) -> bool:
    """Whether a processor has the words of the shapes world, and draws images of its size."""
    if processor.image_size != ShapesProcessor().image_size:
        return False
    text = " ".join(words())
    return processor.decode_text(processor.encode_text(text)) == text


def make_scenario(
    processor: Processor | None, defaults: dict[str, Any], settings: dict[str, Any]
) -> Scenario:
    """A scenario from its own defaults, a backbone's budgets, and what the user set.

    Args:
        processor: of the backbone; None for the shapes world.
        defaults: of the scenario, made for the shapes world.
        settings: what the user set, which wins.
    """
    found = dict(defaults)
    if processor is not None:
        for name, value in processor.scenario_defaults.items():
            # Where no user speaks there is no turn to make room for.
            if name != "turn_budget" or "turn_budget" in defaults:
                found[name] = value
    return Scenario(**(found | settings))


def text_to_image(
    processor: Processor | None = None,
    task: Task | None = None,
    reward: RewardSpec | None = None,
    **settings: Any,
) -> Variant:
    """Think, then draw one image."""
    scenario = make_scenario(processor, {}, settings)
    return play(scenario, processor, task, reward, shapes_task=ShapesTask(), shapes_reward="shapes")


def edit(
    processor: Processor | None = None,
    task: Task | None = None,
    reward: RewardSpec | None = None,
    source_images: int = 1,
    **settings: Any,
) -> Variant:
    """Read an image and an instruction, think, and draw the image with that one change."""
    # Each source takes one token of the prompt. The user's settings win over these.
    defaults = {
        "prompt_budget": 15 + source_images,
        "source_images": source_images,
        "min_source_images": min(source_images, 1),
    }
    scenario = make_scenario(processor, defaults, settings)
    shapes_task = EditTask(source_images)
    return play(scenario, processor, task, reward, shapes_task=shapes_task, shapes_reward="edit")


def reflect(
    processor: Processor | None = None,
    task: Task | None = None,
    reward: RewardSpec | None = None,
    image_budget: int = 3,
    extra_image_penalty: float = 0.05,
    **settings: Any,
) -> Variant:
    """Draw, read the image, say whether it is correct, and draw again or stop.

    The last image counts; every further one costs `extra_image_penalty`. A reward that is given
    replaces both: write `my_reward - 0.05 * extra_images` to keep the cost.
    """
    defaults = {
        "text_budget": 36,
        "image_budget": image_budget,
        "may_end": True,
        # What the worst episode gets: every image was drawn, and the last one is wrong.
        "lowest_reward": -extra_image_penalty * (image_budget - 1),
    }
    scenario = make_scenario(processor, defaults, settings)
    return play(
        scenario,
        processor,
        task,
        reward,
        shapes_task=ReflectTask(image_budget),
        shapes_reward={"reflect": 1.0, "extra_images": -extra_image_penalty},
    )


def story(
    processor: Processor | None = None,
    task: Task | None = None,
    reward: RewardSpec | None = None,
    images: int = 3,
    **settings: Any,
) -> Variant:
    """Draw a sequence of images with text between them; each adds to the last."""
    # For each image the prompt and a thought name an object in four words.
    defaults = {
        "prompt_budget": max(16, 4 * images + 2),
        "text_budget": max(24, 4 * images),
        "image_budget": images,
    }
    scenario = make_scenario(processor, defaults, settings)
    shapes_task = StoryTask(images)
    return play(scenario, processor, task, reward, shapes_task=shapes_task, shapes_reward="story")


def dialogue(
    processor: Processor | None = None,
    task: Task | None = None,
    reward: RewardSpec | None = None,
    **settings: Any,
) -> Variant:
    """Draw what the user asks for, read what they want changed, and draw again."""
    defaults = {"image_budget": 2, "turn_budget": 10}
    scenario = make_scenario(processor, defaults, settings)
    return play(
        scenario, processor, task, reward, shapes_task=DialogueTask(), shapes_reward="dialogue"
    )

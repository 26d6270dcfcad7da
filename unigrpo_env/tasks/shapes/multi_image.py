"""Tasks of several images in the shapes world: reflection and stories."""

from __future__ import annotations

import random
from collections.abc import Sequence

from rewards.shapes.grid import KINDS, VERDICT_CORRECT, VERDICT_WRONG
from rewards.shapes.verifier import judge
from unigrpo_env.tasks.shapes.demonstrations import (
    CELLS,
    ERRORS,
    NO_ERRORS,
    Answer,
    DemonstratedTask,
    DrawingErrors,
    ErrorRates,
    Layout,
    LayoutPlan,
    RejectionSampledTask,
    cell_value,
    draw_answers,
    empty_cells,
    make_plan,
)
from unigrpo_env.tasks.shapes.editing import move_random_object
from unigrpo_env.tasks.shapes.prompts import PROMPT_KINDS, name_one, sample_prompts, want
from unigrpo_env.tasks.task import Demonstration, Prompt, Split


class ReflectTask(DemonstratedTask):
    """The prompts of `ShapesTask`, answered in several attempts.

    After each image the thought describes it, says whether it is correct, and then stops or plans
    the next image. The systematic error of that verdict is to compare the image with the plan
    instead of the prompt. Each further attempt has half the systematic errors of the one before.

    Args:
        images: how many there may be.
    """

    def __init__(self, images: int = 3) -> None:
        self.kinds = PROMPT_KINDS
        self.images = images

    def prompts(self, split: Split, count: int, seed: int) -> list[Prompt]:
        """See `unigrpo_env.tasks.task.Task`."""
        return sample_prompts(self.kinds, split, count, seed)

    def answer(self, prompt: Prompt, rng: random.Random, rates: ErrorRates) -> Answer:
        """See `DemonstratedTask`."""
        attempts = []
        for number in range(self.images):
            # Random errors stay as frequent as they were.
            share = 2**number
            attempts.append(ErrorRates(rates.text / share, rates.image / share, rates.random))
        return self._reflection(prompt, rng, attempts, rates)

    def warmup_demonstrations(self, count: int, seed: int) -> list[Demonstration]:
        """Demonstrations in which nothing is wrong but the first image and its thought.

        They show how a wrong image differs from a correct one.
        """
        rng = random.Random(f"drills-{type(self).__name__}-{seed}")
        attempts = [ERRORS, *[NO_ERRORS] * (self.images - 1)]
        prompts = self.prompts("train", count, seed + 500_000)
        answers = []
        for prompt in prompts:
            answers.append(self._reflection(prompt, rng, attempts, NO_ERRORS))
        return draw_answers(prompts, answers)

    def _reflection(
        self,
        prompt: Prompt,
        rng: random.Random,
        attempts: Sequence[ErrorRates],
        verdicts: ErrorRates,
    ) -> Answer:
        """Attempts until one is called correct, or all images are drawn.

        Args:
            prompt: what is asked for.
            rng: the source of randomness.
            attempts: the error rates of each image and its plan.
            verdicts: the error rates of the verdicts.
        """
        thoughts: list[str] = []
        layouts: list[Layout] = []
        # What the next thought says of the last image; nothing before the first.
        remark = ""
        for rates in attempts:
            plan = make_plan(prompt, rng, rates)
            # A thought looks back first, and then plans.
            thoughts.append(f"{remark} {plan.words()}".strip())
            drawn = DrawingErrors.sample(rng, rates).apply(plan, rng)
            layouts.append(drawn)
            verdict = _verdict(prompt, plan, drawn, rng, verdicts)
            remark = f"{_description(plan, drawn)} {verdict}".strip()
            # After the last image the env ends the episode by itself.
            if verdict == VERDICT_CORRECT and len(layouts) < self.images:
                thoughts.append(f"{remark} <end>")
                break
        return Answer(thoughts, layouts)


def _verdict(
    prompt: Prompt, plan: LayoutPlan, drawn: Layout, rng: random.Random, rates: ErrorRates
) -> str:
    """Whether an image is correct, with errors."""
    if rng.random() < rates.text:
        is_correct = drawn == plan.layout()
    else:
        is_correct = judge(drawn, prompt.metadata).strict == 1
    # Both numbers are drawn in any case, so that the rates change no other draw.
    if rng.random() < rates.random:
        is_correct = not is_correct
    if is_correct:
        return VERDICT_CORRECT
    return VERDICT_WRONG


def _description(plan: LayoutPlan, drawn: Layout) -> str:
    """What is seen in an image, with its number of objects if the plan named one."""
    seen = LayoutPlan.from_layout(drawn)
    if plan.count is not None:
        seen.count = len(seen.objects)
    return seen.words()


class StoryTask(RejectionSampledTask):
    """`a red circle then a blue square then ...`: each image adds one object to the last.

    Sets of parts are held out, by their words.

    Args:
        images: the number of parts.

    Raises:
        ValueError: no part, or more than there are cells.
    """

    def __init__(self, images: int = 3) -> None:
        if not 1 <= images <= CELLS:
            raise ValueError(
                f"expected 1 to {CELLS} images, got {images}: each puts one more object on the grid"
            )
        self.images = images

    def propose(self, rng: random.Random) -> tuple[str, Prompt]:
        """See `RejectionSampledTask`."""
        # All different, so that each part can be found in an image.
        named = rng.sample(KINDS, self.images)
        parts = [want(colour, shape) for colour, shape in named]
        text = " then ".join(name_one(colour, shape) for colour, shape in named)
        return text, Prompt(text, {"kind": f"{self.images} pictures", "parts": parts})

    def answer(self, prompt: Prompt, rng: random.Random, rates: ErrorRates) -> Answer:
        """See `DemonstratedTask`. The systematic error is to move an object that should stay."""
        errors = DrawingErrors.sample(rng, rates)
        moves_objects = rng.random() < rates.text
        layout = [0] * CELLS
        answer = Answer([], [])
        for part in prompt.metadata["parts"]:
            # In the first round there is nothing to move.
            if moves_objects:
                move_random_object(layout, rng)
            place = rng.choice(empty_cells(layout))
            layout[place] = cell_value(part["colour"], part["shape"])
            # The layout goes on from what was planned, with or without errors of drawing.
            plan = LayoutPlan.from_layout(layout)
            answer.thoughts.append(plan.words())
            answer.layouts.append(errors.apply(plan, rng))
        return answer

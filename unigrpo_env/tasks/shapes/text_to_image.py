"""The task of one image in the shapes world: draw what a prompt asks for."""

from __future__ import annotations

import random
from collections.abc import Sequence

from rewards.shapes.grid import KINDS
from unigrpo_env.tasks.shapes.demonstrations import (
    CELLS,
    Answer,
    DrawingErrors,
    LayoutPlan,
    draw_answers,
    error_rates,
    make_plan,
)
from unigrpo_env.tasks.shapes.prompts import OPENINGS, PROMPT_KINDS, sample_prompts
from unigrpo_env.tasks.task import Demonstration, Prompt, Split


class ShapesTask:
    """Prompts for one image; a `DemonstrationTask`.

    Args:
        kinds: the kinds of prompt to draw from, each equally often.
    """

    def __init__(self, kinds: Sequence[str] = PROMPT_KINDS) -> None:
        self.kinds = tuple(kinds)

    def prompts(self, split: Split, count: int, seed: int) -> list[Prompt]:
        """See `unigrpo_env.tasks.task.Task`."""
        return sample_prompts(self.kinds, split, count, seed)

    def demonstrations(self, count: int, seed: int, *, clean: bool = False) -> list[Demonstration]:
        """See `unigrpo_env.tasks.task.DemonstrationTask`."""
        rng = random.Random(f"lessons-{seed}")
        rates = error_rates(clean)
        prompts = self.prompts("train", count, seed)
        # All thoughts are made before the first image, or the seeds would mean something else.
        plans = [make_plan(prompt, rng, rates) for prompt in prompts]
        answers = []
        for plan in plans:
            errors = DrawingErrors.sample(rng, rates)
            answers.append(Answer([plan.words()], [errors.apply(plan, rng)]))
        return draw_answers(prompts, answers)

    def warmup_demonstrations(self, count: int, seed: int) -> list[Demonstration]:
        """Two to four objects anywhere, under a prompt without a request: `draw`.

        All are correct. They show that an image follows the words of its thought.
        """
        rng = random.Random(f"drills-{seed}")
        answers = []
        for _ in range(count):
            plan = _free_plan(rng)
            answers.append(Answer([plan.words()], [plan.layout()]))
        prompts = []
        for _ in range(count):
            # The first opening is empty.
            prompts.append(Prompt(rng.choice(OPENINGS[1:]).strip()))
        return draw_answers(prompts, answers)


def _free_plan(rng: random.Random) -> LayoutPlan:
    """Two to four objects anywhere, row by row."""
    count = rng.choice([2, 3, 4])
    # Row by row, as in the plans of prompts that name a number.
    places = sorted(rng.sample(range(CELLS), count))
    plan = LayoutPlan()
    for place in places:
        colour, shape = rng.choice(KINDS)
        plan.objects.append((colour, shape, place))
    return plan

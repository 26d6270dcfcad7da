"""The toy task."""

import torch

from rewards.toy import toy
from unigrpo_env.tasks.task import demonstration_batch
from unigrpo_env.tasks.toy import ToyTask


def test_prompts_come_in_turn():
    task = ToyTask()
    for split in ("train", "test"):
        assert [prompt.text for prompt in task.prompts(split, 3, 0)] == ["dark", "light", "dark"]
        assert [prompt.text for prompt in task.prompts(split, 2, 3)] == ["light", "dark"]


def test_demonstrations_are_the_best_answers():
    task = ToyTask()
    for shown in (task.demonstrations(4, 1), task.warmup_demonstrations(4, 0)):
        assert toy(demonstration_batch(shown))["reward"].tolist() == [1, 1, 1, 1]
        assert {tuple(each.images.shape) for each in shown} == {(1, 3, 2, 2)}
        assert shown[0].images.dtype == torch.float32

"""A benchmark: images for a list of prompts, their scores, and the means by kind of prompt.

Everything is written as it comes, and what is there already is not done again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch

from agents.evaluation.accuracy import Evaluation
from agents.evaluation.benchmark_folder import BenchmarkFolder, Slot
from rewards import EpisodeBatch, Failures, Scores, WeightedReward
from rewards.geneval.reward import GenEval
from unigrpo_env.tasks.task import Prompt

Play = Callable[[list[Prompt], int], Evaluation]
"""Plays an episode for each prompt; the second argument is the seed of the first, and each further
one has the next seed."""

Report = Callable[[int], None]
"""Is told how many images were drawn or scored since it was last called."""


@dataclass(frozen=True)
class Scoring:
    """How images are scored.

    Attributes:
        name: which scorer with which models. Scores of another name are not taken for these.
        score: scores N episodes; with a text for each that says what is wrong, empty where nothing
            is known.
    """

    name: str
    score: Callable[[EpisodeBatch], tuple[Scores, list[str]]]


def score_by_reward(reward: WeightedReward, name: str) -> Scoring:
    """Scoring by any reward.

    Args:
        reward: scores episodes.
        name: see `Scoring`.
    """
    return Scoring(name, lambda episodes: (reward(episodes), [""] * len(episodes)))


def score_by_geneval(reward: GenEval) -> Scoring:
    """Scoring by GenEval's verdicts, with their reasons.

    Args:
        reward: its verdicts are taken; whether it is strict or soft does not matter.
    """

    def _score(episodes: EpisodeBatch) -> tuple[Scores, list[str]]:
        verdicts = reward.verdicts(episodes.images, episodes.metadata)
        correct = torch.tensor([float(verdict.correct) for verdict in verdicts])
        soft = torch.tensor([verdict.soft for verdict in verdicts])
        reasons = ["; ".join(verdict.reasons) for verdict in verdicts]
        return Scores(correct, {"soft": soft}), reasons

    return Scoring(reward.title, _score)


def draw(folder: BenchmarkFolder, play: Play, seed: int, batch_size: int, report: Report) -> None:
    """Draw the images that are missing.

    The episode of a prompt and a sample has a seed of its own, so neither an interruption nor the
    size of a batch changes it.

    Args:
        folder: gets the images.
        play: plays episodes.
        seed: of the first prompt's first image.
        batch_size: episodes at a time, at most.
        report: is told of the progress.
    """
    for slots in _runs(folder.missing(), batch_size):
        first = slots[0]
        prompts = [folder.prompts[slot.prompt] for slot in slots]
        played = play(prompts, seed + first.sample * len(folder.prompts) + first.prompt)
        images = played.images
        for row, slot in enumerate(slots):
            folder.save(slot, images[row], played.thoughts[row], len(played.all_images[row]))
        report(len(slots))


def _runs(slots: Sequence[Slot], batch_size: int) -> list[list[Slot]]:
    """Neighbours of one sample together, at most so many: their seeds follow each other."""
    runs: list[list[Slot]] = []
    for slot in slots:
        last = runs[-1] if runs else []
        is_next = bool(last) and slot == (last[-1].sample, last[-1].prompt + 1)
        if is_next and len(last) < batch_size:
            last.append(slot)
        else:
            runs.append([slot])
    return runs


def score(folder: BenchmarkFolder, scoring: Scoring, batch_size: int, report: Report) -> Failures:
    """Score the images that have no score of this scorer yet.

    Args:
        folder: has the images, and gets the scores.
        scoring: how.
        batch_size: images at a time.
        report: is told of the progress.

    Returns:
        Why images could not be scored; another call tries them again.

    Raises:
        Exception: whatever the scorer raised.
    """
    failures = Failures()
    known = folder.scores(scoring.name)
    left = [slot for slot in folder.slots if slot not in known]
    for start in range(0, len(left), batch_size):
        slots = left[start : start + batch_size]
        episodes, drew = folder.read(slots)
        scores, reasons = scoring.score(episodes)
        failures = failures.merged(scores.failures)
        lines = []
        for row, slot in enumerate(slots):
            line = _line(folder, slot, scoring.name)
            line |= _marks(scores, row, reasons[row])
            if not drew[row]:
                # As in training: leaving without an image is not worth more than a wrong one.
                line |= {"reward": 0.0, "reason": "no image was drawn"}
            if not math.isnan(line["reward"]):
                lines.append(line)
        folder.add_scores(lines)
        report(len(slots))
    return failures


def _line(folder: BenchmarkFolder, slot: Slot, scorer: str) -> dict[str, Any]:
    """What is known of an image before it is scored."""
    prompt = folder.prompts[slot.prompt]
    return {
        "scorer": scorer,
        "filename": str(folder.image_path(slot).relative_to(folder.path)),
        "index": slot.prompt,
        "sample": slot.sample,
        "tag": _tag(prompt),
        "prompt": prompt.text,
    }


def _marks(scores: Scores, row: int, reason: str) -> dict[str, Any]:
    """The score of an image with its parts; JSON knows no NaN."""
    parts = {}
    for name, values in scores.components.items():
        value = float(values[row])
        parts[name] = None if math.isnan(value) else value
    marks: dict[str, Any] = {"reward": float(scores.reward[row]), "parts": parts}
    if reason:
        marks["reason"] = reason
    return marks


def _tag(prompt: Prompt) -> str:
    """The kind of a prompt, where its metadata has one."""
    for key in ("tag", "kind", "category"):
        if key in prompt.metadata:
            return str(prompt.metadata[key])
    return "all"


@dataclass(frozen=True)
class KindSummary:
    """The images of one kind of prompts.

    Attributes:
        mean: of the scores.
        images: how many were scored.
        best: the mean over prompts of the best score among their images.
    """

    mean: float
    images: int
    best: float


@dataclass(frozen=True)
class Summary:
    """What a benchmark says.

    Attributes:
        scorer: see `Scoring.name`.
        kinds: by kind of prompt, in the order of the file; kinds without a score are left out.
        unscored: images that have no score.
    """

    scorer: str
    kinds: dict[str, KindSummary] = field(default_factory=dict)
    unscored: int = 0

    @property
    def mean_of_kinds(self) -> float:
        """The mean over kinds, each of which counts alike; NaN if nothing was scored."""
        if not self.kinds:
            return math.nan
        return fmean(kind.mean for kind in self.kinds.values())

    @property
    def mean_of_images(self) -> float:
        """The mean over all images; NaN if nothing was scored."""
        if not self.kinds:
            return math.nan
        images = [kind.images for kind in self.kinds.values()]
        return fmean((kind.mean for kind in self.kinds.values()), images)


def summarise(folder: BenchmarkFolder, scorer: str) -> Summary:
    """The means of what a scorer has said so far.

    Args:
        folder: has the scores.
        scorer: its name.
    """
    lines = folder.scores(scorer)
    # Scores by kind and prompt, in the order of the file.
    found: dict[str, dict[int, list[float]]] = {}
    for slot in sorted(lines, key=lambda slot: slot.prompt):
        of_kind = found.setdefault(lines[slot]["tag"], {})
        of_kind.setdefault(slot.prompt, []).append(lines[slot]["reward"])
    kinds = {}
    for tag, of_kind in found.items():
        every = [value for values in of_kind.values() for value in values]
        best = fmean(max(values) for values in of_kind.values())
        kinds[tag] = KindSummary(fmean(every), len(every), best)
    return Summary(scorer, kinds, len(folder.slots) - len(lines))

"""A benchmark: images on disk, scores, and means by kind."""

import json
import math

import pytest
import torch
from PIL import Image

from agents.evaluation.accuracy import Evaluation
from agents.evaluation.benchmark import (
    Scoring,
    draw,
    score,
    score_by_geneval,
    score_by_reward,
    summarise,
)
from agents.evaluation.benchmark_folder import BenchmarkFolder, Slot
from rewards import Failures, Scores, WeightedReward
from rewards.geneval.reward import GenEval
from rewards.geneval.verifier import Detection
from unigrpo_env.tasks.task import Prompt

PROMPTS = [
    Prompt("a cup", {"tag": "single_object", "include": [{"class": "cup", "count": 1}]}),
    Prompt("two cups", {"tag": "counting", "include": [{"class": "cup", "count": 2}]}),
    Prompt("three cups", {"tag": "counting", "include": [{"class": "cup", "count": 3}]}),
]


class Player:
    """Plays episodes whose image shows their seed; `silent` seeds draw nothing."""

    def __init__(self, silent=(), stops_after=math.inf):
        self.seeds = []
        self.silent = silent
        self.left = stops_after

    def __call__(self, prompts, seed):
        if self.left <= 0:
            raise KeyboardInterrupt
        self.left -= 1
        images = []
        for number in range(seed, seed + len(prompts)):
            self.seeds.append(number)
            drawn = int(number not in self.silent)
            images.append(torch.full((drawn, 3, 4, 6), number / 255))
        thoughts = [[f"I think of {prompt.text}"] for prompt in prompts]
        return Evaluation(list(prompts), thoughts, images, torch.zeros(len(prompts)), {})


def quiet(count):
    """A report that nobody reads."""


def level(episodes):
    """The seed that an image shows."""
    return (episodes.images[:, 0, 0, 0] * 255).round()


def drawn(path, samples=2, batch_size=2, player=None):
    folder = BenchmarkFolder(path, PROMPTS, samples)
    folder.claim({"model": "tiny"})
    draw(folder, player or Player(), 10, batch_size, quiet)
    return folder


def by_level():
    return score_by_reward(WeightedReward(level), "level")


def test_layout_on_disk(tmp_path):
    drawn(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"00000", "00001", "00002", "settings.json"}
    line = json.loads((tmp_path / "00001/metadata.jsonl").read_text())
    assert line == {**PROMPTS[1].metadata, "prompt": "two cups"}
    samples = tmp_path / "00001/samples"
    assert sorted(path.name for path in samples.iterdir()) == ["0000.png", "0001.png"]
    with Image.open(samples / "0001.png") as image:
        assert image.size == (6, 4)
        # Seed 10, and the second prompt of three in the second round.
        assert image.getpixel((0, 0)) == (14, 14, 14)
    # Only folders of digits are samples for the official scorer.
    note = json.loads((tmp_path / "00001/thoughts/0001.json").read_text())
    assert note == {"thoughts": ["I think of two cups"], "images": 1}


def test_an_interrupted_run_goes_on(tmp_path):
    first = Player(stops_after=2)
    with pytest.raises(KeyboardInterrupt):
        drawn(tmp_path / "a", player=first)
    assert first.seeds == [10, 11, 12]
    second = Player()
    folder = drawn(tmp_path / "a", player=second)
    assert second.seeds == [13, 14, 15]
    whole = drawn(tmp_path / "b")
    for slot in whole.slots:
        assert folder.image_path(slot).read_bytes() == whole.image_path(slot).read_bytes()
    again = Player()
    drawn(tmp_path / "a", player=again)
    assert again.seeds == []


def test_more_samples_keep_the_first(tmp_path):
    drawn(tmp_path, samples=1)
    player = Player()
    drawn(tmp_path, samples=3, player=player)
    assert player.seeds == list(range(13, 19))


def test_a_lost_image_is_drawn_alone(tmp_path):
    folder = drawn(tmp_path)
    for slot in (Slot(0, 1), Slot(1, 0), Slot(1, 1)):
        (tmp_path / f"{slot.prompt:05}/thoughts/{slot.sample:04}.json").unlink()
    player = Player()
    draw(folder, player, 10, 8, quiet)
    assert player.seeds == [11, 13, 14]


def test_images_of_other_settings_are_not_mixed(tmp_path):
    drawn(tmp_path)
    with pytest.raises(ValueError, match="model was 'tiny' and is 'large'; choose another folder"):
        BenchmarkFolder(tmp_path, PROMPTS, 2).claim({"model": "large"})
    with pytest.raises(ValueError, match="prompts differ"):
        BenchmarkFolder(tmp_path, PROMPTS[:2], 2).claim({"model": "tiny"})


def test_means_by_kind(tmp_path):
    folder = drawn(tmp_path)
    score(folder, by_level(), 4, quiet)
    found = summarise(folder, "level")
    # Seeds 10 and 13; 11, 12, 14 and 15.
    assert found.kinds["single_object"].mean == 11.5
    assert found.kinds["counting"].mean == 13
    assert found.kinds["counting"].best == 14.5
    assert found.kinds["counting"].images == 4
    assert found.mean_of_kinds == 12.25
    assert found.mean_of_images == 12.5
    assert found.unscored == 0
    assert list(found.kinds) == ["single_object", "counting"]


def test_scores_go_on_where_they_stopped(tmp_path):
    folder = drawn(tmp_path)
    asked = []

    def stops(episodes):
        if len(asked) == 4:
            raise ConnectionError("the server is gone")
        asked.extend(level(episodes).tolist())
        return level(episodes)

    with pytest.raises(ConnectionError):
        score(folder, score_by_reward(WeightedReward(stops), "level"), 2, quiet)
    # As after a kill in the middle of a line.
    with (tmp_path / "scores.jsonl").open("a") as file:
        file.write('{"scorer": "lev')
    asked.clear()
    score(folder, score_by_reward(WeightedReward(stops), "level"), 1, quiet)
    assert asked == [14, 15]
    assert summarise(folder, "level").unscored == 0


def test_scores_of_another_scorer_are_not_taken(tmp_path):
    folder = drawn(tmp_path)
    score(folder, by_level(), 4, quiet)
    assert summarise(folder, "another") == summarise(
        BenchmarkFolder(tmp_path, PROMPTS, 2), "another"
    )
    assert summarise(folder, "another").unscored == 6
    assert math.isnan(summarise(folder, "another").mean_of_kinds)


def test_an_image_without_a_score_is_left_out_and_tried_again(tmp_path):
    folder = drawn(tmp_path)

    def fails(episodes):
        reward = level(episodes)
        reward[reward == 10] = torch.nan
        return Scores(reward, {}, Failures({"HTTP 500": 1}))

    failures = score(folder, score_by_reward(WeightedReward(fails), "level"), 8, quiet)
    assert "HTTP 500" in str(failures)
    found = summarise(folder, "level")
    assert found.unscored == 1
    assert found.kinds["single_object"].mean == 13
    assert not score(folder, by_level(), 8, quiet)
    assert summarise(folder, "level").unscored == 0


def test_an_episode_without_an_image_is_worth_nothing(tmp_path):
    folder = drawn(tmp_path, player=Player(silent={10}))
    always = Scoring("one", lambda episodes: (Scores(torch.ones(len(episodes))), [""] * 6))
    score(folder, always, 6, quiet)
    assert summarise(folder, "one").kinds["single_object"].mean == 0.5
    lines = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert lines[0]["reason"] == "no image was drawn"
    assert lines[0]["filename"] == "00000/samples/0000.png"


def test_the_scorer_sees_what_is_on_disk(tmp_path):
    folder = drawn(tmp_path)
    seen = []

    def look(episodes):
        seen.append(episodes)
        return [0.0] * len(episodes)

    score(folder, score_by_reward(WeightedReward(look), "look"), 6, quiet)
    (episodes,) = seen
    assert episodes.prompts[:3] == [prompt.text for prompt in PROMPTS]
    assert episodes.metadata[0] == PROMPTS[0].metadata
    assert episodes.thoughts[0] == ["I think of a cup"]


def test_geneval_with_reasons(tmp_path):
    def two_cups(images):
        box = (0.0, 0.0, 2.0, 2.0)
        return [[Detection("cup", 0.95, box), Detection("cup", 0.95, box)] for _ in images]

    reward = GenEval(detector=two_cups, colours=lambda *_: [])
    folder = drawn(tmp_path, samples=1)
    scoring = score_by_geneval(reward)
    assert "objects by two_cups" in scoring.name
    score(folder, scoring, 8, quiet)
    kinds = summarise(folder, scoring.name).kinds
    assert {name: kind.mean for name, kind in kinds.items()} == {
        "single_object": 1,
        "counting": 0.5,
    }
    lines = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert lines[2]["reason"] == "expected 3 cup, found 2"
    assert "reason" not in lines[1]

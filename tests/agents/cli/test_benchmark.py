"""`unigrpo benchmark`."""

import json

import pytest

import rewards.geneval.reward
from agents.cli import main
from agents.cli.benchmark import BENCHMARKS
from rewards import register_reward
from rewards.geneval.verifier import Detection

pytestmark = pytest.mark.slow

LINES = [
    {
        "tag": "counting",
        "include": [{"class": "cup", "count": 2}],
        "exclude": [{"class": "cup", "count": 3}],
        "prompt": "two red circles",
    },
    {
        "tag": "colors",
        "include": [{"class": "cup", "count": 1, "color": "red"}],
        "prompt": "a red circle",
    },
]


class OneCup:
    """A detector that finds a cup in every image."""

    def __init__(self, **options):
        self.batches = []

    def __call__(self, images):
        self.batches.append(len(images))
        return [[Detection("cup", 0.95, (0.0, 0.0, 8.0, 8.0))] for _ in images]


@pytest.fixture
def words(monkeypatch, tmp_path):
    """The command for a file of two prompts, with a detector that needs no model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rewards.geneval.reward, "Mask2FormerDetector", OneCup)
    monkeypatch.setattr(
        rewards.geneval.reward, "ClipColours", lambda clip: lambda image, some, name: ["red"]
    )
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    # A process keeps a reward by its options, so they are those of this test alone.
    detector = f"env.reward_options.geneval.detector={tmp_path.name}"
    return [
        "benchmark", "geneval", "--prompts", "prompts.jsonl", "--samples", "2", "--out", "found",
        "trainer.threads=1", "evaluation.image_steps=2", detector,
    ]  # fmt: skip


def test_images_of_the_shipped_model_are_scored(words, tmp_path, capsys):
    assert main(words) == 0
    figures = json.loads((tmp_path / "found/results.json").read_text())
    assert {name: kind["mean"] for name, kind in figures["kinds"].items()} == {
        "counting": 0,
        "colors": 1,
    }
    assert figures["mean_of_kinds"] == 0.5
    assert figures["unscored"] == 0
    # The table names the detector: without it the figures could not be compared.
    out = " ".join(capsys.readouterr().out.split())
    assert "colours by openai/clip-vit-large-patch14" in out
    assert "mean of the 2" in out
    first = (tmp_path / "found/00001/samples/0001.png").stat().st_mtime_ns
    assert main(words) == 0
    assert (tmp_path / "found/00001/samples/0001.png").stat().st_mtime_ns == first
    assert len((tmp_path / "found/scores.jsonl").read_text().splitlines()) == 4
    # Images of other settings would be a mixture.
    assert main([*words, "evaluation.seed=7"]) == 2
    assert "seed was 1000000 and is 7" in " ".join(capsys.readouterr().err.split())


def test_questions_go_to_the_judge(monkeypatch, words, tmp_path):
    asked = []

    class FakeJudge:
        """Remembers what it is asked."""

        def __init__(self, *, url, mode, token):
            asked.append((url, mode))

        def __call__(self, episodes):
            asked.extend(each["questions"] for each in episodes.metadata)
            return [0.25] * len(episodes)

    name, options = BENCHMARKS["questions"]
    assert name == "judge"
    register_reward("fake_judge")(FakeJudge)
    monkeypatch.setitem(BENCHMARKS, "questions", ("fake_judge", options))
    line = {"prompt": "a red circle", "questions": ["Is there a circle?", "Is it red?"]}
    (tmp_path / "prompts.jsonl").write_text(json.dumps(line) + "\n")
    url = "http://127.0.0.1:9/v1"
    given = [f"env.reward_options.fake_judge.{option}" for option in (f"url={url}", "token=secret")]
    assert main(["benchmark", "questions", *words[2:-1], *given]) == 0
    assert asked == [(url, "questions"), line["questions"], line["questions"]]
    figures = json.loads((tmp_path / "found/results.json").read_text())
    assert figures["kinds"]["all"]["mean"] == 0.25
    for path in (tmp_path / "found").rglob("*.json*"):
        assert "secret" not in path.read_text()


def test_a_missing_scorer_is_known_before_anything_is_drawn(words, tmp_path, monkeypatch, capsys):
    class Missing(OneCup):
        def __call__(self, images):
            raise ImportError("reward 'geneval' needs scipy")

    monkeypatch.setattr(rewards.geneval.reward, "Mask2FormerDetector", Missing)
    assert main([*words[:-1], f"{words[-1]}-missing"]) == 2
    assert "needs scipy" in capsys.readouterr().err
    assert not (tmp_path / "found").exists()


@pytest.mark.parametrize("given", [["geneval"], ["--prompts", "file.jsonl"], ["other"]])
def test_benchmark_and_prompts_are_needed(given, capsys):
    with pytest.raises(SystemExit):
        main(["benchmark", *given])
    assert "usage: unigrpo benchmark" in capsys.readouterr().err

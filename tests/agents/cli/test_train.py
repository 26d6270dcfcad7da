"""`unigrpo train`, with the model that comes with the library."""

import json

import pytest

from agents.cli import main

pytestmark = pytest.mark.usefixtures("no_curves")

SMALL = [
    "trainer.groups=2",
    "trainer.group_size=2",
    "env.image_steps=6",
    "env.text_budget=12",
    "evaluation.prompts=2",
    "output.tensorboard=false",
]
MODULE = """
from rewards import register_reward

@register_reward("my_reward_{name}")
def my_reward(episodes):
    return [float(len(text)) for text in episodes.texts]
"""


@pytest.mark.slow
def test_train_evaluate_resume(tmp_path, capsys):
    folder = tmp_path / "run"
    assert main(["train", "trainer.iterations=2", f"output.folder={folder}", *SMALL]) == 0
    assert main(["train", "--resume", str(folder), "trainer.iterations=3"]) == 0
    assert json.loads((folder / "summary.json").read_text())["iterations"] == 3
    figures = tmp_path / "figures.json"
    model = f"model.name={folder}/checkpoints/000003/model"
    assert main(["evaluate", "evaluation.prompts=2", model, "--out", str(figures)]) == 0
    assert set(json.loads(figures.read_text())) == {"sampled", "greedy"}


@pytest.mark.slow
def test_settings_of_a_run_start_another(tmp_path):
    first = tmp_path / "first"
    assert main(["train", "trainer.iterations=1", f"output.folder={first}", *SMALL]) == 0
    second = tmp_path / "second"
    words = ["--config-dir", str(first), "--config-name", "settings", f"output.folder={second}"]
    assert main(["train", *words]) == 0
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (first, second)]
    assert summaries[0]["accuracy_after"] == summaries[1]["accuracy_after"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["module", "path"])
def test_reward_of_the_user(tmp_path, monkeypatch, capsys, name):
    (tmp_path / f"my_rewards_{name}.py").write_text(MODULE.format(name=name))
    monkeypatch.chdir(tmp_path)
    imported = f"my_rewards_{name}" if name == "module" else f"./my_rewards_{name}.py"
    words = ["--import", imported, f"env.reward=my_reward_{name}", "trainer.iterations=1", *SMALL]
    assert main(["train", *words]) == 0
    assert "outputs/run/report.html" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["env.reward=shape"], "did you mean 'shapes'"),
        (["model.name=tinny"], "did you mean 'tiny'"),
        (["env.prompts=/nowhere.txt"], "expected a prompt file"),
        (["--resume", "/nowhere"], "expected a run with checkpoints"),
        (["--import", "no_such_module"], "no_such_module"),
        (["model.device=cuda:99"], "cuda"),
    ],
)
def test_errors_are_one_line(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["algorithm=fpo"], "expected single settings"),
        (["--multirun", "trainer.seed=1,2"], "beside --resume, got --multirun"),
        (["--config-name", "mine"], "beside --resume, got --config-name"),
        (["trainer.iteration=3"], "did you mean 'trainer.iterations'"),
    ],
)
def test_a_resumed_run_keeps_its_settings(words, message, capsys):
    assert main(["train", "--resume", "somewhere", *words]) == 2
    assert message in capsys.readouterr().err

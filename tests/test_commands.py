"""The commands and the examples, as a user runs them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from agents.cli import main
from rewards.shapes import draw
from unigrpo_env.rendering import enlarge

ROOT = Path(__file__).parents[1]


def example(name, *arguments):
    done = subprocess.run(
        [sys.executable, f"examples/{name}.py", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_random_rollout():
    out = example("random_rollout")
    assert "prompt:" in out
    assert "reward:" in out


def test_custom_reward():
    assert "mostly_light" in example("custom_reward")


def test_loop_without_the_trainer():
    out = example("unigrpo_loop", "--iterations", "5", "--held-out", "16")
    assert "iteration   5" in out
    assert "after" in out


def python_of(page):
    """Every Python block of a page."""
    blocks = (ROOT / page).read_text().split("```python\n")[1:]
    assert blocks
    return "\n".join(block.split("```")[0] for block in blocks)


def test_the_first_page_runs():
    done = subprocess.run(
        [sys.executable, "-c", python_of("README.md")], cwd=ROOT, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_scenario_of_ones_own(tmp_path):
    """The tutorial, as its text says: a file, which pytest, gymnasium and the command line know."""
    code = python_of("docs/variants.md")
    assert len(code.splitlines()) <= 40
    (tmp_path / "repaint.py").write_text(code)
    make = "import repaint, gymnasium, unigrpo_env; gymnasium.make('unigrpo/TextToImage-v0', variant='repaint').reset(seed=0)"
    evaluate = ["agents.cli", "evaluate", "--import", "repaint", "env.variant=repaint", "evaluation.prompts=4", "trainer.threads=1"]
    for arguments in (["-m", "pytest", "-q", "repaint.py"], ["-c", make], ["-m", *evaluate]):
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert arguments[1] != "pytest" or "passed" in done.stdout


def test_sample(tmp_path, capsys):
    out = tmp_path / "picture.png"
    assert main(["sample", "two red circles", "--temperature", "0", "--out", str(out)]) == 0
    assert "red circle" in capsys.readouterr().out
    assert out.read_bytes().startswith(b"\x89PNG")


def test_sample_of_several_pictures(tmp_path, capsys):
    source, edited = tmp_path / "source.png", tmp_path / "edited.png"
    enlarge(draw(torch.tensor([[1, 0, 0, 0, 0, 0, 0, 0, 2]]))[0], 24).save(source)
    assert main(["sample", "remove the circle", "--variant", "edit", "--source", str(source), "--out", str(edited)]) == 0
    assert Image.open(edited).width > 300, "the source and the picture side by side"
    told = ["sample", "a red circle and a blue square", "--variant", "dialogue", "--turn", "make the circle green", "--out", str(edited)]
    assert main(told) == 0
    assert "make the circle green" in capsys.readouterr().out
    assert main(["sample", "remove the circle", "--variant", "edit"]) == 2
    assert "expected 1 source pictures" in capsys.readouterr().err


def test_train_evaluate_resume(tmp_path, capsys):
    folder = tmp_path / "run"
    small = ["trainer.groups=2", "trainer.group_size=2", "evaluation.prompts=8", "output.tensorboard=false"]
    assert main(["train", "trainer.iterations=2", f"output.folder={folder}", *small]) == 0
    assert main(["train", "--resume", str(folder), "trainer.iterations=3"]) == 0
    assert json.loads((folder / "summary.json").read_text())["iterations"] == 3
    assert (
        main(["evaluate", "evaluation.prompts=8", f"model.name={folder}/checkpoints/000003/model", "--out", str(tmp_path / "e.json")]) == 0
    )
    assert set(json.loads((tmp_path / "e.json").read_text())) == {"sampled", "greedy"}


def test_a_reward_from_a_module_of_the_user(tmp_path, monkeypatch, capsys):
    (tmp_path / "my_rewards_module.py").write_text(
        "from rewards import register_reward\n@register_reward('my_reward')\ndef my_reward(episodes):\n    return [float(len(t)) for t in episodes.texts]\n"
    )
    monkeypatch.chdir(tmp_path)
    arguments = ["trainer.iterations=1", "trainer.groups=2", "trainer.group_size=2", "evaluation.prompts=4", "output.tensorboard=false"]
    assert main(["train", "--import", "my_rewards_module", "env.reward=my_reward", *arguments]) == 0
    assert "outputs/run/report.html" in capsys.readouterr().out


def test_pretrain(tmp_path, capsys):
    assert main(["pretrain", "--steps", "2", "--batch-size", "4", "--prompts", "8", "--out", str(tmp_path / "new")]) == 0
    told = capsys.readouterr().out
    for name in ("words", "reading", "rounds", "practice", "edit", "story"):
        assert name in told
    assert (tmp_path / "new" / "model.safetensors").is_file()


def test_a_count_of_nothing_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["sample", "a red circle", "--count", "0"])
    assert "--count: expected a whole number of at least 1, got 0" in capsys.readouterr().err


def test_list_and_help(capsys):
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    for name in ("unigrpo", "flow_grpo", "text_to_image", "shapes", "tiny"):
        assert name in out
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    assert "trainer.iterations" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "trainer.iteration=1"], "did you mean 'trainer.iterations'"),
        (["train", "--config", "unigro"], "did you mean 'unigrpo'"),
        (["train", "trainer.seed=1", "--config", "unigrpo", "trainer.iteration=1"], "did you mean 'trainer.iterations'"),
        (["train", "env.reward=shape"], "did you mean 'shapes'"),
        (["train", "model.name=tinny"], "did you mean 'tiny'"),
        (["train", "--resume", "/nowhere"], "expected a run with checkpoints"),
        (["train", "env.prompts=/nowhere.txt"], "expected a prompt file"),
        (["train", "--import", "no_such_module"], "no_such_module"),
        (["sample", "a circle and " * 9], "prompt_budget"),
    ],
)
def test_errors_are_one_clear_line(arguments, message, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error

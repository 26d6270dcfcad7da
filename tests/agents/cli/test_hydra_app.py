"""`unigrpo train` as a hydra application, with a job that only records its settings."""

import os
import sys
from pathlib import Path

import pytest
import yaml

import agents.cli.train
from agents.cli import main
from agents.config import save_settings

pytestmark = pytest.mark.slow


@pytest.fixture
def jobs(monkeypatch, tmp_path):
    """The settings of every training run that is started in this test."""
    found = []

    def train(config):
        found.append(config)
        if config.trainer.seed == 13:
            raise ValueError("a bad [seed]")
        save_settings(config, Path(config.output.folder) / "settings.yaml")
        return 0.5

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(agents.cli.train, "_train", train)
    return found


def test_one_run(jobs, capfd):
    arguments = ["algorithm=fpo", "trainer.seed=3", "--import", "os", "output.folder=out/run"]
    assert main(["train", *arguments, "env.text_budget=0"]) == 0
    (config,) = jobs
    assert config.algorithm.image_objective == "fpo"
    assert config.env.text_budget == 0
    assert config.output.folder == "out/run"
    assert config.output.imports == ["os"]
    assert os.listdir("out/run") == ["settings.yaml"], "hydra writes nothing of its own"
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def test_sweep_has_one_folder_a_run(jobs, capsys):
    words = ["-m", "trainer.seed=0,1", "algorithm=unigrpo,fpo", "output.folder=out"]
    assert main(["train", *words]) == 0
    folders = [Path(config.output.folder) for config in jobs]
    assert len(set(folders)) == 4
    assert Path("out/algorithm=fpo,trainer.seed=1") in folders
    for folder, config in zip(folders, jobs, strict=True):
        assert f"trainer.seed={config.trainer.seed}" in folder.name
        assert (folder / "settings.yaml").is_file()
    assert "algorithm=unigrpo,trainer.seed=0" in capsys.readouterr().out


def test_saved_settings_start_another_run(jobs):
    first = ["algorithm=refl", "env=edit", "trainer.seed=4", "env.reward=edit + 0.1 * brevity"]
    first += ["env.reward_options.judge.limits={tries: 2}"]
    assert main(["train", *first, "output.folder=first"]) == 0
    again = ["--config-dir", "first", "--config-name", "settings", "output.folder=second"]
    again += ["env.reward_options.judge.url=x"]
    assert main(["train", *again]) == 0
    assert jobs[1].output.folder == "second"
    jobs[1].output.folder = "first"
    assert jobs[1].env.reward_options == {"judge": {"limits": {"tries": 2}, "url": "x"}}
    del jobs[1].env.reward_options["judge"]["url"]
    assert jobs[0] == jobs[1]


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_own_files(jobs, tmp_path):
    write(tmp_path / "my/algorithm/mine.yaml", "# @package _global_\ntrainer: {seed: 8}\n")
    write(tmp_path / "my/extra/short.yaml", "# @package _global_\ntrainer: {iterations: 2}\n")
    write(tmp_path / "my/whole.yaml", "defaults: [config, _self_]\nenv: {variant: story}\n")
    directory = ["--config-dir", "my", "output.folder=out"]
    assert main(["train", *directory, "algorithm=mine"]) == 0
    assert jobs[-1].trainer.seed == 8
    named = [*directory, "--config-name", "whole", "+extra=short", "algorithm=fpo"]
    assert main(["train", *named]) == 0
    assert jobs[-1].env.variant == "story"
    assert jobs[-1].trainer.iterations == 2
    assert jobs[-1].algorithm.image_objective == "fpo"
    assert jobs[-1].output.folder == "out"


def test_settings_of_hydra(jobs):
    assert main(["train", "hydra.run.dir=elsewhere"]) == 0
    assert jobs[-1].output.folder == "elsewhere"
    words = ["-m", "trainer.seed=1,2", "hydra.sweep.dir=a", "hydra.sweep.subdir=${hydra.job.num}"]
    assert main(["train", *words]) == 0
    assert [config.output.folder for config in jobs[1:]] == ["a/0", "a/1"]


def test_settings_on_both_sides_of_an_option(jobs, capsys):
    assert main(["train", "trainer.seed=1", "--cfg", "job", "env=edit"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["trainer"]["seed"] == 1
    assert shown["env"]["variant"] == "edit"
    assert jobs == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trainer.iteration=1"], "did you mean 'trainer.iterations'"),
        (["--multirun", "trainer.iteration=1,2"], "did you mean 'trainer.iterations'"),
        (["algorithm=unigro"], "did you mean 'unigrpo'"),
        (["--multirun", "algorithm=fpo,unigro"], "did you mean 'unigrpo'"),
        (["--config-name", "nowhere"], "Cannot find primary config 'nowhere'"),
        (["--config-dir", "nowhere"], "nowhere' not found"),
        (["trainer.group_size=1"], "judged against the others"),
        (["trainer.seed=1,2"], "add --multirun"),
    ],
)
def test_errors_before_a_run(jobs, words, message, capsys):
    argv = list(sys.argv)
    assert main(["train", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert jobs == []
    if "--multirun" not in words:
        assert not Path("outputs/run").exists(), "no empty folder is left"
    assert sys.argv == argv
    assert "HYDRA_FULL_ERROR" not in os.environ


def test_error_of_a_run(jobs, capsys):
    assert main(["train", "trainer.seed=13", "output.folder=out"]) == 2
    assert capsys.readouterr().err == "error: a bad [seed]\n"
    assert not Path("out").exists()


def test_error_of_one_run_in_a_sweep(jobs, capsys):
    assert main(["train", "-m", "trainer.seed=13,1", "output.folder=out"]) == 2
    error = capsys.readouterr().err
    assert "'trainer.seed=13'" in error, "it says which run failed"
    assert "error: a bad [seed]" in error
    assert len(jobs) == 2, "the other runs go on"


def test_unknown_option(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--confg", "x"])
    assert "unigrpo train: error" in capsys.readouterr().err


def test_help_lists_everything(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    out = capsys.readouterr().out
    for text in ("trainer.iterations", "[120]", "flow_grpo", "dialogue", "--multirun", "--resume"):
        assert text in out

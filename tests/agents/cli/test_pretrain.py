"""`unigrpo pretrain`."""

import pytest

from agents.cli import main


@pytest.mark.slow
def test_pretrain(tmp_path, capsys):
    from agents.training.pretraining import SHIPPED

    folder = tmp_path / "new"
    words = ["--steps", "2", "--batch-size", "4", "--prompts", "2", "--out", str(folder)]
    assert main(["pretrain", *words]) == 0
    out = capsys.readouterr().out
    for name in (*SHIPPED, "edit", "story"):
        assert name in out
    assert (folder / "model.safetensors").is_file()


@pytest.mark.slow
def test_one_stage_from_a_model(tmp_path, capsys):
    from agents.training.pretraining import STAGES

    name = next(iter(STAGES))
    words = ["--stages", name, "--model", "tiny", "--steps", "1", "--batch-size", "2"]
    assert main(["pretrain", *words, "--prompts", "2", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "model.safetensors").is_file()

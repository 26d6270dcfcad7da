"""The tables: a breath of some rows, kept, resumed, and written up."""

import json

import pytest
from rich.console import Console

from agents.cli import main
from agents.config import config_names
from agents.supervised import COURSES
from agents.tables import QUICK, ROWS, UNSEEN_LESSON, Job, jobs, play, results, run_tables
from agents.tables_page import _diverged, _rounds, write_page


def test_rows_are_configs():
    assert {row.config for row in ROWS} <= {"", *config_names()}
    assert len({row.key for row in ROWS}) == len(ROWS)
    main_rows = [row for row in ROWS if row.seeds == 3 and row.study == "table"]
    assert [row.key for row in main_rows] == ["sft", "text_grpo", "flow_grpo", "unigrpo"] == [row.key for row in ROWS[:4]]
    trained = [job.config.trainer for job in jobs("x", QUICK) if job.row.config and job.row.start is None and job.row.study != "rounds"]
    budgets = {(trainer.iterations, trainer.groups, trainer.group_size) for trainer in trained}
    assert len(budgets) == 1, "equal iterations and episodes"


def test_a_row_that_is_not_there(tmp_path, capsys):
    assert main(["tables", "--rows", "unigrpo", "nonsense", "--out", str(tmp_path)]) == 2
    assert "unknown rows ['nonsense']" in capsys.readouterr().err


def test_runs_are_kept_and_the_page_shows_them(tmp_path):
    rows, console = ["sft", "unigrpo", "proxy_none", "process_reward", "reflect", "refl_text_grpo", "sft_no_thinking"], Console(quiet=True)
    run_tables(tmp_path / "runs", QUICK, console, rows, workers=2)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*/measures.json")}
    assert sorted(path.parent.name for path in files) == [
        "base_no_thinking-0",
        "process_reward-0",
        "proxy_none-0",
        "refl-0",
        "refl_text_grpo-0",
        "reflect-0",
        "sft-0",
        "sft_no_thinking-0",
        "unigrpo-0",
    ], "what a row starts from is run too"
    run_tables(tmp_path / "runs", QUICK, console, rows, workers=1)
    assert files == {path: path.stat().st_mtime_ns for path in files}, "nothing is run twice"
    page = write_page(tmp_path, results(jobs(tmp_path / "runs", QUICK)), QUICK).read_text()
    assert "| SFT, thinking | 1 |" in page
    assert "0.7769" in page, "the paper's figure stands beside it"
    assert "no penalty" in page
    assert "| UniGRPO with a process reward | 1 |" in page
    assert "| Reflect | kept |" in page
    for name in ("curves", "strips", "hacking"):
        assert (tmp_path / f"tables_{name}.png").stat().st_size > 1000


def test_the_page_says_which_run_diverged(tmp_path):
    measures = {"accuracy": 0.25, "greedy": 0.5, "parts": {"story": 0.25, "story/score": 0.75}}
    before = {"accuracy": 0.125, "greedy_accuracy": 0.25, "components": {"story": 0.125, "story/score": 0.5}}
    lost = {"measures": measures, "diverged": {"iteration": 7, "error": "nan"}, "curve": [], "folder": str(tmp_path / "story-0")}
    kept = {"measures": {**measures, "before": before}, "diverged": None, "curve": [], "folder": str(tmp_path / "story-1")}
    text = "\n\n".join(
        [*_diverged({"story": [lost, kept]}), *_rounds({"story": [lost, kept]}, [row for row in ROWS if row.key == "story"])]
    )
    assert "Story, seed 0, diverged after 7 iterations" in text
    assert "| Story | 0 |  |  | 0 iterations |" in text
    assert "| Story | 1 | 0.125 → 0.250 | 0.250 → 0.500 |" in text
    assert "| Story | score |  | 0.500 → 0.750 |" in text


def test_lessons_without_thoughts_are_new_ones():
    taught = [range(course.first_lesson, course.first_lesson + course.settings.steps) for course in COURSES.values()]
    assert max(numbers.stop for numbers in taught) <= UNSEEN_LESSON


def test_a_killed_run_goes_on_from_its_checkpoint(tmp_path):
    whole, stopped = (Job(next(row for row in ROWS if row.key == "sft"), 0, str(tmp_path / name), QUICK) for name in ("whole", "stopped"))
    play(whole)
    play(stopped)
    (stopped.place / "measures.json").unlink()
    (stopped.place / "checkpoints" / "000002").rename(tmp_path / "gone")
    assert not stopped.done
    play(stopped)
    first, second = (json.loads((job.place / "measures.json").read_text())["measures"] for job in (whole, stopped))
    assert first == second


def test_another_recipe_is_another_run(tmp_path):
    job = Job(next(row for row in ROWS if not row.config and not row.lessons), 0, str(tmp_path), QUICK)
    play(job)
    assert job.done
    recipe = json.loads((job.place / "measures.json").read_text())
    recipe["recipe"]["settings"]["trainer"]["seed"] = 5
    (job.place / "measures.json").write_text(json.dumps(recipe))
    assert not job.done


def test_no_runs_no_page(tmp_path, capsys):
    assert main(["tables", "--page-only", "--out", str(tmp_path)]) == 2
    assert pytest.approx(0) == len(list(tmp_path.glob("*.md")))
    assert "found none" in capsys.readouterr().err

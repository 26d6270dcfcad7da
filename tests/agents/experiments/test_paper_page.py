"""The text of the page."""

import csv

import pytest
import torch
from safetensors.torch import save_file

from agents.experiments.formatting import markdown_table
from agents.experiments.paper_page import diverged_part, rounds_part, write_page
from agents.experiments.paper_tables import EXPERIMENTS, QUICK
from agents.reporting.metrics import METRICS
from unigrpo_env.tasks.shapes.prompts import PROMPT_KINDS


def experiment(key):
    return next(entry for entry in EXPERIMENTS if entry.key == key)


def run_of(folder, accuracy, curve=()):
    """A finished run of one image, with the files that the page reads."""
    folder.mkdir()
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["iteration", *METRICS])
        writer.writeheader()
        for iteration in range(1, 13):
            writer.writerow({"iteration": iteration, **dict.fromkeys(METRICS, iteration / 12)})
    tensors = {"images": torch.zeros(2, 3, 24, 24), "reward": torch.tensor([0.0, 1.0])}
    save_file(tensors, folder / "strip.safetensors")
    names = (
        "greedy",
        "graded",
        "thought",
        "correct_despite_plan",
        "crispness",
        "foreign",
        "guided",
    )
    measures = dict.fromkeys(names, 0.5) | {"accuracy": accuracy}
    measures["by_kind"] = dict.fromkeys(PROMPT_KINDS, accuracy)
    return {
        "measures": measures,
        "curve": [list(point) for point in curve],
        "diverged": None,
        "prompts": ["a red circle", "two blue squares"],
        "folder": str(folder),
    }


def rounds_run(folder, before=None):
    measures = {"accuracy": 0.25, "greedy": 0.5, "parts": {"story": 0.25, "story/score": 0.75}}
    if before is not None:
        measures["before"] = before
    return {"measures": measures, "diverged": None, "curve": [], "folder": str(folder)}


def test_diverged_runs_are_named(tmp_path):
    lost = rounds_run(tmp_path / "story-0")
    lost["diverged"] = {"iteration": 7, "error": "nan"}
    kept = rounds_run(tmp_path / "story-1")
    (text,) = diverged_part({"story": [lost, kept]})
    assert text.startswith("Story, seed 0, diverged after 7 iterations")


def test_rounds_have_values_before_and_after(tmp_path):
    before = {"accuracy": 0.125, "greedy_accuracy": 0.25}
    before["components"] = {"story": 0.125, "story/score": 0.5}
    lost = rounds_run(tmp_path / "story-0")
    kept = rounds_run(tmp_path / "story-1", before)
    text = "\n\n".join(rounds_part({"story": [lost, kept]}, [experiment("story")]))
    assert "| Story | 0 |  |  | 0 iterations |" in text
    assert "| Story | 1 | 0.125 → 0.250 | 0.250 → 0.500 |" in text
    assert "| Story | score |  | 0.500 → 0.750 |" in text


def test_table_is_markdown():
    text = markdown_table(["a", "b"], [["1", "2"]])
    assert text == "| a | b |\n| --- | --- |\n| 1 | 2 |"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page of a few runs, whose numbers are known."""
    tmp_path = tmp_path_factory.mktemp("runs")
    curve = [(0, 0.25), (12, 0.5)]
    found = {}
    for key, accuracies in {
        "sft": (0.25, 0.375),
        "unigrpo": (0.5, 0.75),
        "proxy_none": (0.125,),
        "process_reward": (0.625,),
        "flow_cps": (0.5,),
    }.items():
        runs = [run_of(tmp_path / f"{key}-{seed}", a, curve) for seed, a in enumerate(accuracies)]
        found[key] = runs
    folder = tmp_path / "page"
    return write_page(folder, found, QUICK).read_text(), folder


def test_page_has_mean_and_half_range(page):
    text, _ = page
    assert "| **UniGRPO**, thinking | 2 | 0.625 ± 0.125 |" in text
    assert "| 0.8381 | 0.90 |" in text, "the paper's figures stand beside it"


def test_page_compares_ranges(page):
    text, _ = page
    line = "* UniGRPO [0.500, 0.750] lies wholly above SFT, thinking [0.250, 0.375]."
    assert line in text


def test_page_has_the_proxy_study(page):
    text, _ = page
    # Rewards 1/12 to 10/12 come first, 3/12 to 12/12 last.
    assert "| no penalty | 0.458 → 0.625 | 0.500 | 0.125 | 0.500 |" in text


def test_page_has_the_thought_reward_study(page):
    text, _ = page
    assert "accuracy at 0 | accuracy at 12 | greedy | thought | correct_despite_plan |" in text
    row = "| UniGRPO with a process reward | 1 | 0.250 | 0.500 | 0.500 | 0.500 | 0.500 |"
    assert row in text


def test_page_has_the_changes(page):
    text, _ = page
    assert "| none | 2 | 0.625 ± 0.125 |" in text
    assert "| Flow-CPS | 1 | 0.500 |" in text
    assert "## Text and batches" not in text, "nothing was run of it"


def test_page_has_its_figures(page):
    _, folder = page
    for name in ("curves", "strips", "hacking", "process"):
        assert (folder / f"tables_{name}.png").stat().st_size > 1000

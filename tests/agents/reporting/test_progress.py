"""The live view of a run."""

import io

from rich.console import Console

from agents.reporting.metrics import METRICS
from agents.reporting.progress import SHOWN, Display, sparkline


def metrics(reward):
    return dict.fromkeys(METRICS, 0.5) | {"reward": reward}


def test_shown_metrics_are_there():
    assert set(SHOWN) <= set(METRICS)


def test_sparkline_of_equal_values_is_flat():
    assert sparkline([0.3, 0.3]) == "▁▁"
    assert len(sparkline([0.0, 1.0] * 50)) == 40


def test_a_line_every_ten_iterations_and_at_the_end():
    file = io.StringIO()
    with Display(12, console=Console(file=file, width=200)) as display:
        for iteration in range(1, 13):
            display.update(iteration, metrics(0.25))
    lines = file.getvalue().splitlines()
    assert [line.split("/")[0].strip() for line in lines] == ["10", "12"]
    assert "reward 0.250" in lines[0]


def test_line_shows_the_mean_of_ten_iterations():
    file = io.StringIO()
    display = Display(20, console=Console(file=file, width=200))
    for iteration in range(1, 21):
        display.update(iteration, metrics(0.0 if iteration <= 10 else 1.0))
    assert "reward 0.000" in file.getvalue().splitlines()[0]
    assert "reward 1.000" in file.getvalue().splitlines()[1]


def test_terminal_shows_a_table_in_place():
    file = io.StringIO()
    console = Console(file=file, width=120, force_terminal=True)
    with Display(2, console=console) as display:
        display.show_accuracy(accuracy_before=0.25)
        display.update(1, metrics(0.25))
        display.update(2, metrics(0.75))
    shown = file.getvalue()
    assert "accuracy before" in shown
    assert "held-out" in shown
    assert "frac groups with signal" in shown

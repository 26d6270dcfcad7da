"""The live view of a run in the terminal."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

BARS = " ▁▂▃▄▅▆▇█"
SHOWN = {
    "reward": "{:.3f}",
    "frac_groups_with_signal": "{:.2f}",
    "entropy": "{:.3f}",
    "thought_length": "{:.1f}",
    "text_clip_fraction": "{:.3f}",
    "image_clip_fraction": "{:.3f}",
    "episodes_per_second": "{:.0f}",
}
"""The metrics that the view shows, with their formats."""

MEAN_OVER = 10
"""The number of iterations over which the view averages a metric."""


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """Draw the last `width` values as bars of text.

    >>> sparkline([0.0, 0.5, 1.0])
    '▁▅█'
    """
    shown = values[-width:]
    low = min(shown)
    # Equal values have no range; all of them get the lowest bar.
    span = (max(shown) - low) or 1.0
    # BARS[0] is a blank, so the bars of a value are 1 to 8.
    heights = [round((value - low) / span * (len(BARS) - 2)) for value in shown]
    return "".join(BARS[1 + height] for height in heights)


class Display:
    """Shows the progress, the time left and the most important metrics.

    On a terminal the view stays in place; elsewhere a line is printed every ten iterations.

    Args:
        total: the number of iterations of the run.
        done: the number of iterations that are done already.
        console: where to draw; standard output if it is left out.
    """

    def __init__(self, total: int, done: int = 0, console: Console | None = None) -> None:
        self.console = console or Console()
        self.total = total
        self.progress = Progress(
            TextColumn("[bold]UniGRPO"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self.bar = self.progress.add_task("train", total=total, completed=done)
        self.history: list[float] = []
        self.recent: deque[dict[str, float]] = deque(maxlen=MEAN_OVER)
        self.held_out: dict[str, float] = {}
        self._live: Live | None = None
        # In a file or a pipe a live view would write its escape codes.
        if self.console.is_terminal:
            self._live = Live(self.progress, console=self.console, refresh_per_second=4)

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live:
            self._live.stop()

    def show_accuracy(self, **accuracy: float) -> None:
        """Show held-out accuracies beside the metrics, each under the name of its argument."""
        self.held_out |= accuracy

    def update(self, iteration: int, metrics: dict[str, float]) -> None:
        """Show the metrics of an iteration that has just ended."""
        self.recent.append(metrics)
        # A running mean, because the reward of one iteration is noisy.
        self.history.append(self._mean("reward"))
        self.progress.update(self.bar, completed=iteration)
        if self._live:
            self._live.update(Group(self._table(), self.progress))
        elif iteration % MEAN_OVER == 0 or iteration == self.total:
            self._print_line(iteration)

    def _print_line(self, iteration: int) -> None:
        parts = [f"{name} {shape.format(self._mean(name))}" for name, shape in SHOWN.items()]
        line = f"{iteration:>5}/{self.total}  " + "  ".join(parts)
        self.console.print(line, soft_wrap=True, highlight=False)

    def _mean(self, name: str) -> float:
        return sum(metrics[name] for metrics in self.recent) / len(self.recent)

    def _table(self) -> Table:
        table = Table.grid(padding=(0, 2))
        for name, shape in SHOWN.items():
            # Only the reward has a curve.
            curve = Text("")
            if name == "reward":
                curve = Text(sparkline(self.history), style="green")
            value = Text(shape.format(self._mean(name)), style="bold")
            table.add_row(_label(name), value, curve)
        for name, accuracy in self.held_out.items():
            table.add_row(
                _label(name), Text(f"{accuracy:.3f}", style="bold cyan"), Text("held-out")
            )
        return table


def _label(name: str) -> Text:
    return Text(name.replace("_", " "), style="dim")

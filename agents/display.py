"""The live view of a run."""

from __future__ import annotations

from collections import deque
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

BARS = " ▁▂▃▄▅▆▇█"
SHOWN = {
    "reward": "{:.3f}",
    "signal": "{:.2f}",
    "entropy": "{:.3f}",
    "thought_length": "{:.1f}",
    "text_clip_fraction": "{:.3f}",
    "image_clip_fraction": "{:.3f}",
    "episodes_per_second": "{:.0f}",
}


def sparkline(values: list[float], width: int = 40) -> str:
    """Values as little bars, the last `width` of them, each the mean of its neighbours."""
    values = values[-width:]
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    return "".join(BARS[1 + round((value - low) / span * (len(BARS) - 2))] for value in values)


class Display:
    """Progress, time left and the metrics that matter; on a terminal it stays in place, elsewhere it prints a line now and then.

    Args:
        total: iterations.
        done: iterations already behind.
        console: where to draw; standard output if left out.
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
        self.recent: deque[dict[str, float]] = deque(maxlen=10)
        self.accuracy: dict[str, float] = {}
        self._live = Live(self.progress, console=self.console, refresh_per_second=4, transient=False) if self.console.is_terminal else None

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live:
            self._live.stop()

    def show_accuracy(self, **accuracy: float) -> None:
        """Held-out accuracy, by the name of the measure."""
        self.accuracy |= accuracy

    def update(self, iteration: int, metrics: dict[str, float]) -> None:
        """After an iteration."""
        self.recent.append(metrics)
        self.history.append(sum(m["reward"] for m in self.recent) / len(self.recent))
        self.progress.update(self.bar, completed=iteration)
        if self._live:
            self._live.update(Group(self._table(), self.progress))
        elif iteration % 10 == 0 or iteration == self.total:
            shown = "  ".join(f"{name} {form.format(self._mean(name))}" for name, form in SHOWN.items())
            self.console.print(f"{iteration:>5}/{self.total}  {shown}", soft_wrap=True, highlight=False)

    def _mean(self, name: str) -> float:
        return sum(m[name] for m in self.recent) / len(self.recent)

    def _table(self) -> Table:
        table = Table.grid(padding=(0, 2))
        for name, form in SHOWN.items():
            curve = Text(sparkline(self.history), style="green") if name == "reward" else Text("")
            table.add_row(Text(name.replace("_", " "), style="dim"), Text(form.format(self._mean(name)), style="bold"), curve)
        for name, value in self.accuracy.items():
            table.add_row(Text(name.replace("_", " "), style="dim"), Text(f"{value:.3f}", style="bold cyan"), Text("held-out"))
        return table

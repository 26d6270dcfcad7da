"""Writes the numbers and images of a run to a CSV file, TensorBoard and Weights & Biases."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from agents.reporting.metrics import METRICS

CSV = "metrics.csv"
EVENTS = "tensorboard"


class Logger(Protocol):
    """A place that takes numbers and images by iteration."""

    def scalars(self, iteration: int, values: Mapping[str, float]) -> None:
        """Write some numbers."""

    def image(self, iteration: int, name: str, image: Image.Image) -> None:
        """Write an image."""

    def close(self) -> None:
        """Finish writing."""


class TensorBoardLogger:
    """Writes TensorBoard events.

    Args:
        folder: the folder of the events.
        first_iteration: the iteration that a resumed run starts from. TensorBoard hides the
            events of later iterations that the folder holds already. 0 for a new run.
    """

    def __init__(self, folder: Path, first_iteration: int = 0) -> None:
        # Imported here, because it takes seconds and is needed only where it is switched on.
        from torch.utils.tensorboard import SummaryWriter

        # TensorBoard hides events from `purge_step` on.
        purge_step = None
        if first_iteration:
            purge_step = first_iteration + 1
        self._writer = SummaryWriter(str(folder), purge_step=purge_step)

    def scalars(self, iteration: int, values: Mapping[str, float]) -> None:
        """Write one scalar for each name."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, iteration)

    def image(self, iteration: int, name: str, image: Image.Image) -> None:
        """Write an image under `name`."""
        # [height, width, 3] uint8
        self._writer.add_image(name, np.asarray(image), iteration, dataformats="HWC")

    def close(self) -> None:
        """Close the file of events."""
        self._writer.close()


class WandbLogger:
    """Writes to a project of Weights & Biases.

    Args:
        folder: where wandb keeps its own files.
        project: the name of the project.
        settings: the settings of the run, shown beside it.

    Raises:
        ValueError: if wandb is not installed.
    """

    def __init__(self, folder: Path, project: str, settings: dict[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ValueError(
                f"expected wandb to be installed for output.wandb={project!r}; "
                "pip install wandb, or leave the setting empty"
            ) from error
        self._wandb = wandb
        self._run = wandb.init(project=project, dir=str(folder), config=settings)

    def scalars(self, iteration: int, values: Mapping[str, float]) -> None:
        """Write the numbers at the step `iteration`."""
        self._run.log(dict(values), step=iteration)

    def image(self, iteration: int, name: str, image: Image.Image) -> None:
        """Write an image under `name` at the step `iteration`."""
        self._run.log({name: self._wandb.Image(image)}, step=iteration)

    def close(self) -> None:
        """Mark the run as finished."""
        self._run.finish()


class RunLog:
    """Writes each iteration's metrics to `metrics.csv` and to the loggers that are switched on.

    Args:
        folder: the folder of the run.
        tensorboard: whether to write events to `folder/tensorboard`.
        wandb: the name of a project of Weights & Biases, or None.
        settings: the settings of the run, shown by Weights & Biases.
        first_iteration: the iteration that a resumed run starts from, or 0. Later rows of
            `metrics.csv` are dropped: the run had gone on after its last checkpoint.

    Raises:
        ValueError: if wandb is switched on and not installed.
    """

    def __init__(
        self,
        folder: Path,
        *,
        tensorboard: bool,
        wandb: str | None,
        settings: dict[str, Any],
        first_iteration: int = 0,
    ) -> None:
        self.path = folder / CSV
        # The CSV comes last: if wandb is missing, the folder must not look like that of a run.
        self._loggers: list[Logger] = []
        if wandb is not None:
            self._loggers.append(WandbLogger(folder, wandb, settings))
        if tensorboard:
            self._loggers.append(TensorBoardLogger(folder / EVENTS, first_iteration))
        self._start_csv(first_iteration)

    def write(self, iteration: int, metrics: dict[str, float]) -> None:
        """Write the metrics of an iteration everywhere."""
        # Opened for each row, so that every finished iteration is in the file.
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, ["iteration", *METRICS])
            writer.writerow({"iteration": iteration, **metrics})
        self.scalars(iteration, metrics)

    def scalars(self, iteration: int, values: Mapping[str, float]) -> None:
        """Write numbers to TensorBoard and Weights & Biases alone."""
        for logger in self._loggers:
            logger.scalars(iteration, values)

    def image(self, iteration: int, name: str, image: Image.Image) -> None:
        """Write an image to TensorBoard and Weights & Biases."""
        for logger in self._loggers:
            logger.image(iteration, name, image)

    def close(self) -> None:
        """Finish all loggers."""
        for logger in self._loggers:
            logger.close()

    def _start_csv(self, first_iteration: int) -> None:
        """Write the header, and the rows of a resumed run up to its checkpoint."""
        kept = []
        for row in read_metrics(self.path.parent):
            if row["iteration"] <= first_iteration:
                kept.append({**row, "iteration": int(row["iteration"])})
        # Written beside the file and moved, so that a crash leaves the old rows whole.
        part = self.path.with_suffix(".part")
        with part.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["iteration", *METRICS])
            writer.writeheader()
            writer.writerows(kept)
        part.replace(self.path)


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """Read the rows of a run's `metrics.csv`.

    Args:
        folder: the folder of the run.

    Returns:
        One dictionary for each iteration; none if there is no file.
    """
    path = folder / CSV
    if not path.is_file():
        return []
    rows = []
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            # A run that was killed may leave half a line.
            if None not in row.values():
                rows.append({name: float(value) for name, value in row.items()})
    return rows


def metric_values(rows: Sequence[Mapping[str, float]], name: str) -> list[float]:
    """List one metric over iterations.

    Args:
        rows: the rows of `metrics.csv`.
        name: the name of the metric.
    """
    return [row[name] for row in rows]

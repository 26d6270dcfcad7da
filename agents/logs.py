"""Numbers to files: one CSV, TensorBoard, Weights & Biases where installed."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from agents.trainer import METRICS

CSV = "metrics.csv"


class RunLog:
    """Writes each iteration's metrics to `metrics.csv` and to the loggers asked for.

    Args:
        folder: of the run.
        tensorboard: write events to `folder/tensorboard`.
        wandb: project name, or None.
        settings: shown by wandb.
        first_iteration: rows from here on, left by a run that went further than its checkpoint, are dropped.

    Raises:
        ValueError: wandb is asked for and not installed.
    """

    def __init__(self, folder: Path, *, tensorboard: bool, wandb: str | None, settings: dict[str, Any], first_iteration: int = 0) -> None:
        self.path = folder / CSV
        kept = [row for row in read_metrics(folder) if row["iteration"] <= first_iteration] if first_iteration else []
        part = self.path.with_suffix(".part")
        with part.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["iteration", *METRICS])
            writer.writeheader()
            writer.writerows([{**row, "iteration": int(row["iteration"])} for row in kept])
        part.replace(self.path)
        self._events = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=first_iteration + 1 if first_iteration else None)
        self._wandb = None
        if wandb is not None:
            try:
                import wandb as library
            except ImportError as error:
                raise ValueError(
                    f"expected wandb to be installed for output.wandb={wandb!r}; pip install wandb, or leave the setting empty"
                ) from error
            self._wandb = library.init(project=wandb, dir=str(folder), config=settings)

    def write(self, iteration: int, metrics: dict[str, float]) -> None:
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, ["iteration", *METRICS]).writerow({"iteration": iteration, **metrics})
        self.scalars(iteration, metrics)

    def scalars(self, iteration: int, values: dict[str, float]) -> None:
        """To TensorBoard and wandb alone."""
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(name, value, iteration)
        if self._wandb is not None:
            self._wandb.log(values, step=iteration)

    def picture(self, iteration: int, name: str, image: Image.Image) -> None:
        """A picture to TensorBoard."""
        if self._events is not None:
            self._events.add_image(name, np.asarray(image), iteration, dataformats="HWC")

    def close(self) -> None:
        if self._events is not None:
            self._events.close()
        if self._wandb is not None:
            self._wandb.finish()


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The rows of a run's `metrics.csv`; none if there is no file."""
    path = folder / CSV
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        whole = [row for row in csv.DictReader(file) if None not in row.values()]  # a run that was killed may leave half a line
    return [{name: float(value) for name, value in row.items()} for row in whole]

"""What `unigrpo train` does around the trainer: it evaluates, shows, logs, saves and reports."""

from __future__ import annotations

import json
import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

import torch
from rich.console import Console
from torch import Tensor

from agents.config.loading import save_settings
from agents.evaluation.accuracy import Evaluation
from agents.reporting.contact_sheet import before_and_after, contact_sheet
from agents.reporting.description import changed_settings, describe
from agents.reporting.html_report import RunRecord, write_report
from agents.reporting.loggers import CSV, RunLog, metric_values, read_metrics
from agents.reporting.progress import Display
from agents.storage import read_tensors, write_json, write_tensors
from agents.training.checkpoint import checkpoints
from agents.training.trainer import Trainer

SUMMARY = "summary.json"
REPORT = "report.html"
CURVE = "accuracy.json"
SETTINGS = "settings.yaml"
MODEL = "model"
"""The folder of the last weights, written when the training is over."""


def run(trainer: Trainer, console: Console | None = None) -> dict[str, Any]:
    """Train to the end and write figures, images and a report into the run's folder.

    Ctrl-C and SIGTERM let the iteration end, save a checkpoint, print how to resume the run, and
    raise KeyboardInterrupt. A second Ctrl-C stops at once; the checkpoint is the last one then.

    Args:
        trainer: a new trainer, or a resumed one, which goes on with the files of its run.
        console: where to print; standard output if it is left out.

    Returns:
        The figures of `summary.json`.

    Raises:
        ValueError: if the folder holds another run.
        KeyboardInterrupt: if the run was stopped.
    """
    return _Run(trainer, console or Console()).go()


class StopSignals:
    """Turns Ctrl-C and SIGTERM into KeyboardInterrupt when the weights are whole.

    While `is_delaying` is True the first signal is only remembered; `check` raises it later. The
    old handlers are restored at the end of the `with` block. Only the main thread may set
    handlers, so in another thread nothing changes.

    Args:
        console: where to say that a signal has come.
    """

    def __init__(self, console: Console) -> None:
        self.is_delaying = False
        self.is_requested = False
        self._console = console
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            return self
        for number in (signal.SIGINT, signal.SIGTERM):
            # A process in the background ignores Ctrl-C; it should go on doing so.
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._handlers[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._handlers.items():
            # None stands for a handler that was not set from Python.
            signal.signal(number, handler or signal.SIG_DFL)

    def check(self) -> None:
        """Raise the signal that was remembered, if there is one.

        Raises:
            KeyboardInterrupt: if a signal has come.
        """
        if self.is_requested:
            raise KeyboardInterrupt

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # Outside training, or at the second signal, there is nothing to wait for.
        if not self.is_delaying or self.is_requested:
            raise KeyboardInterrupt
        self.is_requested = True
        message = "stopping after this iteration; press Ctrl-C again to stop at once"
        self._console.print(message, highlight=False, soft_wrap=True)


class _Run:
    """One training run and its folder."""

    def __init__(self, trainer: Trainer, console: Console) -> None:
        self.trainer = trainer
        self.console = console
        self.output = trainer.config.output
        self.folder = Path(self.output.folder)
        self.total = trainer.config.trainer.iterations
        self.is_new = trainer.iteration == 0
        self.before: dict[str, Evaluation] = {}
        self.curve: list[tuple[int, float]] = []
        # A resumed trainer comes from a checkpoint of its iteration; iteration 0 is never saved.
        self._saved_iteration = trainer.iteration
        self._is_between_iterations = True

    def go(self) -> dict[str, Any]:
        """Do all of it; see `run`."""
        self._check_folder()
        with StopSignals(self.console) as self.stops:
            try:
                self._open_folder()
                return self._train_and_report()
            except KeyboardInterrupt:
                self._save_stopped_run()
                raise

    def _check_folder(self) -> None:
        if not self.is_new:
            return
        # Two runs in one folder would mix their metrics and checkpoints.
        if checkpoints(self.folder / "checkpoints"):
            raise ValueError(
                f"{self.folder} holds a run already; resume it with --resume {self.folder}, "
                "or give another output.folder"
            )
        if (self.folder / CSV).is_file():
            raise ValueError(
                f"{self.folder} holds the metrics of a run without a checkpoint, which cannot be "
                "resumed, and a new run would be mixed with it; give another output.folder, or "
                f"delete {self.folder}"
            )

    def _open_folder(self) -> None:
        """Write the settings, and evaluate the first weights or read how they did."""
        config = self.trainer.config
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(config.to_dict(), self.folder / "config.json")
        save_settings(config, self.folder / SETTINGS)
        if self.is_new:
            self.before = self._evaluate_first_weights()
        else:
            self.before = self._read_before()
            self.curve = self._read_curve()
        # A run that was resumed before its first evaluation has no file of the curve.
        if not self.curve:
            self.curve = [(0, self.before["sampled"].accuracy)]

    def _train_and_report(self) -> dict[str, Any]:
        self.log = RunLog(
            self.folder,
            tensorboard=self.output.tensorboard,
            wandb=self.output.wandb,
            settings=self.trainer.config.to_dict(),
            first_iteration=self.trainer.iteration,
        )
        try:
            if self.is_new:
                self.log.scalars(0, {"accuracy": self.before["sampled"].accuracy})
            self._train()
            after = self._evaluate()
            self._add_to_curve(self.total, after["sampled"].accuracy)
            sheet = before_and_after(self.before["sampled"], after["sampled"])
            self.log.image(self.total, "before_after", sheet)
        finally:
            self.log.close()
        sheet.save(self.folder / "before_after.png")
        return self._write_account(after)

    def _train(self) -> None:
        with Display(self.total, self.trainer.iteration, self.console) as self.display:
            self.display.show_accuracy(accuracy_before=self.before["sampled"].accuracy)
            # Logging, evaluation and saving after an iteration are not interrupted either, so that
            # a resumed run has all that an uninterrupted run has.
            self.stops.is_delaying = True
            self._is_between_iterations = False
            self.trainer.train(self._after_iteration)
            self._is_between_iterations = True
            self.stops.is_delaying = False
        self._save()
        # The path stays the same, whichever checkpoints are dropped when the run is prolonged.
        with self.trainer.averaged():
            self.trainer.model.save_pretrained(self.folder / MODEL)

    def _after_iteration(self, metrics: dict[str, float]) -> None:
        """Write and show; at their intervals evaluate, draw samples, save; stop if asked to."""
        self._is_between_iterations = True
        iteration = self.trainer.iteration
        self.log.write(iteration, metrics)
        self.display.update(iteration, metrics)
        if self._is_due(self.trainer.config.evaluation.every) and iteration < self.total:
            accuracy = self.trainer.evaluate().accuracy
            self._add_to_curve(iteration, accuracy)
            self.display.show_accuracy(accuracy_now=accuracy)
        if self._is_due(self.output.samples_every):
            self._draw_samples()
        if self._is_due(self.output.checkpoint_every):
            self._save()
        self.stops.check()
        self._is_between_iterations = False

    def _is_due(self, every: int) -> bool:
        return bool(every) and self.trainer.iteration % every == 0

    def _save(self) -> None:
        self.trainer.save()
        self._saved_iteration = self.trainer.iteration

    def _save_stopped_run(self) -> None:
        """Save the last whole iteration, if that was not done, and say how to go on."""
        unsaved = self._saved_iteration != self.trainer.iteration
        # In the middle of an iteration some of its updates may be in the weights already.
        if unsaved and self._is_between_iterations:
            self._save()
        found = checkpoints(self.folder / "checkpoints")
        message = f"stopped; there was no whole iteration to save in {self.folder}"
        if found:
            message = (
                f"stopped; {found[-1]} holds iteration {int(found[-1].name)}; "
                f"go on with: unigrpo train --resume {self.folder}"
            )
        self.console.print(message, highlight=False, markup=False, soft_wrap=True)

    def _evaluate(self) -> dict[str, Evaluation]:
        with self.console.status("evaluating on held-out prompts"):
            sampled = self.trainer.evaluate()
            greedy = self.trainer.evaluate(greedy=True)
        return {"sampled": sampled, "greedy": greedy}

    def _evaluate_first_weights(self) -> dict[str, Evaluation]:
        """Evaluate, and keep the result for the report of a resumed run."""
        found = self._evaluate()
        tensors: dict[str, Tensor] = {}
        texts = {}
        for name, evaluation in found.items():
            tensors[f"{name}.reward"] = evaluation.reward
            # [images of all episodes, 3, height, width]; the JSON file says how many each drew.
            tensors[f"{name}.images"] = torch.cat(evaluation.all_images)
            for part, values in evaluation.components.items():
                tensors[f"{name}.components.{part}"] = values
            drawn = [len(images) for images in evaluation.all_images]
            texts[name] = {"thoughts": evaluation.thoughts, "images_drawn": drawn}
        write_tensors(tensors, self.folder / "before.safetensors")
        write_json(texts, self.folder / "before.json")
        return found

    def _read_before(self) -> dict[str, Evaluation]:
        """Read what `_evaluate_first_weights` wrote."""
        tensors = read_tensors(self.folder / "before.safetensors")
        texts = json.loads((self.folder / "before.json").read_text())
        found = {}
        for name, entry in texts.items():
            start = f"{name}.components."
            components = {}
            for key, values in tensors.items():
                if key.startswith(start):
                    components[key.removeprefix(start)] = values
            found[name] = Evaluation(
                prompts=self.trainer.held_out(),
                thoughts=entry["thoughts"],
                # One [drawn, 3, height, width] for each episode.
                all_images=list(tensors[f"{name}.images"].split(entry["images_drawn"])),
                reward=tensors[f"{name}.reward"],
                components=components,
            )
        return found

    def _read_curve(self) -> list[tuple[int, float]]:
        """Read the held-out accuracy by iteration, up to the checkpoint."""
        path = self.folder / CURVE
        if not path.is_file():
            return []
        curve = []
        # Later points belong to iterations that will be run again.
        for iteration, accuracy in json.loads(path.read_text()):
            if iteration <= self.trainer.iteration:
                curve.append((iteration, accuracy))
        return curve

    def _add_to_curve(self, iteration: int, accuracy: float) -> None:
        # A resumed run may measure an iteration again: the new point replaces the old one.
        others = [point for point in self.curve if point[0] != iteration]
        self.curve = [*others, (iteration, accuracy)]
        write_json(self.curve, self.folder / CURVE)
        self.log.scalars(iteration, {"accuracy": accuracy})

    def _draw_samples(self) -> None:
        """Draw a sheet of what the model writes and draws now."""
        iteration = self.trainer.iteration
        sheet = contact_sheet(self.trainer.evaluate(prompts=self.output.samples))
        folder = self.folder / "samples"
        folder.mkdir(exist_ok=True)
        sheet.save(folder / f"{iteration:06d}.png")
        self.log.image(iteration, "samples", sheet)

    def _write_account(self, after: dict[str, Evaluation]) -> dict[str, Any]:
        """Write and print the figures, and write the report."""
        rows = read_metrics(self.folder)
        summary = self._summary(after, rows)
        write_json(summary, self.folder / SUMMARY)
        record = RunRecord(
            description=describe(self.trainer.config, self.trainer.variant),
            changed_settings=changed_settings(self.trainer.config),
            summary=summary,
            rows=rows,
            curve=self.curve,
            before=self.before["sampled"],
            after=after["sampled"],
        )
        write_report(self.folder / REPORT, record, self.output.samples)
        self._print_summary(summary, record.measure)
        return summary

    def _summary(
        self, after: dict[str, Evaluation], rows: list[dict[str, float]]
    ) -> dict[str, Any]:
        before = self.before
        return {
            "accuracy_before": before["sampled"].accuracy,
            "accuracy_after": after["sampled"].accuracy,
            "greedy_accuracy_before": before["greedy"].accuracy,
            "greedy_accuracy_after": after["greedy"].accuracy,
            "seconds_training": round(sum(metric_values(rows, "seconds")), 3),
            "cpu_seconds_training": round(sum(metric_values(rows, "cpu_seconds")), 3),
            "iterations": self.total,
            "episodes": self.total * self.trainer.env.num_envs,
            "held_out_prompts": len(after["sampled"].prompts),
            "seed": self.trainer.config.trainer.seed,
            "threads": torch.get_num_threads(),
            "components_before": before["sampled"].means,
            "components_after": after["sampled"].means,
            "accuracy_by_kind_before": before["sampled"].by("kind"),
            "accuracy_by_kind_after": after["sampled"].by("kind"),
        }

    def _print_summary(self, summary: dict[str, Any], measure: str) -> None:
        def _line(name: str, text: str) -> None:
            self.console.print(f"{name:>16}  {text}", highlight=False, soft_wrap=True)

        def _change(name: str) -> str:
            return f"{summary[f'{name}_before']:.3f} → [bold]{summary[f'{name}_after']:.3f}[/bold]"

        _line(measure, f"{_change('accuracy')}  (held-out prompts, sampled text)")
        _line(f"greedy {measure}", _change("greedy_accuracy"))
        for name, value in summary["components_after"].items():
            # The component that is the accuracy itself was printed above.
            if value != summary["accuracy_after"]:
                _line(name, f"{summary['components_before'][name]:.3f} → {value:.3f}")
        seconds = f"{summary['seconds_training']:.0f} s"
        cpu_seconds = f"{summary['cpu_seconds_training']:.0f} s of CPU"
        _line("training", f"{seconds} ({cpu_seconds}), {summary['episodes']} episodes")
        _line("report", str(self.folder / REPORT))

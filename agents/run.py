"""What `unigrpo train` does around the trainer: evaluate, show, log, save, report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from agents.checkpoint import checkpoints
from agents.display import Display
from agents.evaluation import Evaluation
from agents.logs import RunLog, read_metrics
from agents.models.files import read_tensors, write_json, write_tensors
from agents.report import before_and_after, contact_sheet, write_report
from agents.trainer import Trainer

SUMMARY, REPORT, CURVE = "summary.json", "report.html", "accuracy.json"


def run(trainer: Trainer, console: Console | None = None) -> dict[str, Any]:
    """Train to the end and leave a full account in the run's folder; returns the figures of `summary.json`.

    Raises:
        ValueError: the folder holds another run.
    """
    return Run(trainer, console or Console()).go()


class Run:
    """One training run and its folder. A run that was resumed goes on with the files of its first part."""

    def __init__(self, trainer: Trainer, console: Console) -> None:
        self.trainer, self.console, self.output = trainer, console, trainer.config.output
        self.folder, self.total = Path(self.output.folder), trainer.config.trainer.iterations
        if trainer.iteration == 0 and checkpoints(self.folder / "checkpoints"):
            raise ValueError(f"{self.folder} holds a run already; resume it with --resume {self.folder}, or give another output.folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(trainer.config.to_dict(), self.folder / "config.json")
        fresh = trainer.iteration == 0
        self.before = self._measure_before() if fresh else self._read_before()
        self.curve = ([] if fresh else self._read_curve()) or [(0, self.before["sampled"].accuracy)]

    def go(self) -> dict[str, Any]:
        """Train, evaluate, report."""
        trainer, output = self.trainer, self.output
        self.log = RunLog(
            self.folder,
            tensorboard=output.tensorboard,
            wandb=output.wandb,
            settings=trainer.config.to_dict(),
            first_iteration=trainer.iteration,
        )
        try:
            with Display(self.total, trainer.iteration, self.console) as self.display:
                self.display.show_accuracy(accuracy_before=self.before["sampled"].accuracy)
                trainer.train(self._after_iteration)
            trainer.save()
            after = self._evaluate()
        finally:
            self.log.close()
        self._mark(self.total, after["sampled"].accuracy)
        rows = read_metrics(self.folder)
        summary = self._summary(after, rows)
        write_json(summary, self.folder / SUMMARY)
        write_report(self.folder / REPORT, summary, rows, self.curve, self.before["sampled"], after["sampled"], output.samples)
        before_and_after(self.before["sampled"], after["sampled"]).save(self.folder / "before_after.png")
        self._say(summary)
        return summary

    def _after_iteration(self, metrics: dict[str, float]) -> None:
        """Write and show; now and then measure, draw, save."""
        iteration = self.trainer.iteration

        def due(every: int) -> bool:
            return bool(every) and iteration % every == 0

        self.log.write(iteration, metrics)
        self.display.update(iteration, metrics)
        if due(self.trainer.config.evaluation.every) and iteration < self.total:
            accuracy = self.trainer.evaluate().accuracy
            self._mark(iteration, accuracy)
            self.log.scalars(iteration, {"accuracy": accuracy})
            self.display.show_accuracy(accuracy_now=accuracy)
        if due(self.output.samples_every):
            self._draw_samples()
        if due(self.output.checkpoint_every):
            self.trainer.save()

    def _evaluate(self) -> dict[str, Evaluation]:
        with self.console.status("evaluating on held-out prompts"):
            return {"sampled": self.trainer.evaluate(), "greedy": self.trainer.evaluate(greedy=True)}

    def _measure_before(self) -> dict[str, Evaluation]:
        """The first weights on the held-out split, kept for the report of a resumed run."""
        found = self._evaluate()
        tensors: dict[str, Tensor] = {}
        for name, evaluation in found.items():
            tensors[f"{name}.reward"], tensors[f"{name}.pictures"] = evaluation.reward, torch.cat(evaluation.pictures)
            tensors |= {f"{name}.components.{part}": values for part, values in evaluation.components.items()}
        write_tensors(tensors, self.folder / "before.safetensors")
        said = {name: {"rounds": e.rounds, "drawn": [len(drawn) for drawn in e.pictures]} for name, e in found.items()}
        write_json(said, self.folder / "before.json")
        return found

    def _read_before(self) -> dict[str, Evaluation]:
        tensors, told = read_tensors(self.folder / "before.safetensors"), json.loads((self.folder / "before.json").read_text())

        def evaluation(name: str, rounds: list[list[str]], drawn: list[int]) -> Evaluation:
            start = f"{name}.components."
            components = {key.removeprefix(start): values for key, values in tensors.items() if key.startswith(start)}
            pictures = list(tensors[f"{name}.pictures"].split(drawn))
            return Evaluation(self.trainer.held_out(), rounds, pictures, tensors[f"{name}.reward"], components)

        return {name: evaluation(name, **said) for name, said in told.items()}

    def _read_curve(self) -> list[tuple[int, float]]:
        """Held-out accuracy by iteration, as far as the run has come."""
        known = json.loads((self.folder / CURVE).read_text()) if (self.folder / CURVE).is_file() else []
        return [(iteration, accuracy) for iteration, accuracy in known if iteration <= self.trainer.iteration]

    def _mark(self, iteration: int, accuracy: float) -> None:
        self.curve = [*(mark for mark in self.curve if mark[0] != iteration), (iteration, accuracy)]
        write_json(self.curve, self.folder / CURVE)

    def _draw_samples(self) -> None:
        """A sheet of what the model thinks and draws now."""
        trainer = self.trainer
        found = trainer.evaluate(prompts=self.output.samples)
        (self.folder / "samples").mkdir(exist_ok=True)
        sheet = contact_sheet(found)
        sheet.save(self.folder / "samples" / f"{trainer.iteration:06d}.png")
        self.log.picture(trainer.iteration, "samples", sheet)

    def _summary(self, after: dict[str, Evaluation], rows: list[dict[str, float]]) -> dict[str, Any]:
        before, settings = self.before, self.trainer.config
        return {
            "accuracy_before": before["sampled"].accuracy,
            "accuracy_after": after["sampled"].accuracy,
            "greedy_accuracy_before": before["greedy"].accuracy,
            "greedy_accuracy_after": after["greedy"].accuracy,
            "seconds_training": round(sum(row["seconds"] for row in rows), 3),
            "cpu_seconds_training": round(sum(row["cpu_seconds"] for row in rows), 3),
            "iterations": self.total,
            "episodes": self.total * self.trainer.env.num_envs,
            "held_out_prompts": len(after["sampled"].prompts),
            "seed": settings.trainer.seed,
            "threads": torch.get_num_threads(),
            "components_before": before["sampled"].means,
            "components_after": after["sampled"].means,
            "accuracy_by_kind_before": before["sampled"].by("kind"),
            "accuracy_by_kind_after": after["sampled"].by("kind"),
        }

    def _say(self, summary: dict[str, Any]) -> None:
        def line(name: str, text: str) -> None:
            self.console.print(f"{name:>16}  {text}", highlight=False, soft_wrap=True)

        line(
            "accuracy", f"{summary['accuracy_before']:.3f} → [bold]{summary['accuracy_after']:.3f}[/bold]  (held-out prompts, sampled text)"
        )
        line("greedy accuracy", f"{summary['greedy_accuracy_before']:.3f} → [bold]{summary['greedy_accuracy_after']:.3f}[/bold]")
        for name, value in summary["components_after"].items():
            if value != summary["accuracy_after"]:
                line(name, f"{summary['components_before'][name]:.3f} → {value:.3f}")
        line(
            "training",
            f"{summary['seconds_training']:.0f} s ({summary['cpu_seconds_training']:.0f} s of CPU), {summary['episodes']} episodes",
        )
        line("report", str(self.folder / REPORT))

"""What `unigrpo train` does around the trainer: evaluate, show, log, save, report."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from agents.display import Display
from agents.evaluation import Evaluation, evaluate
from agents.logs import RunLog, read_metrics
from agents.models.files import read_tensors, write_json, write_tensors
from agents.report import contact_sheet, write_report
from agents.trainer import Trainer

SUMMARY, REPORT, CURVE = "summary.json", "report.html", "accuracy.json"


def run(trainer: Trainer, console: Console | None = None) -> dict[str, Any]:
    """Train to the end and leave a full account in the run's folder; returns the figures of `summary.json`.

    A run that was resumed takes its accuracy before training from the files of the first part.
    """
    console = console or Console()
    output, total = trainer.config.output, trainer.config.trainer.iterations
    folder = Path(output.folder)
    folder.mkdir(parents=True, exist_ok=True)
    if trainer.iteration == 0 and (folder / "checkpoints").exists():
        raise ValueError(f"{folder} holds a run already; resume it with --resume {folder}, or give another output.folder")
    write_json(trainer.config.to_dict(), folder / "config.json")
    before = _before(trainer, folder, console)
    curve = _curve(trainer, folder, before["sampled"].accuracy)
    log = RunLog(
        folder, tensorboard=output.tensorboard, wandb=output.wandb, settings=trainer.config.to_dict(), first_iteration=trainer.iteration
    )
    began, spent = time.perf_counter(), 0.0
    try:
        with Display(total, trainer.iteration, console) as display:
            display.show_accuracy(accuracy_before=before["sampled"].accuracy)

            def after_iteration(metrics: dict[str, float]) -> None:
                nonlocal spent
                iteration = trainer.iteration
                log.write(iteration, metrics)
                display.update(iteration, metrics)
                paused = time.perf_counter()
                every = trainer.config.evaluation.every
                if every and iteration % every == 0 and iteration < total:
                    accuracy = trainer.evaluate().accuracy
                    curve.append((iteration, accuracy))
                    write_json(curve, folder / CURVE)
                    log.scalars(iteration, {"accuracy": accuracy})
                    display.show_accuracy(accuracy_now=accuracy)
                if output.samples_every and iteration % output.samples_every == 0:
                    _samples(trainer, folder, log)
                if output.checkpoint_every and iteration % output.checkpoint_every == 0:
                    trainer.save()
                spent += time.perf_counter() - paused

            trainer.train(after_iteration)
        seconds = time.perf_counter() - began - spent
        trainer.save()
        with console.status("evaluating on held-out prompts"):
            after = {"sampled": trainer.evaluate(), "greedy": trainer.evaluate(greedy=True)}
    finally:
        log.close()
    summary = {
        "accuracy_before": before["sampled"].accuracy,
        "accuracy_after": after["sampled"].accuracy,
        "greedy_accuracy_before": before["greedy"].accuracy,
        "greedy_accuracy_after": after["greedy"].accuracy,
        "seconds_training": round(seconds, 1),
        "iterations": total,
        "episodes": total * trainer.env.num_envs,
        "held_out_prompts": len(after["sampled"].prompts),
        "seed": trainer.config.trainer.seed,
        "accuracy_by_kind_before": before["sampled"].by("kind"),
        "accuracy_by_kind_after": after["sampled"].by("kind"),
        "threads": torch.get_num_threads(),
    }
    curve.append((total, after["sampled"].accuracy))
    write_json(curve, folder / CURVE)
    write_json(summary, folder / SUMMARY)
    write_report(folder / REPORT, summary, read_metrics(folder), curve, before["sampled"], after["sampled"], output.samples)
    for name in ("accuracy", "greedy_accuracy"):
        console.print(
            f"{name.replace('_', ' '):>16}  {summary[name + '_before']:.3f} → [bold]{summary[name + '_after']:.3f}[/bold]", highlight=False
        )
    console.print(f"{'training':>16}  {seconds:.0f} s, {summary['episodes']} episodes", highlight=False)
    console.print(f"{'report':>16}  {folder / REPORT}", highlight=False, soft_wrap=True)
    return summary


def _curve(trainer: Trainer, folder: Path, accuracy: float) -> list[tuple[int, float]]:
    """Held-out accuracy by iteration, as far as the run has come."""
    if trainer.iteration == 0:
        return [(0, accuracy)]
    known = json.loads((folder / CURVE).read_text()) if (folder / CURVE).is_file() else []
    return [(int(iteration), float(value)) for iteration, value in known if iteration <= trainer.iteration] or [(0, accuracy)]


def _before(trainer: Trainer, folder: Path, console: Console) -> dict[str, Evaluation]:
    """The first weights on the held-out split: measured at the start, read back on resume."""
    place = folder / "before.safetensors"
    found: dict[str, Evaluation] = {}
    if trainer.iteration == 0:
        with console.status("evaluating on held-out prompts"):
            found = {"sampled": trainer.evaluate(), "greedy": trainer.evaluate(greedy=True)}
        write_tensors({f"{n}.{part}": getattr(e, part) for n, e in found.items() for part in ("images", "reward")}, place)
        write_json({name: evaluation.texts for name, evaluation in found.items()}, folder / "before.json")
        return found
    tensors, texts = read_tensors(place), json.loads((folder / "before.json").read_text())
    return {
        name: Evaluation(trainer.held_out(), texts[name], tensors[f"{name}.images"], tensors[f"{name}.reward"], {})
        for name in ("sampled", "greedy")
    }


def _samples(trainer: Trainer, folder: Path, log: RunLog) -> None:
    """A sheet of what the model thinks and draws now."""
    prompts = trainer.held_out()[: trainer.config.output.samples]
    evaluation = evaluate(trainer.model, trainer.variant, prompts, seed=trainer.config.evaluation.seed, device=trainer.config.model.device)
    (folder / "samples").mkdir(exist_ok=True)
    sheet = contact_sheet(evaluation)
    sheet.save(folder / "samples" / f"{trainer.iteration:06d}.png")
    pixels = torch.frombuffer(bytearray(sheet.tobytes()), dtype=torch.uint8).view(sheet.height, sheet.width, 3)
    log.picture(trainer.iteration, "samples", pixels.permute(2, 0, 1).float() / 255)

"""`unigrpo evaluate`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agents.cli.hydra_app import in_sweep, job_folder, launch, settings_help
from agents.cli.options import make_parser, positive_int
from agents.config import Config


def main(argv: Sequence[str]) -> None:
    """Measure a model on held-out prompts, once or once for each job of a sweep.

    Args:
        argv: our options, options of hydra, and settings.

    Raises:
        ValueError: an unknown setting, or a value that does not fit.
    """
    parser = make_parser("evaluate", epilog=settings_help())
    parser.usage = "unigrpo evaluate [options] [group=option ...] [section.key=value ...]"
    parser.add_argument(
        "--best-of",
        type=positive_int,
        default=1,
        metavar="K",
        help="the best of K sampled episodes of a prompt, by the reward itself [1]",
    )
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="write the figures to this JSON file; in a sweep, to a file of its name in the"
        " folder of each job",
    )
    args, words = parser.parse_known_args(argv)

    def _job(config: Config) -> float:
        # Modules of the settings and of the command line are both imported.
        config.output.imports = [*config.output.imports, *args.imports]
        figures = _evaluate(config, args.best_of)
        if args.out:
            _write(figures, Path(args.out))
        # The value that a sweeper of hydra optimises.
        return figures["sampled"]["accuracy"]

    if not any(word.startswith("hydra.run.dir=") for word in words):
        # A single evaluation writes nothing but its `--out` file, so it needs no folder.
        words.append("hydra.run.dir=.")
    launch("evaluate", words, _job)


def _evaluate(config: Config, best_of: int) -> dict[str, Any]:
    """Print the accuracies and return them, by the kind of measure."""
    # Imported here, so that `--help` does not wait for torch.
    from rich.console import Console

    from agents.training.evaluator import Evaluator

    evaluator = Evaluator(config)
    console = Console()
    figures: dict[str, Any] = {}

    def _show(name: str, evaluation: Any) -> None:
        """Print one measure and keep its figures."""
        kinds = evaluation.by("kind")
        figures[name] = {"accuracy": evaluation.accuracy, "by_kind": kinds}
        text = "  ".join(f"{kind} {value:.2f}" for kind, value in kinds.items())
        line = f"{name:>9}  [bold]{evaluation.accuracy:.3f}[/bold]  {text}"
        console.print(line, highlight=False, soft_wrap=True)

    with console.status(f"{config.evaluation.prompts} prompts"):
        sampled = evaluator.evaluate()
        _show("sampled", sampled)
        _show("greedy", evaluator.evaluate(greedy=True))
        # The sampled episodes above are attempt 0.
        for attempt in range(1, best_of):
            # [prompts] float32
            reward = evaluator.evaluate(attempt=attempt).reward
            # fmax takes the other number where one is NaN: an attempt that could not be scored.
            sampled = dataclasses.replace(sampled, reward=sampled.reward.fmax(reward))
        if best_of > 1:
            _show(f"best of {best_of}", sampled)
    return figures


def _write(figures: dict[str, Any], path: Path) -> None:
    from agents.storage import write_json

    # The jobs of a sweep would write to the same file.
    if in_sweep():
        path = job_folder() / path.name
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(figures, path)

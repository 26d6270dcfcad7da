"""`unigrpo train`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from agents.cli.hydra_app import job_folder, launch, settings_help
from agents.cli.options import make_parser
from agents.config import Config, override_config
from agents.config.loading import check_names


def main(argv: Sequence[str]) -> None:
    """Train once, or once for each job of a sweep; or resume a run.

    Args:
        argv: our options, options of hydra, and settings.

    Raises:
        ValueError: an unknown setting, a value that does not fit, or a run that cannot be resumed.
    """
    parser = make_parser("train", epilog=settings_help())
    parser.usage = "unigrpo train [options] [group=option ...] [section.key=value ...]"
    parser.add_argument(
        "--resume", metavar="FOLDER", help="go on with the run in this folder, bit for bit"
    )
    args, words = parser.parse_known_args(argv)
    if args.resume is not None:
        _resume(args.resume, words, args.imports)
        return

    def _job(config: Config) -> float:
        # In a sweep each job has a folder of its own below `output.folder`.
        config.output.folder = str(job_folder())
        config.output.imports = [*config.output.imports, *args.imports]
        return _train(config)

    launch("train", words, _job)


def _train(config: Config) -> float:
    """Train by the settings; returns the accuracy after it, for hydra's sweepers."""
    from agents.training.trainer import Trainer

    return _run(Trainer(config))["accuracy_after"]


def _resume(folder: str, words: Sequence[str], imports: Sequence[str]) -> None:
    """Go on with the run in `folder`, with some settings changed."""
    # Hydra composes nothing here, so its options would be ignored without a word.
    for word in words:
        if word.startswith("-"):
            raise ValueError(
                f"expected only section.key=value beside --resume, got {word}: "
                "a resumed run keeps its settings; change single ones"
            )
    # Before torch is imported, so that a misspelled name is reported at once.
    check_names(words, groups=())
    from agents.training.trainer import Trainer

    def _change(config: Config) -> Config:
        changed = override_config(config, words)
        # A module that the first part of the run imported need not be named again, but may be.
        names = [*changed.output.imports, *imports]
        changed.output.imports = list(dict.fromkeys(names))
        return changed

    _run(Trainer.resume(folder, _change))


def _run(trainer: Any) -> dict[str, Any]:
    from rich.console import Console

    from agents.training.run import run

    return run(trainer, Console())

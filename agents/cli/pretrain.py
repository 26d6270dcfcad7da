"""`unigrpo pretrain`."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from agents.cli.options import make_parser, positive_int

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

    from agents.training.pretraining import PretrainingStage


def main(argv: Sequence[str]) -> None:
    """Train stage by stage, save the weights, and measure each scenario.

    Args:
        argv: the words after `unigrpo pretrain`.

    Raises:
        ValueError: an unknown model or stage, or a stage that the model cannot take part in.
    """
    args = _parser().parse_args(argv)
    # Imported here, so that `--help` does not wait for torch.
    from rich.console import Console

    from agents.training.build import import_modules
    from agents.training.pretraining import STAGES

    import_modules(args.imports)
    console = Console()
    # The seed of the stages is also that of random weights; 0 is the default of both.
    given = _given_settings(args)
    model = _make_model(args.model, given.get("seed", 0))
    _check_scenarios(model, args.stages)
    with _progress(console) as progress:
        for name in args.stages:
            _train_stage(model, name, STAGES[name], given, progress)
    folder = model.save_pretrained(args.out)
    # Each scenario once, in the order of the stages: several stages may train the same one.
    scenarios = [scenario for name in args.stages for scenario in STAGES[name].scenarios]
    for scenario in dict.fromkeys(scenarios):
        _measure(model, scenario, args.prompts, console)
    console.print(f"weights  {folder}", highlight=False)


def _parser() -> argparse.ArgumentParser:
    """The options: each setting of supervised training, with the values of the stages."""
    from agents.training.pretraining import SHIPPED, STAGES, SupervisedSettings

    parser = make_parser("pretrain")
    parser.add_argument(
        "--stages",
        nargs="+",
        choices=list(STAGES),
        default=list(SHIPPED),
        help=f"stages of the training, in this order [{' '.join(SHIPPED)}]",
    )
    for entry in dataclasses.fields(SupervisedSettings):
        flag = "--" + entry.name.replace("_", "-")
        text = entry.metadata["help"]
        # The default is None, which stands for the stage's own value.
        if isinstance(entry.default, bool):
            parser.add_argument(flag, action="store_true", default=None, help=text)
            continue
        values = [str(getattr(stage.settings, entry.name)) for stage in STAGES.values()]
        # Shown as `[a/b]`, or as `[a]` where all stages agree.
        own = "/".join(dict.fromkeys(values))
        parser.add_argument(flag, type=type(entry.default), help=f"{text} [{own}]")
    parser.add_argument(
        "--prompts",
        type=positive_int,
        default=256,
        help="held-out prompts on which each scenario is measured at the end [256]",
    )
    parser.add_argument("--model", help="go on from this model instead of from nothing")
    parser.add_argument(
        "--out", default="outputs/pretrained", help="folder of the weights [outputs/pretrained]"
    )
    return parser


def _given_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The supervised settings that stand on the command line."""
    from agents.training.pretraining import SupervisedSettings

    given = {}
    for entry in dataclasses.fields(SupervisedSettings):
        value = getattr(args, entry.name)
        if value is not None:
            given[entry.name] = value
    return given


def _make_model(name: str | None, seed: int) -> Any:
    """The model `name`, or the tiny one with random weights."""
    from agents.models.bagel.model import Bagel
    from agents.models.bagel.tiny_config import TINY_CONFIG
    from agents.models.registry import load_model

    if name is not None:
        return load_model(name)
    return Bagel(TINY_CONFIG).initialise(seed)


def _check_scenarios(model: Any, stages: Sequence[str]) -> None:
    """Refuse a stage that the model cannot take part in, before the first one begins."""
    from agents.training.pretraining import STAGES
    from unigrpo_env.variants.variant import make_variant

    for name in stages:
        for scenario in STAGES[name].scenarios:
            try:
                make_variant(scenario, processor=model.processor)
            except ValueError as error:
                raise ValueError(
                    f"the stage {name!r} needs the scenario {scenario!r}, which this model cannot "
                    f"play: {error}; name other stages with --stages"
                ) from error


def _progress(console: Console) -> Progress:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[losses]}"),
        console=console,
    )


def _train_stage(
    model: Any, name: str, stage: PretrainingStage, given: dict[str, Any], progress: Progress
) -> None:
    """Train one stage, with a progress bar, or with a line now and then without a terminal."""
    from agents.training.pretraining import train_supervised
    from unigrpo_env.variants.variant import make_variant

    settings = dataclasses.replace(stage.settings, **given)
    total = settings.steps
    bar = progress.add_task(name, total=total, losses="")

    def _show(step: int, losses: dict[str, float]) -> None:
        text = f"text {losses['text_loss']:.3f}  image {losses['image_loss']:.4f}"
        progress.update(bar, completed=step, losses=text)
        # In a file or a pipe the bar is not drawn.
        if not progress.console.is_terminal and (step % 50 == 0 or step == total):
            progress.console.print(f"{name:>8} {step:>5}/{total}  {text}", highlight=False)

    # Each variant with its share of the demonstrations of an update.
    scenarios = []
    for scenario, share in stage.scenarios.items():
        scenarios.append((make_variant(scenario, processor=model.processor), share))
    train_supervised(
        model, scenarios, settings, _show, first_demonstration=stage.first_demonstration
    )


def _measure(model: Any, scenario: str, count: int, console: Console) -> None:
    """Print the held-out accuracy in one scenario, sampled and greedy."""
    from agents.config.schema import EvaluationSettings
    from agents.evaluation.accuracy import evaluate
    from unigrpo_env.variants.variant import make_variant

    variant = make_variant(scenario, processor=model.processor)
    # The default of `evaluation.seed`, so that the figures are those of `unigrpo evaluate`.
    prompts = variant.task.prompts("test", count, EvaluationSettings().seed)
    for name, temperature in (("sampled", 1.0), ("greedy", 0.0)):
        found = evaluate(model, variant, prompts, temperature=temperature)
        kinds = {kind: round(value, 2) for kind, value in found.by("kind").items()}
        line = f"{scenario:>13} {name:>7}  [bold]{found.accuracy:.3f}[/bold]  {kinds}"
        console.print(line, highlight=False, soft_wrap=True)

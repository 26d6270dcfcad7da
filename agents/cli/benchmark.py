"""`unigrpo benchmark`."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agents.cli.hydra_app import in_sweep, job_folder, launch, settings_help
from agents.cli.options import make_parser, positive_int
from agents.config import Config

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

    from agents.evaluation.benchmark import Play, Report, Scoring, Summary
    from agents.evaluation.benchmark_folder import BenchmarkFolder
    from rewards import EpisodeBatch

BENCHMARKS = {
    "geneval": ("geneval", {"score": "strict"}),
    "questions": ("judge", {"mode": "questions"}),
}
"""Each benchmark with the reward that scores it, and the options that make it that benchmark."""

EPILOG = """\
benchmarks:
  geneval      GenEval's prompts or others of its form: are the objects, counts, colours and
               positions there? Models: env.reward_options.geneval.detector=FOLDER_OR_ID,
               .colours=FOLDER_OR_ID, .device=cuda
  questions    prompts with "questions" in their metadata, answered by a vision-language model on a
               server: env.reward_options.judge.url=http://HOST:8000/v1, .model=NAME

The folder can be scored by GenEval's own scorer too. Called again, the command goes on where it was
stopped; other models of the scorer score the same images again.
"""


def main(argv: Sequence[str]) -> None:
    """Draw the images of a benchmark and score them, once or once for each job of a sweep.

    Args:
        argv: our options, options of hydra, and settings.

    Raises:
        ValueError: an unknown setting, a value that does not fit, or a folder of other images.
    """
    parser = _parser()
    args, words = parser.parse_known_args(argv)

    def _job(config: Config) -> float:
        # Modules of the settings and of the command line are both imported.
        config.output.imports = [*config.output.imports, *args.imports]
        return _run(args, config)

    if not any(word.startswith("hydra.run.dir=") for word in words):
        # The images have a folder of their own.
        words.append("hydra.run.dir=.")
    launch("benchmark", words, _job)


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("benchmark", epilog=EPILOG + "\n" + settings_help())
    parser.usage = (
        "unigrpo benchmark {geneval,questions} --prompts FILE [options] [section.key=value ...]"
    )
    parser.add_argument("benchmark", choices=tuple(BENCHMARKS), help="what is measured")
    parser.add_argument(
        "--prompts", required=True, metavar="FILE", help="JSONL file with the prompts"
    )
    parser.add_argument("--samples", type=positive_int, default=4, help="images of each prompt [4]")
    parser.add_argument(
        "--greedy", action="store_true", help="take the likeliest token in place of a sampled one"
    )
    parser.add_argument(
        "--out",
        metavar="FOLDER",
        help="folder of images and scores [outputs/benchmark_NAME]; in a sweep, a folder of its"
        " name in that of each job",
    )
    return parser


def _run(args: argparse.Namespace, config: Config) -> float:
    """Draw, score and print; the result is the mean over kinds of prompts."""
    # Imported here, so that `--help` does not wait for torch.
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    from agents.evaluation import benchmark
    from agents.evaluation.benchmark_folder import BenchmarkFolder
    from agents.training.build import import_modules
    from unigrpo_env.tasks.prompt_file import read_prompts

    import_modules(config.output.imports)
    console = Console()
    _choose_reward(config, args.benchmark, args.prompts)
    folder = BenchmarkFolder(_out(args), read_prompts(args.prompts), args.samples)
    # Before any image is drawn, which may take hours.
    scoring = _make_scoring(config)
    folder.claim(_drawn_by(config, args.greedy))
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    settings = config.evaluation
    with Progress(*columns, console=console) as progress:
        missing = len(folder.missing())
        if missing:
            report = _bar(progress, "drawing", missing)
            play = _make_play(config, args.greedy)
            benchmark.draw(folder, play, settings.seed, settings.batch_size, report)
            # The scorer's models need the memory of the one that drew.
            del play
        unscored = len(folder.slots) - len(folder.scores(scoring.name))
        report = _bar(progress, "scoring", unscored)
        failures = benchmark.score(folder, scoring, settings.batch_size, report)
    found = benchmark.summarise(folder, scoring.name)
    _print_table(found, folder, console)
    if found.unscored:
        text = f"{found.unscored} images have no score ({failures}); call the command again"
        console.print(text, style="yellow", highlight=False, markup=False)
    _write(found, folder, args)
    return found.mean_of_kinds


def _choose_reward(config: Config, name: str, prompts: str) -> None:
    """Let the settings name the benchmark's prompts and its reward alone."""
    reward, fixed = BENCHMARKS[name]
    options = dict(config.env.reward_options.get(reward, {}))
    config.env.prompts = prompts
    config.env.test_prompts = None
    config.env.reward = reward
    config.env.reward_options = {reward: {**options, **fixed}}
    config.env.thought_reward = config.env.round_reward = config.evaluation.reward = ""


def _out(args: argparse.Namespace) -> Path:
    path = Path(args.out or f"outputs/benchmark_{args.benchmark}")
    # The jobs of a sweep would write to the same folder.
    return job_folder() / path.name if in_sweep() else path


def _drawn_by(config: Config, greedy: bool) -> dict[str, Any]:
    """The settings on which the images depend, by name."""
    settings = config.to_dict()
    found: dict[str, Any] = {"seed": config.evaluation.seed, "greedy": greedy}
    found["algorithm.temperature"] = config.algorithm.temperature
    found["evaluation.image_steps"] = config.evaluation.image_steps
    # What says how the images are scored, and what says where and how fast they are drawn.
    other = {"reward", "reward_options", "thought_reward", "round_reward", "prompts"}
    other |= {"test_prompts", "device", "max_rows", "checkpointing", "train"}
    for section in ("env", "model", "guidance"):
        for name, value in settings[section].items():
            if name not in other:
                found[f"{section}.{name}"] = value
    # A run that goes on writes new weights to the same folder.
    weights = []
    for source in (config.model.name, config.model.thinker, config.model.painter):
        # Elsewhere than in a folder there are no files of the user.
        paths = sorted(Path(source).rglob("*.safetensors")) if source else []
        for path in paths:
            weights.append([path.name, path.stat().st_size, path.stat().st_mtime_ns])
    found["weights"] = weights
    return found


def _make_scoring(config: Config) -> Scoring:
    """The scorer of the settings, with its models loaded."""
    import json

    from agents.evaluation.benchmark import score_by_geneval, score_by_reward
    from rewards import WeightedReward, make_reward
    from rewards.geneval.reward import GenEval

    name = config.env.reward
    options = config.env.reward_options
    reward = make_reward(name, options[name])
    prepare = getattr(reward, "prepare", None)
    if prepare is not None:
        prepare()
    if isinstance(reward, GenEval):
        return score_by_geneval(reward)
    # How a server is reached says nothing of what is measured, and a token must not be written to
    # the folder. Only where no model is named does the address stand for it.
    hidden = {"token", "token_variable", "limits"}
    if options[name].get("model"):
        hidden.add("url")
    shown = {key: value for key, value in options[name].items() if key not in hidden}
    title = f"{name} {json.dumps(shown, sort_keys=True)}"
    return score_by_reward(WeightedReward(name, options), title)


def _make_play(config: Config, greedy: bool) -> Play:
    """The model of the settings, ready to draw."""
    from agents.evaluation.accuracy import Evaluation, evaluate
    from agents.training import build
    from agents.training.evaluator import Evaluator
    from unigrpo_env.tasks.task import Prompt

    evaluator = Evaluator(config)
    # Images are scored later, from their files.
    variant = dataclasses.replace(
        evaluator.variant, reward=_no_score, thought_reward=None, round_reward=None
    )

    def _play(prompts: list[Prompt], seed: int) -> Evaluation:
        return evaluate(
            evaluator.model,
            variant,
            prompts,
            temperature=0.0 if greedy else config.algorithm.temperature,
            image_steps=config.evaluation.image_steps,
            seed=seed,
            guidance=build.build_guidance(config.guidance, config.guidance.evaluate),
            batch_size=len(prompts),
            device=config.model.device,
        )

    return _play


def _no_score(episodes: EpisodeBatch) -> list[float]:
    """NaN for each episode."""
    return [float("nan")] * len(episodes)


def _bar(progress: Progress, title: str, total: int) -> Report:
    task = progress.add_task(title, total=total)
    return lambda count: progress.advance(task, count)


def _print_table(found: Summary, folder: BenchmarkFolder, console: Console) -> None:
    """Print the means by kind of prompt, under the scorer's full name."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(found.scorer), caption=escape(f"images in {folder.path}"))
    for title in ("prompts", "mean", "best of each prompt", "images"):
        table.add_column(title, justify="left" if title == "prompts" else "right")
    for name, kind in found.kinds.items():
        table.add_row(escape(name), f"{kind.mean:.4f}", f"{kind.best:.4f}", str(kind.images))
    table.add_section()
    images = str(sum(kind.images for kind in found.kinds.values()))
    table.add_row(f"mean of the {len(found.kinds)}", f"{found.mean_of_kinds:.4f}", "", images)
    table.add_row("mean of all images", f"{found.mean_of_images:.4f}", "", images)
    console.print(table)


def _write(found: Summary, folder: BenchmarkFolder, args: argparse.Namespace) -> None:
    from agents.storage import write_json

    figures = dataclasses.asdict(found)
    # JSON knows no NaN.
    for name in ("mean_of_kinds", "mean_of_images"):
        figures[name] = getattr(found, name) if found.kinds else None
    figures |= {"benchmark": args.benchmark, "prompts": args.prompts, "samples": args.samples}
    write_json(figures, folder.path / "results.json")

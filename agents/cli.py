"""The command line: train, evaluate, sample, pretrain, tables, list."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from rich.markup import escape

from rewards import UnscoredError

Parser = argparse.ArgumentParser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text}")
    return int(text)


def _settings_help() -> str:
    from agents.config import Config, settings

    defaults = Config()
    lines = ["settings (section.key=value):"]
    for name, entry in settings():
        section, key = name.split(".")
        default = getattr(getattr(defaults, section), key)
        lines.append(f"  {name:<31} {entry.metadata['help']} [{'' if default is None else default}]")
    return "\n".join(lines)


def _parser() -> Parser:
    parser = Parser("unigrpo", description="Train, by reinforcement learning, models that write and draw in turns.")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, text: str, with_settings: bool = False) -> Parser:
        sub = commands.add_parser(
            name,
            help=text,
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            epilog=_settings_help() if with_settings else None,
        )
        sub.add_argument(
            "--import",
            dest="imports",
            metavar="MODULE",
            action="append",
            default=[],
            help="module to import first, for the rewards and variants it registers",
        )
        if with_settings:
            from agents.config import config_names

            sub.add_argument("--config", help=f"one of: {', '.join(config_names())} [unigrpo]")
            sub.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings to change, listed below")
        return sub

    train = command("train", "Train a model by UniGRPO or one of its parts, and write a report.", with_settings=True)
    train.add_argument("--resume", metavar="FOLDER", help="go on with the run in this folder, bit for bit")
    test = command("evaluate", "Held-out accuracy of a model, sampled and greedy.", with_settings=True)
    test.add_argument(
        "--best-of", type=_positive, default=1, metavar="K", help="the best of K sampled episodes a prompt, by the reward itself [1]"
    )
    test.add_argument("--out", help="write the figures to this JSON file")
    _sample_options(command("sample", "Let a model think about a prompt and draw it."))
    _pretrain_options(command("pretrain", "Train the tiny model's weights, as shipped, from nothing."))
    _tables_options(command("tables", "The paper's comparisons and the other scenarios on the shipped model, on one page."))
    command("list", "What is there: methods, kernels, objectives, variants, rewards, models.")
    return parser


def _train(args: argparse.Namespace, console: Console) -> None:
    from agents.config import Config, load_config, override_config
    from agents.run import run
    from agents.trainer import Trainer

    if args.resume:
        if args.config is not None:
            raise ValueError("expected --config or --resume, got both: a resumed run keeps its config; change single settings instead")

        def change(config: Config) -> Config:
            changed = override_config(config, args.overrides)
            changed.output.imports = list(dict.fromkeys([*changed.output.imports, *args.imports]))
            return changed

        trainer = Trainer.resume(args.resume, change)
    else:
        config = load_config(args.config or "unigrpo", args.overrides)
        config.output.imports = [*config.output.imports, *args.imports]
        trainer = Trainer(config)
    run(trainer, console)


def _evaluate(args: argparse.Namespace, console: Console) -> None:
    from agents.config import load_config
    from agents.evaluation import Evaluation
    from agents.models.files import write_json
    from agents.trainer import Trainer

    config = load_config(args.config or "unigrpo", args.overrides)
    config.output.imports = [*config.output.imports, *args.imports]
    trainer = Trainer(config)
    figures: dict[str, Any] = {}

    def show(name: str, evaluation: Evaluation) -> None:
        figures[name] = {"accuracy": evaluation.accuracy, "by_kind": evaluation.by("kind")}
        kinds = "  ".join(f"{kind} {value:.2f}" for kind, value in evaluation.by("kind").items())
        console.print(f"{name:>9}  [bold]{evaluation.accuracy:.3f}[/bold]  {kinds}", highlight=False, soft_wrap=True)

    with console.status(f"{config.evaluation.prompts} prompts"):
        sampled = trainer.evaluate()
        show("sampled", sampled)
        show("greedy", trainer.evaluate(greedy=True))
        for attempt in range(1, args.best_of):
            sampled = dataclasses.replace(sampled, reward=sampled.reward.fmax(trainer.evaluate(attempt=attempt).reward))
        if args.best_of > 1:
            show(f"best of {args.best_of}", sampled)
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        write_json(figures, Path(args.out))


def _sample_options(parser: Parser) -> None:
    parser.add_argument("prompt", help="what to draw, such as 'two red circles'")
    parser.add_argument("--model", default="tiny", help="known model or folder of a saved one [tiny]")
    parser.add_argument("--variant", default="text_to_image", help="registered variant [text_to_image]")
    parser.add_argument(
        "--source", action="append", default=[], metavar="PICTURE", help="picture that the model reads first, in variants that take some"
    )
    parser.add_argument(
        "--turn", action="append", default=[], metavar="TEXT", help="what the user says after a picture, in variants where they speak"
    )
    parser.add_argument("--steps", type=_positive, help="denoising steps; the variant's own if left out")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the words; 0 for greedy [1.0]")
    parser.add_argument("--seed", type=int, default=0, help="of words and picture [0]")
    parser.add_argument("--count", type=_positive, default=1, help="episodes, from this seed on [1]")
    parser.add_argument("--out", default="outputs/sample.png", help="where the picture goes [outputs/sample.png]")


def _sample(args: argparse.Namespace, console: Console) -> None:
    from agents.evaluation import evaluate
    from agents.models import load_model
    from agents.report import contact_sheet, panels
    from agents.trainer import import_modules
    from unigrpo_env.rendering import enlarge, read_picture
    from unigrpo_env.tasks import Prompt
    from unigrpo_env.variants import make_variant

    import_modules(args.imports)
    # What a free prompt asks for is not known to any task, so nothing can be scored: a reward of NaN says so.
    variant = make_variant(args.variant, reward=lambda episodes: [float("nan")] * len(episodes))
    unknown = getattr(variant.tokenizer, "unk_token_id", None)
    words = [
        word
        for word in args.prompt.split()
        if unknown is not None and variant.tokenizer.encode(word, add_special_tokens=False) == [unknown]
    ]
    if words:
        console.print(f"[yellow]words that the model has never seen: {', '.join(words)}[/yellow]")
    model = cast(Any, load_model(args.model))
    prompt = Prompt(args.prompt, sources=tuple(read_picture(path) for path in args.source), turns=tuple(args.turn))
    found = evaluate(model, variant, [prompt] * args.count, temperature=args.temperature, image_steps=args.steps, seed=args.seed)
    for said in found.rounds:
        for number, text in enumerate(said):
            user = f"[bold]{escape(args.turn[number - 1])}[/bold]  " if 0 < number <= len(args.turn) else ""
            console.print(user + escape(text or "(no thought)"), highlight=False)
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    single = args.count == 1 and len(panels(found, 0)) == 1
    (enlarge(found.images[0], 384) if single else contact_sheet(found)).save(out)
    console.print(f"[bold]{out}[/bold]", highlight=False)


def _pretrain_options(parser: Parser) -> None:
    from agents.supervised import COURSES, SupervisedSettings

    parser.add_argument("--courses", nargs="+", choices=list(COURSES), default=list(COURSES), help=f"what to teach [{' '.join(COURSES)}]")
    for entry in dataclasses.fields(SupervisedSettings):
        flag = "--" + entry.name.replace("_", "-")
        if isinstance(entry.default, bool):
            parser.add_argument(flag, action="store_true", default=None, help=entry.metadata["help"])
        else:
            own = "/".join(dict.fromkeys(str(getattr(course.settings, entry.name)) for course in COURSES.values()))
            parser.add_argument(flag, type=type(entry.default), help=f"{entry.metadata['help']} [{own}]")
    parser.add_argument("--prompts", type=_positive, default=256, help="held out, on which each scenario is measured at the end [256]")
    parser.add_argument("--model", help="go on from this model instead of from nothing")
    parser.add_argument("--out", default="outputs/pretrained", help="folder of the new weights [outputs/pretrained]")


def _pretrain(args: argparse.Namespace, console: Console) -> None:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    from agents.evaluation import evaluate
    from agents.models import Bagel, load_model
    from agents.models.tiny_config import TINY_CONFIG
    from agents.supervised import COURSES, SupervisedSettings, train_supervised
    from agents.trainer import import_modules
    from unigrpo_env.variants import make_variant

    import_modules(args.imports)
    given = {entry.name: getattr(args, entry.name) for entry in dataclasses.fields(SupervisedSettings)}
    given = {name: value for name, value in given.items() if value is not None}
    model = cast(Any, load_model(args.model) if args.model else Bagel(TINY_CONFIG).initialise(given.get("seed", 0)))
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[losses]}"),
    )
    with Progress(*columns, console=console) as progress:
        for name in args.courses:
            course = COURSES[name]
            settings = dataclasses.replace(course.settings, **given)
            bar = progress.add_task(name, total=settings.steps, losses="")

            def show(step: int, losses: dict[str, float], name: str = name, total: int = settings.steps, bar: TaskID = bar) -> None:
                told = f"text {losses['text_loss']:.3f}  image {losses['image_loss']:.4f}"
                progress.update(bar, completed=step, losses=told)
                if not console.is_terminal and (step % 50 == 0 or step == total):
                    console.print(f"{name:>8} {step:>5}/{total}  {told}", highlight=False)

            scenarios = [(make_variant(scenario), share) for scenario, share in course.scenarios.items()]
            train_supervised(model, scenarios, settings, show, first_lesson=course.first_lesson)
    folder = model.save_pretrained(args.out)
    for scenario in dict.fromkeys(scenario for name in args.courses for scenario in COURSES[name].scenarios):
        variant = make_variant(scenario)
        prompts = variant.task.prompts("test", args.prompts, 1_000_000)
        for name, temperature in (("sampled", 1.0), ("greedy", 0.0)):
            found = evaluate(model, variant, prompts, temperature=temperature)
            console.print(
                f"{scenario:>13} {name:>7}  [bold]{found.accuracy:.3f}[/bold]  { ({k: round(v, 2) for k, v in found.by('kind').items()}) }",
                highlight=False,
                soft_wrap=True,
            )
    console.print(f"weights  {folder}", highlight=False)


def _tables_options(parser: Parser) -> None:
    parser.add_argument("--out", default="outputs/tables", help="folder of runs and page; what is done there is kept [outputs/tables]")
    parser.add_argument("--quick", action="store_true", help="a breath of every row, to see that they run")
    parser.add_argument("--extras", action="store_true", help="also the studies of kernels, windows and text, which the paper has not")
    parser.add_argument("--rows", nargs="+", default=[], metavar="ROW", help="these rows alone")
    parser.add_argument("--workers", type=_positive, help="runs at a time, one thread each; as many as cores if left out")
    parser.add_argument("--page-only", action="store_true", help="write the page of what is there already")


def _tables(args: argparse.Namespace, console: Console) -> None:
    from agents.tables import QUICK, Plan, jobs, results, run_tables
    from agents.tables_page import write_page

    folder, plan = Path(args.out), QUICK if args.quick else Plan()
    if not args.page_only:
        run_tables(folder / "runs", plan, console, args.rows, args.workers, args.extras or args.quick)
    found = results(jobs(folder / "runs", plan))
    if not found:
        raise ValueError(f"expected finished runs in {folder / 'runs'}, found none; run without --page-only first")
    console.print(f"page  {write_page(folder, found, plan)}", highlight=False, soft_wrap=True)


def _list(args: argparse.Namespace, console: Console) -> None:
    from agents.config import IMAGE_OBJECTIVES, config_names
    from agents.flow import KERNELS
    from agents.guidance import RENORMS
    from agents.models import MODELS
    from agents.trainer import import_modules
    from rewards import REWARDS
    from unigrpo_env.variants import VARIANTS

    import_modules(args.imports)
    from importlib.resources import files

    def first_line(thing: object) -> str:
        return ((thing.__doc__ or "").strip().splitlines() or [""])[0]

    methods = {name: (files("agents.configs") / f"{name}.yaml").read_text().splitlines()[0].lstrip("# ") for name in config_names()}
    penalties = {
        "velocity_weight": "squared distance of velocities to the reference, equation (8)",
        "latent_kl_weight": "exact KL of the stochastic steps to the reference",
        "text_kl_weight": "KL of the tokens to the reference",
    }
    for title, entries in (
        ("configs (--config)", methods),
        ("image objectives (algorithm.image_objective)", IMAGE_OBJECTIVES),
        ("kernels (algorithm.kernel)", {name: first_line(kernel) for name, kernel in KERNELS.items()}),
        ("penalties (algorithm.*)", penalties),
        ("guidance renormalisations (guidance.renorm)", RENORMS),
        ("variants (env.variant)", {name: first_line(VARIANTS[name]) for name in VARIANTS}),
        ("rewards (env.reward)", {name: first_line(REWARDS[name]) for name in REWARDS}),
    ):
        console.print(f"[bold]{title}[/bold]")
        for name, text in entries.items():
            console.print(f"  {name:<22} {text}", highlight=False, soft_wrap=True, markup=False)
    console.print(f"[bold]models[/bold]\n  {'  '.join(MODELS)}", highlight=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 2 for what the user can mend."""
    parser = _parser()
    args, more = parser.parse_known_args(argv)
    # Settings may stand on both sides of an option; argparse takes only the first run of them.
    if more and not (hasattr(args, "overrides") and all("=" in word and not word.startswith("-") for word in more)):
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    if more:
        args.overrides = [*args.overrides, *more]
    console = Console()
    try:
        {"train": _train, "evaluate": _evaluate, "sample": _sample, "pretrain": _pretrain, "tables": _tables, "list": _list}[args.command](
            args, console
        )
    except (ValueError, TypeError, ImportError, OSError, FloatingPointError, UnscoredError) as error:
        if getattr(error, "__notes__", None):
            raise  # a reward's own error, with its traceback
        Console(stderr=True).print(f"[red]error:[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        Console(stderr=True).print("stopped; a run that has saved a checkpoint goes on with: unigrpo train --resume FOLDER")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""`unigrpo sample`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agents.cli.options import make_parser, positive_int

if TYPE_CHECKING:
    from rich.console import Console

    from rewards import EpisodeBatch
    from unigrpo_env.processor import Processor
    from unigrpo_env.tasks.task import Prompt
    from unigrpo_env.variants.variant import Variant


def main(argv: Sequence[str]) -> None:
    """Let a model play a prompt, print its thoughts and save its images.

    Args:
        argv: the words after `unigrpo sample`.

    Raises:
        ValueError: an unknown model or variant, or a prompt that the variant does not take.
    """
    args = _parser().parse_args(argv)
    # Imported here, so that `--help` does not wait for torch.
    from rich.console import Console

    from agents.evaluation.accuracy import evaluate
    from agents.models.registry import load_model
    from agents.training.build import import_modules
    from unigrpo_env.rendering import read_image
    from unigrpo_env.tasks.task import Prompt

    import_modules(args.imports)
    console = Console()
    model = load_model(args.model)
    # Each is [3, height, width] float32 in [0, 1].
    sources = tuple(read_image(path) for path in args.source)
    prompt = Prompt(args.prompt, sources=sources, turns=tuple(args.turn))
    variant = _make_variant(args.variant, model.processor, prompt, dict(args.set))
    _warn_of_unknown_words(variant.processor, args.prompt, console)
    # The same prompt several times: episode i has the seed `args.seed + i`.
    found = evaluate(
        model,
        variant,
        [prompt] * args.count,
        temperature=args.temperature,
        image_steps=args.steps,
        seed=args.seed,
    )
    for thoughts in found.thoughts:
        _print_thoughts(thoughts, args.turn, console)
    _save(found, Path(args.out))
    console.print(f"[bold]{args.out}[/bold]", highlight=False, soft_wrap=True)


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("sample")
    parser.add_argument("prompt", help="what to draw, such as 'two red circles'")
    parser.add_argument("--model", default="tiny", help="known model or folder [tiny]")
    parser.add_argument(
        "--variant", default="text_to_image", help="registered variant [text_to_image]"
    )
    parser.add_argument(
        "--source",
        action="append",
        default=[],
        metavar="IMAGE",
        help="image that the model reads first, in variants that take some (repeatable)",
    )
    parser.add_argument(
        "--turn",
        action="append",
        default=[],
        metavar="TEXT",
        help="what the user says after an image, in variants where they speak (repeatable)",
    )
    parser.add_argument(
        "--set",
        action="append",
        type=_setting,
        default=[],
        metavar="NAME=NUMBER",
        help="setting of the variant, such as text_budget=64 (repeatable)",
    )
    parser.add_argument(
        "--steps", type=positive_int, help="denoising steps; the variant's own if left out"
    )
    parser.add_argument(
        "--temperature", type=float, default=1.0, help="of the text; 0 for greedy [1.0]"
    )
    parser.add_argument("--seed", type=int, default=0, help="of text and image [0]")
    parser.add_argument(
        "--count", type=positive_int, default=1, help="episodes, from this seed on [1]"
    )
    parser.add_argument(
        "--out", default="outputs/sample.png", help="file of the image [outputs/sample.png]"
    )
    return parser


def _setting(text: str) -> tuple[str, int]:
    """`name=number` as a pair."""
    name, _, value = text.partition("=")
    if not value.isdecimal():
        raise argparse.ArgumentTypeError(f"expected NAME=NUMBER, got {text}")
    return name, int(value)


def _make_variant(
    name: str, processor: Processor, prompt: Prompt, settings: dict[str, int]
) -> Variant:
    """Make the variant with its own task, or with the prompt alone where that does not fit."""
    from unigrpo_env.variants.variant import make_variant

    parts: dict[str, Any] = {"processor": processor, "reward": _no_score, **settings}
    # Its own task comes first, because the user of a task may reply to an image.
    try:
        return make_variant(name, **parts)
    except ValueError:
        # The scenarios' own tasks are made for the shapes world. Any other error is raised again
        # below.
        return make_variant(name, task=_GivenPrompt(prompt), **parts)


class _GivenPrompt:
    """A task of one prompt."""

    def __init__(self, prompt: Prompt) -> None:
        self._prompt = prompt

    def prompts(self, split: str, count: int, seed: int) -> list[Prompt]:
        """See `Task`."""
        return [self._prompt] * count


def _no_score(episodes: EpisodeBatch) -> list[float]:
    """NaN for each episode: no task knows what a free prompt asks for, so nothing is scored."""
    return [float("nan")] * len(episodes)


def _warn_of_unknown_words(processor: Any, prompt: str, console: Console) -> None:
    """Name the words that the model has never seen, where its processor can tell."""
    # The method is optional for a processor.
    if not hasattr(processor, "unknown_words"):
        return
    words = processor.unknown_words(prompt)
    if words:
        text = f"words that the model has never seen: {', '.join(words)}"
        console.print(text, style="yellow", highlight=False, markup=False)


def _print_thoughts(thoughts: Sequence[str], turns: Sequence[str], console: Console) -> None:
    """Print each thought of an episode in a line, after the user's turn that came before it."""
    from rich.markup import escape

    for number, thought in enumerate(thoughts):
        line = escape(thought or "(no thought)")
        # The first text has no turn before it: the prompt stands there.
        if 0 < number <= len(turns):
            line = f"[bold]{escape(turns[number - 1])}[/bold]  {line}"
        console.print(line, highlight=False)


def _save(found: Any, path: Path) -> None:
    """Save a single image as it is, and anything more as a sheet with the thoughts."""
    from agents.reporting.contact_sheet import contact_sheet, panels
    from unigrpo_env.rendering import enlarge

    path.parent.mkdir(parents=True, exist_ok=True)
    if len(found.prompts) == 1 and len(panels(found, 0)) == 1:
        # [3, height, width], its longer side enlarged to 384 pixels.
        enlarge(found.images[0], 384).save(path)
    else:
        contact_sheet(found).save(path)

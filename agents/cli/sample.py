"""`unigrpo sample`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agents.cli.options import make_parser, positive_int

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor

    from agents.models.base import UnifiedModel
    from agents.policy.guidance import Guidance
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
    from agents.training.build import import_modules
    from rewards.image_bytes import read_image
    from unigrpo_env.tasks.task import Prompt

    import_modules(args.imports)
    console = Console()
    # Each is [3, height, width] float32 in [0, 1].
    sources = tuple(read_image(path) for path in args.source)
    model = _load(args, sources)
    prompt = Prompt(args.prompt, sources=sources, turns=tuple(args.turn))
    name = args.variant or ("edit" if sources else "text_to_image")
    variant = _make_variant(name, model.processor, prompt, _scenario_settings(args))
    _warn_of_unknown_words(variant.processor, args.prompt, console)
    # The same prompt several times: episode i has the seed `args.seed + i`.
    found = evaluate(
        model,
        variant,
        [prompt] * args.count,
        temperature=args.temperature,
        image_steps=args.steps,
        seed=args.seed,
        guidance=_guidance(args),
        device=args.device,
    )
    for thoughts in found.thoughts:
        _print_thoughts(thoughts, args.turn, console)
    for path in _save(found, Path(args.out)):
        console.print(f"[bold]{path}[/bold]", highlight=False, soft_wrap=True)


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("sample")
    parser.add_argument("prompt", help="what to draw, such as 'two red circles'")
    parser.add_argument(
        "--variant", help="registered variant [text_to_image, or edit where a source is given]"
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
    _add_sampling_options(parser)
    _add_model_options(parser)
    _add_guidance_options(parser)
    return parser


def _add_sampling_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--think",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="whether a thought comes before each image",
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


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--model", help="known model or folder [tiny]")
    group.add_argument(
        "--painter",
        metavar="ID_OR_FOLDER",
        help="pipeline of diffusers that draws, in place of --model; with --model the place to"
        " which that of a saved model was moved",
    )
    group.add_argument(
        "--thinker",
        metavar="ID_OR_FOLDER",
        help="language model that writes for it; likewise [the text encoder of the painter]",
    )
    group.add_argument("--device", default="cpu", help="cpu, cuda, ... [cpu]")
    group.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="of the weights [the model's own]"
    )
    for side in ("height", "width"):
        group.add_argument(
            f"--{side}",
            type=positive_int,
            metavar="PIXELS",
            help="of the image, where the model draws several sizes [that of the first source, or"
            " the model's largest]",
        )


def _add_guidance_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("classifier-free guidance")
    group.add_argument("--guidance", type=float, default=1.0, metavar="SCALE", help="1: off [1]")
    group.add_argument(
        "--image-guidance",
        type=float,
        default=1.0,
        metavar="SCALE",
        help="away from what the words alone would give; 1: off [1]",
    )
    group.add_argument(
        "--guidance-low",
        type=float,
        default=0.0,
        metavar="T",
        help="guidance acts at flow times above this [0]",
    )
    group.add_argument(
        "--renorm",
        default="global",
        help="bound on the norm: none, global, channel or text_channel [global]",
    )


def _load(args: argparse.Namespace, sources: Sequence[Tensor]) -> UnifiedModel[Any]:
    """The model, on its device and in its image size."""
    import torch

    from agents.models.registry import load_model

    options: dict[str, Any] = {"device": args.device, "height": args.height, "width": args.width}
    options |= {"thinker": args.thinker, "painter": args.painter}
    if args.dtype:
        options["dtype"] = getattr(torch, args.dtype)
    parts = args.thinker or args.painter
    name = args.model or ("thinker_painter" if parts else "tiny")
    model: Any = load_model(name, **options)
    given = args.height or args.width
    if sources and not given and hasattr(model.processor, "source_size"):
        # What is drawn has the size of what is edited.
        height, width = model.processor.source_size(*sources[0].shape[1:])
        model.set_image_size(height, width)
    return model


def _scenario_settings(args: argparse.Namespace) -> dict[str, int]:
    settings = dict(args.set)
    if not args.think:
        settings["text_budget"] = 0
    if len(args.source) > 1:
        settings.setdefault("source_images", len(args.source))
    return settings


def _guidance(args: argparse.Namespace) -> Guidance | None:
    from agents.policy.guidance import Guidance

    if args.guidance <= 1:
        return None
    return Guidance(args.guidance, args.image_guidance, low=args.guidance_low, renorm=args.renorm)


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


def _save(found: Any, path: Path) -> list[Path]:
    """Save a single image as it is, and anything more as a sheet with the thoughts.

    A sheet shows images small; those that are larger are also saved one by one beside it.

    Returns:
        The files; none if nothing was drawn.
    """
    from agents.reporting.contact_sheet import contact_sheet, panels
    from unigrpo_env.rendering import enlarge

    if not any(len(images) for images in found.all_images):
        return []
    path.parent.mkdir(parents=True, exist_ok=True)
    # [3, height, width] each: a small image is enlarged, a large one stays as it is.
    side = max(384, *found.images.shape[2:])
    if len(found.prompts) == 1 and len(panels(found, 0)) == 1:
        enlarge(found.images[0], side).save(path)
        return [path]
    contact_sheet(found).save(path)
    files = [path]
    if side > 384:
        for episode, images in enumerate(found.all_images, 1):
            for number, image in enumerate(images, 1):
                files.append(path.with_stem(f"{path.stem}_{episode}_{number}"))
                enlarge(image, side).save(files[-1])
    return files

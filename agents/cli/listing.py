"""`unigrpo list`.

The module is not named `list`, because that would hide Python's own `list` in `agents.cli`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence

from agents.cli.options import make_parser

PENALTIES = {
    "velocity_weight": "squared distance of velocities to the reference, equation (8)",
    "latent_kl_weight": "exact KL of the stochastic steps to the reference",
    "text_kl_weight": "KL of the tokens to the reference",
}


def main(argv: Sequence[str]) -> None:
    """Print every name that a setting takes, with one line about it.

    Args:
        argv: the words after `unigrpo list`.

    Raises:
        ImportError: a module of `--import` cannot be imported.
    """
    args = make_parser("list").parse_args(argv)
    # Imported here, so that `--help` does not wait for torch.
    from rich.console import Console

    from agents.training.build import import_modules

    # First, because these modules add entries to the registries below.
    import_modules(args.imports)
    console = Console()
    for title, entries in sections():
        console.print(f"[bold]{title}[/bold]", highlight=False)
        for name, text in entries.items():
            # An entry without a docstring has no text.
            line = f"  {name:<22} {text}".rstrip()
            console.print(line, highlight=False, soft_wrap=True, markup=False)


def sections() -> Iterator[tuple[str, Mapping[str, str]]]:
    """Give each title with its names and their descriptions."""
    from agents.config.loading import GROUPS, group_options
    from agents.config.schema import IMAGE_OBJECTIVES
    from agents.models.registry import MODELS
    from agents.policy.guidance import RENORMS
    from agents.policy.sde import KERNELS
    from rewards import REWARDS
    from unigrpo_env.processor import PROCESSORS
    from unigrpo_env.variants.variant import VARIANTS

    kernels = {name: _summary(step) for name, step in KERNELS.items()}
    for group in GROUPS:
        yield f"settings ({group}=)", group_options(group)
    yield "image objectives (algorithm.image_objective)", IMAGE_OBJECTIVES
    yield "kernels (algorithm.kernel)", kernels
    yield "penalties (algorithm.*)", PENALTIES
    yield "guidance renormalisations (guidance.renorm)", RENORMS
    yield "variants (env.variant)", VARIANTS.describe()
    yield "processors (env.processor)", PROCESSORS.describe()
    yield "rewards (env.reward)", REWARDS.describe()
    yield "models (model.name)", MODELS.describe()


def _summary(thing: object) -> str:
    """The first line of a docstring."""
    return (inspect.getdoc(thing) or "").partition("\n")[0]

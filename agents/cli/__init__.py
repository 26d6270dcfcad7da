"""The command line, `unigrpo COMMAND`: see `COMMANDS`.

Each command is a module with `main(argv)`, imported only when it is called, so that
`unigrpo --help` needs neither torch nor hydra.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from agents.cli.errors import report_errors

COMMANDS = {
    "train": ("train", "Train a model by UniGRPO or by another method, and write a report."),
    "evaluate": ("evaluate", "Held-out accuracy of a model, sampled and greedy."),
    "benchmark": ("benchmark", "Draw a list of prompts several times and score every image."),
    "sample": ("sample", "Let a model think about a prompt and draw it."),
    "merge": ("merge", "Add trained adapters to the weights of their model, and write it whole."),
    "serve-reward": ("serve_reward", "Score over HTTP for runs on other machines."),
    "pretrain": ("pretrain", "Train the weights that come with the library, from nothing."),
    "tables": ("tables", "The paper's comparisons and the other scenarios, on one page."),
    "list": ("listing", "Methods, kernels, objectives, variants, rewards and models."),
}
"""Each command with its module in `agents.cli` and its one line of help."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the words after `unigrpo`; those of the process if left out.

    Returns:
        The exit status: 0; 2 for an error that the user can mend; 130 after Ctrl-C.
    """
    if argv is None:
        argv = sys.argv[1:]
    words = list(argv)
    # Only the first word is read here; the command parses the others.
    command = _parser().parse_args(words[:1]).command
    name, _ = COMMANDS[command]
    # Inside the block, so that an import that fails is reported like any other error.
    with report_errors() as outcome:
        importlib.import_module(f"agents.cli.{name}").main(words[1:])
    return outcome.status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "unigrpo",
        description="Train, by reinforcement learning, models that write and draw in turns.",
        epilog="unigrpo COMMAND --help explains a command.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command, (_, text) in COMMANDS.items():
        commands.add_parser(command, help=text, add_help=False)
    return parser

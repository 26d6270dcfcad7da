"""`unigrpo tables`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from agents.cli.options import make_parser, positive_int


def main(argv: Sequence[str]) -> None:
    """Run the experiments that are not done yet, and write the page of all results.

    Args:
        argv: the words after `unigrpo tables`.

    Raises:
        ValueError: an unknown row, or no results.
    """
    args = _parser().parse_args(argv)
    # Imported here, so that `--help` does not wait for torch.
    from rich.console import Console

    from agents.experiments.paper_page import write_page
    from agents.experiments.paper_tables import QUICK, Budget, jobs
    from agents.experiments.runner import results, run_tables
    from agents.training.build import import_modules

    import_modules(args.imports)
    console = Console()
    folder = Path(args.out)
    runs = folder / "runs"
    budget = QUICK if args.quick else Budget()
    if not args.page_only:
        # A quick check covers every experiment.
        extras = args.extras or args.quick
        run_tables(runs, budget, console, args.rows, args.workers, extras)
    # All runs that are done, and not only those that were asked for now.
    found = results(jobs(runs, budget))
    if not found:
        raise ValueError(
            f"expected finished runs in {runs}, found none; run without --page-only first"
        )
    page = write_page(folder, found, budget)
    console.print(f"page  {page}", highlight=False, soft_wrap=True)


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("tables")
    parser.add_argument(
        "--out",
        default="outputs/tables",
        help="folder of runs and page; finished runs are kept [outputs/tables]",
    )
    parser.add_argument(
        "--quick", action="store_true", help="two iterations of every row, to see that they run"
    )
    parser.add_argument(
        "--extras",
        action="store_true",
        help="also the studies of kernels, windows and text, which are not in the paper",
    )
    parser.add_argument(
        "--rows", nargs="+", default=[], metavar="ROW", help="only these experiments"
    )
    parser.add_argument(
        "--workers",
        type=positive_int,
        help="runs at a time, one thread each; as many as cores if left out",
    )
    parser.add_argument(
        "--page-only", action="store_true", help="write the page of the runs that are finished"
    )
    return parser

"""`unigrpo merge`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from agents.cli.options import make_parser


def main(argv: Sequence[str]) -> None:
    """Add trained adapters to the weights of their model, and write it whole.

    Args:
        argv: the words after `unigrpo merge`.

    Raises:
        ValueError: there are no adapters, their model is not found, or the folder is in use.
    """
    parser = make_parser("merge")
    parser.add_argument(
        "adapters",
        metavar="RUN_OR_FOLDER",
        help="a run (its last weights), a checkpoint, or a folder of adapters",
    )
    parser.add_argument("out", metavar="OUT", help="new folder of the model, for model.name=OUT")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of the merged weights; bfloat16 rounds what the adapters add [the model's own]",
    )
    args = parser.parse_args(argv)
    # Imported here, so that `--help` does not wait for torch.
    import torch
    from rich.console import Console

    from agents.models.lora import base_tensors, merge_adapters
    from agents.models.registry import load_model
    from agents.training.build import import_modules

    import_modules(args.imports)
    console = Console()
    out = Path(args.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(
            f"expected a new or an empty folder at {out}, got one in use; give another"
        )
    folder = find_adapters(Path(args.adapters))
    dtype = getattr(torch, args.dtype) if args.dtype else None
    model = load_model(str(folder), dtype=dtype)
    merge_adapters(model)
    model.write_weights(out, base_tensors(model))
    for name, place in (("adapters", folder), ("model", out)):
        console.print(f"{name:>8}  {place}", highlight=False, soft_wrap=True)


def find_adapters(folder: Path) -> Path:
    """The folder of adapters that a run, a checkpoint, or such a folder stands for.

    Args:
        folder: of any of them.

    Raises:
        ValueError: there are no adapters in it.
    """
    from agents.models.registry import holds_adapters
    from agents.training.checkpoint import MODEL, checkpoints

    # A run writes its last weights where a checkpoint has them. One that was stopped has only
    # checkpoints; the newest comes first here.
    places = [folder, folder / MODEL]
    for checkpoint in reversed(checkpoints(folder / "checkpoints") or checkpoints(folder)):
        places.append(checkpoint / MODEL)
    for place in places:
        if holds_adapters(place):
            return place
    raise ValueError(
        f"expected a run, a checkpoint or a folder with adapters at {folder}, found none; "
        "whole weights need no merging: use their folder as model.name"
    )

"""`unigrpo serve-reward`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from agents.cli.options import make_parser, positive_int

LOOPBACK = ("127.0.0.1", "::1", "localhost")
"""Addresses that no other machine reaches."""

EXAMPLE = """on the machine of the scorers:
  unigrpo serve-reward "pickscore(device='cuda:1') + ocr" --host 0.0.0.0 --token-env TOKEN
where training runs:
  unigrpo train env.reward=remote env.reward_options.remote.url=http://gpu-box:8000 \\
    env.reward_options.remote.token_variable=TOKEN
"""


def main(argv: Sequence[str]) -> None:
    """Serve rewards over HTTP until Ctrl-C.

    Args:
        argv: the words after `unigrpo serve-reward`.

    Raises:
        ValueError: an unknown reward or option; or other machines could ask without a token.
        ImportError: a module of `--import` or a package is missing.
    """
    args = _parser().parse_args(argv)
    token = _token(args.token_env, args.host)
    # Imported here, so that `--help` does not wait for torch.
    from rich.console import Console

    from rewards.service.server import SUM, make_app, serve, served_rewards

    # This brings all models with it, and a server needs them only if a module of the user does.
    if args.imports:
        from agents.training.build import import_modules

        import_modules(args.imports)
    rewards = served_rewards(args.rewards)
    app = make_app(rewards, token=token, body_bytes=args.max_megabytes << 20, queue=args.queue)
    console = Console()
    # What is missing must show now, and not to the first client.
    with console.status("loading"):
        rewards[SUM].prepare()
    console.print(f"rewards: {', '.join(rewards)}", highlight=False, markup=False)
    serve(app, args.host, args.port)


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("serve-reward", epilog=EXAMPLE)
    parser.add_argument(
        "rewards",
        metavar="REWARDS",
        help="a reward or a weighted sum; each is served by its name, the whole sum by 'sum'",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on [127.0.0.1]")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on [8000]")
    parser.add_argument(
        "--token-env",
        metavar="NAME",
        help="environment variable with the token that clients must send",
    )
    parser.add_argument(
        "--max-megabytes",
        type=positive_int,
        default=256,
        metavar="N",
        help="largest body of a request [256]",
    )
    parser.add_argument(
        "--queue",
        type=positive_int,
        default=8,
        metavar="N",
        help="requests that are read, wait or are scored at once; others are sent away [8]",
    )
    return parser


def _token(variable: str | None, host: str) -> str:
    """The token that clients must send; empty for none."""
    if variable is None:
        if host not in LOOPBACK:
            raise ValueError(
                f"expected --token-env beside --host {host}, because other machines could ask this "
                "server; put a secret into an environment variable and give its name"
            )
        return ""
    token = os.environ.get(variable, "").strip()
    if not token:
        raise ValueError(
            f"expected a token in the environment variable {variable}, got none; set it, or leave "
            "--token-env out"
        )
    return token

"""`unigrpo train` and `unigrpo evaluate` as hydra applications."""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from agents.config.loading import (
    CONFIG_MODULE,
    GROUPS,
    HYDRA_VERSION,
    check_names,
    group_options,
    settings,
)
from agents.config.messages import readable_errors
from agents.config.schema import Config

HYDRA_HELP = """\
hydra's own options, of which these are the most useful:
  --multirun, -m             a run for each combination: trainer.seed=0,1,2 algorithm=unigrpo,fpo
  --config-dir FOLDER        more YAML files: FOLDER/algorithm/mine.yaml is algorithm=mine
  --config-name NAME         FOLDER/NAME.yaml in place of config.yaml; begin it with
                             defaults: [config, _self_]
  --cfg job                  print the composed settings and stop
  hydra.sweep.subdir=...     any setting of hydra itself; --hydra-help says more
"""


def settings_help() -> str:
    """Write the end of `--help`: groups with their options, hydra's options, every setting."""
    lines = ["groups of settings (group=option; unigrpo list describes them):"]
    for group in GROUPS:
        options = ", ".join(group_options(group))
        lines += textwrap.wrap(f"  {group:<10} {options}", 100, subsequent_indent=13 * " ")
    lines += ["", HYDRA_HELP, "settings (section.key=value):"]
    defaults = OmegaConf.structured(Config)
    for name, entry in settings():
        default = OmegaConf.select(defaults, name)
        # None stands for "not set", which the help text explains.
        shown = "" if default is None else default
        lines.append(f"  {name:<34} {entry.metadata['help']} [{shown}]")
    return "\n".join(lines)


def launch(command: str, words: Sequence[str], job: Callable[[Config], float | None]) -> None:
    """Let hydra compose settings, once or for each job of a sweep, and call `job` with them.

    Args:
        command: name of the command, for messages.
        words: overrides and options of hydra.
        job: does the work; what it returns is what a sweeper of hydra optimises.

    Raises:
        ValueError: unknown names or values that do not fit.
        Exception: whatever `job` raised.
    """
    failures: list[Exception] = []

    def _run_job(composed: DictConfig) -> float | None:
        # A plain Config: the job may change it, and errors name the setting.
        values = OmegaConf.to_container(composed, resolve=True)
        return job(Config.from_dict(cast(dict, values)))

    def _run_or_keep_error(composed: DictConfig) -> float | None:
        # A launcher may call this in another process, where `failures` would be lost; so an error
        # of a sweep is left to hydra.
        if in_sweep():
            print_job()
            return _run_job(composed)
        # Hydra adds a message of its own to that of a job that raises. In a single run the error
        # alone is clearer, so it is raised again after hydra has ended.
        try:
            return _run_job(composed)
        except Exception as error:
            failures.append(error)
            # Hydra has made the folder before it called the job.
            remove_if_empty(job_folder())
            return None

    # Decorated here and not at module level, because the job is known only now.
    application = hydra.main(
        config_path=f"pkg://{CONFIG_MODULE}", config_name="config", version_base=HYDRA_VERSION
    )
    with _words_of_process(command, _checked_words(command, words)), readable_errors():
        application(_run_or_keep_error)()
    if failures:
        raise failures[0]


def in_sweep() -> bool:
    """Tell whether the running job is one of several."""
    return HydraConfig.get().mode == RunMode.MULTIRUN


def job_folder() -> Path:
    """Find the folder that hydra has made for the running job."""
    settings_of_hydra = HydraConfig.get()
    if in_sweep():
        return Path(settings_of_hydra.sweep.dir) / settings_of_hydra.sweep.subdir
    return Path(settings_of_hydra.run.dir)


def print_job() -> None:
    """Print which job of a sweep begins."""
    from rich.console import Console

    job = HydraConfig.get().job
    text = f"job {job.num}  {job.override_dirname}"
    Console().print(text, highlight=False, soft_wrap=True, markup=False)


def remove_if_empty(folder: Path) -> None:
    """Remove the folder of a run that has failed before it wrote anything.

    Args:
        folder: the folder; one with files in it stays.
    """
    # `evaluate` runs in the current folder, which is never removed.
    if folder.is_dir() and not any(folder.iterdir()) and not folder.samefile(Path.cwd()):
        folder.rmdir()


def _checked_words(command: str, words: Sequence[str]) -> list[str]:
    """Check the names of all settings; returns the words with the overrides first.

    Hydra takes overrides only in one block, so they may not stand on both sides of an option.
    """
    parser = get_args_parser()
    parser.prog = f"unigrpo {command}"
    options = parser.parse_intermixed_args(words)
    # Only hydra reads the user's own files, and they may define further groups.
    brings_own_files = bool(options.config_dir or options.config_name or options.config_path)
    check_names(options.overrides, more_groups=brings_own_files)
    # What is left after the overrides: options and their values, in their order.
    others = list(words)
    for override in options.overrides:
        others.remove(override)
    return [*options.overrides, *others]


@contextmanager
def _words_of_process(command: str, words: Sequence[str]) -> Iterator[None]:
    """Set the words of the process, which hydra reads, for the time of the block."""
    # Without this variable hydra prints an error and exits instead of raising it.
    argv = sys.argv
    full_error = os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = [f"unigrpo {command}", *words]
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        sys.argv = argv
        if full_error is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = full_error

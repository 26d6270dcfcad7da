"""Settings from YAML groups and from the words of a command line."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, cast, get_type_hints

from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from agents.config.messages import did_you_mean, readable_errors
from agents.config.schema import Config

CONFIG_MODULE = "agents.config"
HYDRA_VERSION = "1.3"
GROUPS = ("algorithm", "env", "model")
"""Groups of settings. Each option is a YAML file in the folder of that name."""

SETTINGS_HEADER = """\
# The settings of this run. They start another run by
# unigrpo train --config-dir {folder} --config-name {name} output.folder=...
"""


def _schema() -> DictConfig:
    """All settings by type, for hydra."""
    schema = OmegaConf.structured(Config)
    # Hydra refuses keys that are not there yet; those of a free mapping come from the user.
    for name in free_mappings():
        OmegaConf.set_struct(OmegaConf.select(schema, name), False)
    return schema


def load_config(overrides: Sequence[str] = ()) -> Config:
    """Compose the settings of a run.

    Args:
        overrides: `group=option` and `section.key=value`, in hydra's grammar, such as
            `["algorithm=flow_grpo", "env=edit", "env.text_budget=0"]`.

    Raises:
        ValueError: a setting, a group or an option is unknown (the message proposes names that are
            spelled alike), or a value has the wrong type or is out of its bounds.
    """
    # Before hydra, whose own message about an unknown name proposes no other.
    check_names(overrides)
    with readable_errors(), initialize_config_module(CONFIG_MODULE, version_base=HYDRA_VERSION):
        composed = compose("config", list(overrides))
        return cast(Config, OmegaConf.to_object(composed))


def override_config(config: Config, overrides: Sequence[str]) -> Config:
    """Copy settings and change some of them.

    Args:
        config: the settings, such as those of a run that is resumed; they stay as they are.
        overrides: `section.key=value`, in hydra's grammar.

    Raises:
        ValueError: as for `load_config`; a group is refused too.
    """
    check_names(overrides, groups=())
    # A structured config checks the type of each value; `to_object` checks bounds and choices.
    changed = OmegaConf.structured(config)
    with readable_errors():
        for override in OverridesParser.create().parse_overrides(list(overrides)):
            # A sweep needs hydra's launcher; here there is one run.
            if override.is_sweep_override():
                raise ValueError(f"expected one value for each setting, got {override.input_line}")
            OmegaConf.update(changed, override.key_or_group, override.value())
        return cast(Config, OmegaConf.to_object(changed))


def save_settings(config: Config, path: Path) -> Path:
    """Write settings as YAML that hydra can read again.

    `unigrpo train --config-dir FOLDER --config-name NAME` starts a run from `FOLDER/NAME.yaml`.

    Args:
        config: the settings.
        path: the file, which ends in `.yaml`.

    Returns:
        The path of the file.
    """
    # The groups are left out: every value is in the file, and a choice would change none of them.
    # `run_folder` tells hydra where to put the next run.
    header = SETTINGS_HEADER.format(folder=path.parent, name=path.stem)
    defaults = {"defaults": ["schema", "run_folder", "_self_"]}
    path.write_text(header + OmegaConf.to_yaml(OmegaConf.create(defaults | config.to_dict())))
    return path


def settings() -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """List every setting, as its dotted name and its dataclass field."""
    yield from _settings_of(Config, "")


def free_mappings() -> list[str]:
    """List the settings whose value is a mapping with keys of the user's choice."""
    found = []
    for name, entry in settings():
        make_default = entry.default_factory
        if make_default is not dataclasses.MISSING and isinstance(make_default(), dict):
            found.append(name)
    return found


def _settings_of(section: type, prefix: str) -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    # Annotations are text in that module; `get_type_hints` gives the dataclasses.
    kinds = get_type_hints(section)
    for entry in dataclasses.fields(section):
        name = f"{prefix}{entry.name}"
        # A section may hold further sections.
        if dataclasses.is_dataclass(kinds[entry.name]):
            yield from _settings_of(kinds[entry.name], f"{name}.")
        else:
            yield name, entry


def group_options(group: str) -> dict[str, str]:
    """List the options of a group that come with the library, each with its description.

    Args:
        group: one of `GROUPS`.

    Returns:
        Name to description, which is the first comment of the YAML file, sorted by name.

    Raises:
        ValueError: there is no such group.
    """
    if group not in GROUPS:
        raise ValueError(f"unknown group {group!r}; {did_you_mean(group, GROUPS)}")
    found = {}
    for entry in files(CONFIG_MODULE).joinpath(group).iterdir():
        if entry.name.endswith(".yaml"):
            found[entry.name.removesuffix(".yaml")] = _description(entry.read_text())
    return dict(sorted(found.items()))


def check_names(
    overrides: Sequence[str], groups: Sequence[str] = GROUPS, *, more_groups: bool = False
) -> None:
    """Check that overrides name settings and groups that exist, in a sweep too.

    Args:
        overrides: the words of a command line. Those for hydra itself (`hydra.*`) pass.
        groups: the groups that may be chosen.
        more_groups: whether a folder of the user may hold other groups; hydra checks those.

    Raises:
        ValueError: a name is unknown.
        TypeError: one text instead of a list.
    """
    # A text is a sequence too: each of its letters would be an unknown setting.
    if isinstance(overrides, str):
        raise TypeError(f"expected a list of overrides, got the text {overrides!r}")
    known = [name for name, _ in settings()]
    starts = tuple(f"{name}." for name in free_mappings())
    for override in overrides:
        key, equals, _ = override.partition("=")
        # Hydra's marks: `+key` and `++key` add, `~key` deletes, `group@package` moves.
        key = re.sub(r"@.*", "", key.strip().lstrip("+~"))
        # A setting needs a value; hydra's own settings are checked by hydra.
        is_setting = key in known or key.startswith(starts)
        if (is_setting and equals) or key.startswith(("hydra.", "hydra/")):
            continue
        if key in groups or (more_groups and "." not in key):
            continue
        # A group that exists but may not be chosen here: a saved run has its settings already.
        if key in GROUPS:
            raise ValueError(f"expected single settings (section.key=value), got {override!r}")
        usage = "" if equals else " expected section.key=value or group=option;"
        hint = did_you_mean(key, [*known, *groups])
        # Nothing is alike: a list of all settings would hide the error.
        if hint.startswith("Known"):
            hint = "unigrpo train --help lists all of them"
        raise ValueError(f"unknown setting {key!r};{usage} {hint}")


def _description(text: str) -> str:
    """The first comment of a YAML file, hydra's `# @package` left out."""
    for line in text.splitlines():
        if line.startswith("#") and not line.startswith("# @"):
            return line.removeprefix("#").strip()
    return ""


# `config.yaml` begins its list of defaults with this name, so that values are checked by type.
ConfigStore.instance().store(name="schema", node=_schema())

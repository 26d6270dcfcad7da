"""The settings of a run, and the YAML groups from which hydra composes them.

>>> from agents.config import load_config
>>> load_config(["algorithm=flow_grpo", "env=edit", "trainer.seed=1"]).trainer.seed
1
"""

from agents.config.loading import (
    GROUPS,
    group_options,
    load_config,
    override_config,
    save_settings,
    settings,
)
from agents.config.schema import Config

__all__ = [
    "GROUPS",
    "Config",
    "group_options",
    "load_config",
    "override_config",
    "save_settings",
    "settings",
]

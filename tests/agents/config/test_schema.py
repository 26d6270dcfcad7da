"""The settings as data."""

import json
from pathlib import Path

import pytest

import agents
from agents.config import Config, load_config, settings
from agents.config.schema import KERNELS, RENORMS


def test_settings_survive_json():
    config = load_config(
        ["algorithm=paper", "env.reward=shapes + 0.1 * brevity", "output.imports=[a, b]"]
    )
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_unknown_keys_are_refused():
    with pytest.raises(ValueError, match=r"not the settings of a run: trainer\.unknown: "):
        Config.from_dict({"trainer": {"unknown": 1}})


def test_sections_may_hold_sections():
    names = [name for name, _ in settings()]
    assert "model.lora.image.rank" in names
    assert "model.lora.targets" in names
    assert "model.lora" not in names
    config = load_config(["model.lora.image.rank=4", "model.lora.targets=[q_proj]"])
    assert config.model.lora.image.rank == 4
    assert Config.from_dict(config.to_dict()) == config
    config.model.lora.targets.append("k_proj")
    assert Config().model.lora.targets == []


def test_every_setting_has_help():
    for name, entry in settings():
        assert entry.metadata["help"], name


def test_every_setting_is_read():
    """Each key is named somewhere outside the package that defines it."""
    root = Path(agents.__path__[0])
    files = [path for path in root.rglob("*.py") if path.parent.name != "config"]
    sources = "".join(path.read_text() for path in files)
    for name, entry in settings():
        is_read = f".{entry.name}" in sources or f'"{entry.name}"' in sources
        assert is_read, f"nobody reads {name}"


def test_choices_are_those_of_the_code():
    from agents.policy import guidance, sde

    assert (*sde.KERNELS, "ode") == KERNELS
    assert tuple(guidance.RENORMS) == RENORMS


def test_lists_are_not_shared():
    first = Config()
    first.output.imports.append("a")
    assert Config().output.imports == []

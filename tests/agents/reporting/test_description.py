"""What a run is called, and which of its settings are its own."""

import pytest

from agents.config.loading import load_config
from agents.reporting.description import algorithm_name, changed_settings, describe
from unigrpo_env.variants.variant import make_variant


@pytest.mark.parametrize(
    ("algorithm", "name"),
    [
        ("unigrpo", "UniGRPO"),
        ("text_grpo", "TextGRPO"),
        ("flow_grpo", "FlowGRPO"),
        ("fpo", "FPO"),
        ("unifpo", "UniFPO"),
        ("refl", "ReFL"),
        ("sft", "SFT"),
    ],
)
def test_algorithms_have_the_paper_names(algorithm, name):
    assert algorithm_name(load_config([f"algorithm={algorithm}"]).algorithm) == name


def test_defaults_are_no_changes():
    assert changed_settings(load_config([])) == {}


def test_changed_settings_have_default_and_value():
    changed = changed_settings(
        load_config(
            [
                "env=edit",
                "trainer.seed=3",
                "model.lora.text.rank=2",
                "env.reward_options.ocr.threads=2",
            ]
        )
    )
    assert changed["env.reward_options"] == ({}, {"ocr": {"threads": 2}})
    assert changed["model.lora.text.rank"] == (0, 2)
    assert changed["env.variant"] == ("text_to_image", "edit")
    assert changed["trainer.seed"] == (0, 3)
    assert changed["trainer.iterations"] == (120, 160)


def test_description_names_scenario_and_reward():
    config = load_config(["env=edit"])
    described = describe(config, make_variant("edit"))
    assert described["scenario"] == "edit"
    assert described["reward"] == "edit"
    assert described["learning rates"] == "0.00015 (text), 0.0002 (image)"


def test_reward_may_be_a_callable():
    def redness(episodes):
        return episodes.images[:, 0].mean((1, 2))

    described = describe(load_config([]), make_variant("text_to_image", reward=redness))
    assert described["reward"] == "redness"

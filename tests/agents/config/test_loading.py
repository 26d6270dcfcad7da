"""Settings from groups and overrides."""

import json

import pytest

from agents.config import (
    GROUPS,
    Config,
    group_options,
    load_config,
    override_config,
    save_settings,
)
from agents.config.loading import check_names

pytestmark = pytest.mark.slow

OPTIONS = [(group, option) for group in GROUPS for option in group_options(group)]
NEEDED = {"thinker_painter": ["model.painter=folder"]}
"""What must be given beside an option."""


def test_defaults_are_those_of_the_schema():
    assert load_config() == Config()


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes(group, option):
    config = load_config([f"{group}={option}", *NEEDED.get(option, [])])
    if group == "env":
        assert config.env.variant == option
    if group == "model":
        assert config.model.source == option
    assert group_options(group)[option].endswith(".")


def test_groups_combine():
    overrides = ["algorithm=unifpo", "env=edit", "env.text_budget=0", "trainer.seed=3"]
    config = load_config(overrides)
    assert config.algorithm.image_objective == "fpo"
    assert config.algorithm.text_weight == 1.0
    assert config.algorithm.kernel == "ode"
    assert config.env.variant == "edit"
    assert config.env.text_budget == 0
    assert config.optimizer.text_lr == 1.5e-4
    assert config.trainer.seed == 3


def test_toy_groups_set_what_the_toy_needs():
    config = load_config(["algorithm=mix_grpo", "env=toy", "model=toy"])
    assert config.model.name == "toy"
    assert config.env.time_shift == 1.0
    assert config.env.image_steps > config.algorithm.window_high - 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.iteration=3", "unknown setting 'trainer.iteration'; did you mean 'trainer.iter"),
        ("iterations", "unknown setting 'iterations'; expected section.key=value or group=option"),
        ("+env.foo=1", "unknown setting 'env.foo'"),
        ("model.lora.text.rnk=1", "did you mean 'model.lora.text.rank'"),
        ("model.lora.text=1", "unknown setting 'model.lora.text'"),
        ("algoritm=fpo", "unknown setting 'algoritm'; did you mean 'algorithm'"),
        ("zzz=1", "unigrpo train --help lists all of them"),
        ("algorithm=flow_grp", "unknown algorithm 'flow_grp'; did you mean 'flow_grpo'"),
        ("env=edits", "unknown env 'edits'; did you mean 'edit'"),
        ("trainer.iterations=many", "trainer.iterations: Value 'many' of type 'str'"),
        ("trainer.seed=1,2", "To sweep over it, add --multirun"),
        ("env.prompts=${nothing}", "env.prompts: Interpolation key 'nothing' not found"),
        ("trainer.seed=((", r"cannot read 'trainer.seed=\(\('"),
    ],
)
def test_errors_are_one_line(override, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_config([override])
    assert "\n" not in str(caught.value)


def test_unknown_group():
    with pytest.raises(ValueError, match="unknown group 'algo'"):
        group_options("algo")


def test_names_of_a_sweep_are_checked():
    check_names(["trainer.seed=0,1", "algorithm=unigrpo,fpo", "hydra.sweep.dir=x"])
    with pytest.raises(ValueError, match=r"did you mean 'trainer\.seed'"):
        check_names(["trainer.sed=0,1"])


def test_override_config():
    config = load_config(["env=edit"])
    changed = override_config(
        config, ["trainer.seed=5", "env.reward='edit + 0.1 * brevity'", "output.imports=[a]"]
    )
    assert changed.trainer.seed == 5
    assert changed.env.reward == "edit + 0.1 * brevity"
    assert changed.output.imports == ["a"]
    deeper = override_config(config, ["model.lora.text.rank=3", "model.lora.targets=[q_proj]"])
    assert deeper.model.lora.text.rank == 3
    assert deeper.model.lora.targets == ["q_proj"]
    assert changed.env.variant == "edit"
    assert config.trainer.seed == 0, "the first settings stay as they are"


def test_empty_text_in_both_ways():
    override = "env.thought_reward="
    expected = load_config(["algorithm=process_reward", override])
    assert override_config(load_config(["algorithm=process_reward"]), [override]) == expected
    assert expected.env.thought_reward == ""


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("algorithm=fpo", "expected single settings"),
        ("trainer.iteration=3", "did you mean 'trainer.iterations'"),
        ("trainer.iterations=many", "trainer.iterations: Value 'many'"),
        ("trainer.seed=1,2", "expected one value"),
        ("trainer.group_size=1", "judged against the others"),
    ],
)
def test_override_config_refuses(override, message):
    with pytest.raises(ValueError, match=message):
        override_config(Config(), [override])


def test_saved_settings_name_the_command(tmp_path):
    path = save_settings(load_config(["trainer.seed=3"]), tmp_path / "settings.yaml")
    text = path.read_text()
    assert f"unigrpo train --config-dir {tmp_path} --config-name settings" in text
    assert "seed: 3" in text


def test_one_text_is_no_list():
    with pytest.raises(TypeError, match="expected a list of overrides, got the text 'env=edit'"):
        load_config("env=edit")


REWARD_OPTIONS = [
    "env.reward_options.pickscore.device=cuda:1",
    "env.reward_options.judge_a={use: judge, url: 'http://localhost:8000/v1'}",
    "env.reward_options.judge_a.limits={tries: 2}",
    "env.reward_options.ocr.threads=[1,2]",
]
EXPECTED_OPTIONS = {
    "pickscore": {"device": "cuda:1"},
    "judge_a": {"use": "judge", "url": "http://localhost:8000/v1", "limits": {"tries": 2}},
    "ocr": {"threads": [1, 2]},
}


def test_a_free_mapping_takes_any_key():
    """A word needs no plus in front of it, which hydra asks for otherwise."""
    config = load_config(REWARD_OPTIONS)
    assert config.env.reward_options == EXPECTED_OPTIONS
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert Config().env.reward_options == {}
    words = [f"+{word}" for word in REWARD_OPTIONS]
    assert load_config(words).env.reward_options == EXPECTED_OPTIONS
    assert override_config(Config(), REWARD_OPTIONS).env.reward_options == EXPECTED_OPTIONS
    changed = override_config(config, ["env.reward_options.pickscore.device=cpu"])
    assert changed.env.reward_options["pickscore"] == {"device": "cpu"}
    assert changed.env.reward_options["judge_a"] == EXPECTED_OPTIONS["judge_a"]
    with pytest.raises(ValueError, match=r"unknown setting 'env\.reward_option\.x'"):
        load_config(["env.reward_option.x=1"])
    with pytest.raises(ValueError, match=r"expected section\.key=value"):
        load_config(["env.reward_options.x"])

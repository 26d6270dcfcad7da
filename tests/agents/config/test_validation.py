"""Bounds of the settings, and rules that join several."""

import math

import pytest

from agents.config import Config, load_config
from agents.config.validation import check_setting


@pytest.mark.parametrize(
    ("rules", "good", "bad", "message"),
    [
        ({"at_least": 1}, 1, 0, "expected a.b >= 1, got 0"),
        ({"above": 0}, 0.1, 0.0, "expected a.b > 0, got 0.0"),
        ({"above": 0}, math.inf, math.nan, "expected a.b > 0, got nan"),
        ({"between": (0, 1)}, 0.5, 1.0, "expected 0 < a.b < 1, got 1.0"),
        ({"choices": ("x", "y")}, "x", "z", r"expected a.b to be one of \('x', 'y'\), got 'z'"),
        ({"at_least": 2, "reason": "why"}, 2, 1, "expected a.b >= 2, got 1; why"),
    ],
)
def test_check_setting(rules, good, bad, message):
    check_setting("a.b", good, rules)
    check_setting("a.b", None, rules)
    with pytest.raises(ValueError, match=message):
        check_setting("a.b", bad, rules)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.iterations=-1", "expected trainer.iterations >= 0, got -1"),
        ("trainer.group_size=1", "judged against the others"),
        ("algorithm.ratio=norn", "one of"),
        ("algorithm.noise_level=0.0", "0 < algorithm.noise_level"),
        ("algorithm.temperature=inf", "0 < algorithm.temperature < inf"),
        ("algorithm.image_clip=1.0", "image_clip < 1"),
        ("algorithm.kernel=sde", "'flow_sde', 'flow_cps', 'dance', 'ode'"),
        ("algorithm.image_objective=ppo", "'flow_grpo', 'fpo', 'refl'"),
        ("algorithm.advantage=onward", "'episode', 'reward_to_go'"),
        ("algorithm.old_log_prob=both", "'rollout', 'recompute'"),
        ("algorithm.text_clip_high=-2", "text_clip_high > 0"),
        ("guidance.renorm=all", "'none', 'global'"),
        ("trainer.dynamic_sampling=refill", "'keep', 'drop', 'replace'"),
        ("model.dtype=float16", "'float32', 'bfloat16'"),
        ("model.height=0", "expected model.height >= 1, got 0"),
        ("model.max_rows=0", "expected model.max_rows >= 1"),
        ("model.lora.text.rank=-1", "expected model.lora.text.rank >= 0, got -1"),
        ("model.lora.image.alpha=0.0", "expected model.lora.image.alpha > 0"),
        ("optimizer.ema=1.0", "expected 0 < optimizer.ema < 1"),
        ("evaluation.batch_size=0", "expected evaluation.batch_size >= 1"),
        ("env.reward_options.ocr=3", "env.reward_options.ocr to be a mapping .* got 3; write"),
        ("env.reward_options.ocr=", "env.reward_options.ocr to be a mapping .* got ''"),
    ],
)
def test_values_out_of_bounds(override, message):
    with pytest.raises(ValueError, match=message):
        load_config([override])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer.minibatches=3"], "groups=8 to be a multiple of trainer.minibatches=3"),
        (["trainer.micro_batches=5"], "32 episodes of a minibatch .* of trainer.micro_batches=5"),
        (["evaluation.ema=true"], "expected optimizer.ema beside evaluation.ema=true"),
        (["model.lora.text.alpha=8"], "rank > 0 beside the other settings of model.lora"),
        (["model.lora.targets=[mlp]"], "rank > 0 beside the other settings of model.lora"),
        (["algorithm.kernel=ode"], "stochastic algorithm.kernel"),
        (["algorithm=fpo", "algorithm.latent_kl_weight=0.1"], "no stochastic steps"),
        (["algorithm=flow_cps", "algorithm.noise_level=2"], r"\(0, 1\] for flow_cps"),
        (
            ["model.kind=thinker_painter"],
            "model.painter beside model.kind=thinker_painter",
        ),
        (["model.painter=x"], r"model.kind beside model.painter=x, got none: set model.kind=think"),
        (["model.thinker=x"], r"model.kind beside model.thinker=x, got none: set model.kind=think"),
        (["env.test_prompts=held_out.txt"], "expected env.prompts beside env.test_prompts"),
    ],
)
def test_values_that_do_not_go_together(overrides, message):
    with pytest.raises(ValueError, match=message):
        load_config(overrides)


def test_settings_made_in_python_are_checked():
    settings = Config().trainer
    settings.groups = 0
    with pytest.raises(ValueError, match=r"trainer\.groups >= 1"):
        Config(trainer=settings)


def test_parts_of_an_update_may_be_smaller_than_a_group():
    config = load_config(["trainer.groups=4", "trainer.group_size=6", "trainer.micro_batches=12"])
    assert config.trainer.micro_batches == 12

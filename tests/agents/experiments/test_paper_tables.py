"""The list of experiments and their runs."""

import pytest

from agents.config.loading import load_config
from agents.experiments.paper_tables import (
    EXPERIMENTS,
    EXTRAS,
    QUICK,
    UNSEEN_DEMONSTRATION,
    Budget,
    Job,
    jobs,
)
from agents.training.pretraining import STAGES

pytestmark = pytest.mark.slow


def job_of(key, budget=QUICK, root="x", seed=0):
    return Job(next(entry for entry in EXPERIMENTS if entry.key == key), seed, root, budget)


def test_keys_are_unique():
    assert len({experiment.key for experiment in EXPERIMENTS}) == len(EXPERIMENTS)


@pytest.mark.slow
def test_every_experiment_is_a_config():
    for experiment in EXPERIMENTS:
        load_config([*experiment.config, *experiment.overrides])


def test_main_experiments_come_first():
    main = [e.key for e in EXPERIMENTS if e.seeds == 3 and e.study == "table"]
    assert main == ["sft", "text_grpo", "flow_grpo", "unigrpo"]
    assert main == [experiment.key for experiment in EXPERIMENTS[:4]]


@pytest.mark.slow
def test_methods_have_equal_budgets():
    """Equal iterations and episodes, apart from what starts late or draws several images."""
    budgets = set()
    for job in jobs("x", QUICK):
        experiment = job.experiment
        if experiment.config and experiment.start is None and experiment.study != "rounds":
            trainer = job.config.trainer
            budgets.add((trainer.iterations, trainer.groups, trainer.group_size))
    assert len(budgets) == 1


def test_thinking_follows_the_text_budget():
    assert job_of("sft").experiment.thinks
    assert not job_of("sft_no_thinking").experiment.thinks
    assert not job_of("base_no_thinking").experiment.thinks
    assert job_of("sft_no_thinking").config.env.text_budget == 0


def test_iterations_are_scaled():
    assert job_of("unigrpo", Budget()).config.trainer.iterations == 120
    assert job_of("edit", Budget()).config.trainer.iterations == 160
    assert job_of("edit", Budget(iterations=60)).config.trainer.iterations == 80
    assert job_of("refl_text_grpo", Budget()).config.trainer.iterations == 60
    assert job_of("unigrpo", QUICK).iterations == 2
    assert job_of("shipped").iterations == 0


def test_start_is_a_folder_of_the_base():
    job = job_of("refl_text_grpo", Budget())
    assert job.base == job_of("refl", Budget())
    assert job.config.model.name == "x/refl-0/checkpoints/000060/model"
    assert job_of("sft_no_thinking").config.model.name == "x/base_no_thinking-0/model"
    assert job_of("unigrpo").base is None


def test_bases_have_no_base():
    """The runner knows two waves only."""
    for job in jobs("x", QUICK):
        assert job.base is None or job.base.base is None


def test_unknown_experiments_are_refused():
    with pytest.raises(ValueError, match=r"unknown rows \['nonsense'\]; expected some of: sft"):
        jobs("x", QUICK, ["unigrpo", "nonsense"])


def test_extras_can_be_left_out():
    studies = {job.experiment.study for job in jobs("x", QUICK, extras=False)}
    assert not studies & set(EXTRAS)
    asked = jobs("x", QUICK, ["flow_cps"], extras=False)
    assert [job.experiment.key for job in asked] == ["flow_cps"]


def test_seeds_are_bounded_by_the_budget():
    assert [job.seed for job in jobs("x", Budget(), ["unigrpo"])] == [0, 1, 2]
    assert [job.seed for job in jobs("x", Budget(max_seeds=2), ["unigrpo"])] == [0, 1]


def test_recipe_leaves_out_paths():
    assert job_of("sft").recipe == job_of("sft", root="elsewhere").recipe
    assert job_of("sft").recipe != job_of("sft", seed=1).recipe
    assert job_of("sft").recipe != job_of("sft", Budget()).recipe


def test_recipe_holds_that_of_the_base():
    start = job_of("sft_no_thinking").recipe["start"]
    assert start == [("base_no_thinking", 0), job_of("base_no_thinking").recipe]


def test_demonstrations_without_thoughts_are_unseen():
    for stage in STAGES.values():
        assert stage.first_demonstration + stage.settings.steps <= UNSEEN_DEMONSTRATION

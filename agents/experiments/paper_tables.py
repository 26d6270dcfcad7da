"""The comparisons of the paper on the shipped model: each experiment is settings and seeds.

`agents.experiments.runner` runs them, `agents.experiments.paper_page` writes the page.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from agents.config.loading import load_config
from agents.config.schema import Config
from agents.models.registry import TINY
from agents.storage import WEIGHTS
from agents.training.pretraining import STAGES, SupervisedSettings

MEASURES = "measures.json"
STRIP = "strip.safetensors"
DIVERGED = "diverged.json"
RECIPE = "recipe.json"
"""Files in the folder of a run, beside those of `unigrpo train`."""

PROXY = (
    "env.reward=soft_shapes",
    "evaluation.reward=shapes",
    "optimizer.image_lr=3e-4",
    "optimizer.decay=1.0",
    "evaluation.every=10",
)
"""The study of reward hacking: train on a reward that can be fooled, at a learning rate that does
not fall, and measure with the strict verifier."""

NO_THINKING = "env.text_budget=0"
"""The setting of the experiments without a thought."""

UNSEEN_DEMONSTRATION = max(
    stage.first_demonstration + stage.settings.steps for stage in STAGES.values()
)
"""The number of the first batch of demonstrations that the shipped weights were not trained on."""

FULL_ITERATIONS = 120
"""The number of iterations that `Budget.iterations` is compared with."""


@dataclass(frozen=True)
class Experiment:
    """One method.

    Attributes:
        key: the name of its folders.
        title: its name on the page.
        config: the settings that define the method; none for a model that is only evaluated.
        paper: TA and GenEval in table 1 of the paper, or a word in their place; None where the
            paper has no such row.
        overrides: further settings.
        seeds: the number of runs.
        iterations: the number of iterations in place of the config's; 0 for the config's. Either
            is scaled by the budget's over 120.
        start: key and iteration (of 120, scaled by the budget) of the experiment whose weights the
            run starts from, at the same seed; iteration 0 stands for its last weights.
        supervised_updates: the number of updates on demonstrations without thoughts, with the
            settings of the shipped weights, in place of a config.
        study: the part of the page: table, guidance, penalty, process, rounds, kernels or text.
    """

    key: str
    title: str
    config: tuple[str, ...] = ()
    paper: tuple[float, float] | str | None = None
    overrides: tuple[str, ...] = ()
    seeds: int = 1
    iterations: int = 0
    start: tuple[str, int] | None = None
    supervised_updates: int = 0
    study: str = "table"

    @property
    def thinks(self) -> bool:
        """Whether the model writes a thought before it draws."""
        return NO_THINKING not in (*self.config, *self.overrides)


UNIGRPO = ("algorithm=unigrpo",)


def _without_thinking(algorithm: str, title: str, paper: tuple[float, float]) -> Experiment:
    """An algorithm without a thought, from weights that were trained to draw so."""
    config = (f"algorithm={algorithm}", NO_THINKING)
    start = ("base_no_thinking", 0)
    return Experiment(f"{algorithm}_no_thinking", title, config, paper, start=start)


def _change(key: str, title: str, setting: str, study: str) -> Experiment:
    """UniGRPO with one setting changed."""
    return Experiment(key, title, UNIGRPO, overrides=(setting,), study=study)


EXPERIMENTS: tuple[Experiment, ...] = (
    Experiment("sft", "SFT, thinking", ("algorithm=sft",), (0.7769, 0.82), seeds=3),
    Experiment(
        "text_grpo", "TextGRPO, thinking", ("algorithm=text_grpo",), (0.8078, 0.88), seeds=3
    ),
    Experiment(
        "flow_grpo", "FlowGRPO, thinking", ("algorithm=flow_grpo",), (0.8208, 0.86), seeds=3
    ),
    Experiment("unigrpo", "**UniGRPO**, thinking", UNIGRPO, (0.8381, 0.90), seeds=3),
    Experiment("shipped", "shipped model, thinking", (), (0.7132, 0.79)),
    Experiment("refl", "ReFL, thinking", ("algorithm=refl",), (0.8120, 0.84)),
    Experiment("fpo", "FPO / AWR, thinking", ("algorithm=fpo",), (0.8159, 0.85)),
    Experiment("unifpo", "UniFPO, thinking", ("algorithm=unifpo",), "collapsed"),
    Experiment(
        "refl_text_grpo",
        "ReFL, then TextGRPO, thinking",
        ("algorithm=text_grpo",),
        (0.7987, 0.87),
        iterations=60,
        start=("refl", 60),
    ),
    Experiment(
        "proxy_none", "no penalty", ("algorithm=unigrpo_free",), overrides=PROXY, study="penalty"
    ),
    Experiment(
        "proxy_latent_kl",
        "latent KL",
        ("algorithm=unigrpo_latent_kl",),
        overrides=PROXY,
        study="penalty",
    ),
    Experiment("proxy_velocity", "velocity MSE", UNIGRPO, overrides=PROXY, study="penalty"),
    Experiment(
        "unigrpo_guided", "guidance in training", ("algorithm=unigrpo_guided",), study="guidance"
    ),
    Experiment(
        "process_reward",
        "UniGRPO with a process reward",
        ("algorithm=process_reward",),
        seeds=3,
        study="process",
    ),
    Experiment("edit", "Edit", ("env=edit",), seeds=3, study="rounds"),
    Experiment(
        "edit_process",
        "Edit with a process reward",
        ("env=edit",),
        overrides=("env.thought_reward=0.5 * edit_thought", "algorithm.advantage=reward_to_go"),
        seeds=3,
        study="rounds",
    ),
    Experiment("reflect", "Reflect", ("env=reflect",), seeds=3, study="rounds"),
    Experiment("story", "Story", ("env=story",), seeds=3, study="rounds"),
    Experiment("dialogue", "Dialogue", ("env=dialogue",), seeds=3, study="rounds"),
    Experiment(
        "base_no_thinking",
        "shipped model, trained to draw without a thought",
        (),
        (0.6810, 0.78),
        (NO_THINKING,),
        supervised_updates=1500,
    ),
    _without_thinking("sft", "SFT", (0.7486, 0.83)),
    _without_thinking("flow_grpo", "FlowGRPO", (0.8112, 0.88)),
    _without_thinking("fpo", "FPO / AWR", (0.7893, 0.87)),
    _without_thinking("refl", "ReFL", (0.7786, 0.85)),
    Experiment("flow_cps", "Flow-CPS", ("algorithm=flow_cps",), study="kernels"),
    Experiment(
        "dance_grpo", "DanceGRPO's constant sigma", ("algorithm=dance_grpo",), study="kernels"
    ),
    Experiment("mix_grpo", "MixGRPO's sliding window", ("algorithm=mix_grpo",), study="kernels"),
    Experiment("all_steps", "all steps but the last", ("algorithm=all_steps",), study="kernels"),
    _change("plain_ratio", "plain ratio, equation (4)", "algorithm.ratio=plain", "kernels"),
    _change("token_mean", "mean over all tokens", "algorithm.text_aggregation=token", "text"),
    _change("clip_higher", "upper clip 0.28", "algorithm.text_clip_high=0.28", "text"),
    _change("text_kl", "token KL 0.01", "algorithm.text_kl_weight=0.01", "text"),
    _change("dynamic_sampling", "dynamic sampling (drop)", "trainer.dynamic_sampling=drop", "text"),
    _change("two_epochs", "two passes over a batch", "trainer.epochs=2", "text"),
)
"""All experiments, in the order in which they are run."""

EXTRAS = ("kernels", "text")
"""The studies that are not in the paper; they are run only where they are asked for."""


@dataclass(frozen=True)
class Budget:
    """How much is run: the defaults take two hours, `QUICK` two minutes.

    Attributes:
        iterations: the number for a run whose config has 120; others in proportion.
        prompts: the number of held-out prompts of each measure.
        overrides: settings of every run.
        max_seeds: the largest number of seeds of an experiment.
    """

    iterations: int = FULL_ITERATIONS
    prompts: int = 256
    overrides: tuple[str, ...] = ()
    max_seeds: int = 3

    def scale(self, count: int) -> int:
        """Scale a number of iterations or updates, given for `FULL_ITERATIONS`, to this budget."""
        return count * self.iterations // FULL_ITERATIONS


QUICK = Budget(
    iterations=2,
    prompts=8,
    overrides=(
        "trainer.groups=2",
        "trainer.group_size=4",
        "evaluation.every=1",
        "evaluation.image_steps=4",
        "trainer.minibatches=1",
    ),
    max_seeds=1,
)
"""A short run of every experiment, which shows that it works and not how good it is."""


@cache
def _compose(overrides: tuple[str, ...]) -> Config:
    """Compose settings once: hydra takes time, and `Job.config` is read often."""
    return load_config(overrides)


@dataclass(frozen=True)
class Job:
    """One run of one experiment.

    Attributes:
        experiment: the experiment.
        seed: the seed of the run.
        root: the folder of all runs.
        budget: how much is run.
    """

    experiment: Experiment
    seed: int
    root: str
    budget: Budget

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        return Path(self.root) / f"{self.experiment.key}-{self.seed}"

    @property
    def config(self) -> Config:
        """The settings of the run, or of the evaluation of a model that is not trained."""
        # A model that is not trained is evaluated with the default settings.
        config = self.experiment.config or UNIGRPO
        whole = self.experiment.iterations or _compose(config).trainer.iterations
        iterations = max(1, self.budget.scale(whole))
        settings = [
            f"trainer.iterations={iterations}",
            f"trainer.seed={self.seed}",
            f"evaluation.prompts={self.budget.prompts}",
            f"output.folder={self.folder}",
            # Six checkpoints a run, all kept: other runs start from one in the middle.
            f"output.checkpoint_every={max(1, self.budget.iterations // 6)}",
            "output.keep_checkpoints=10",
            "output.samples_every=0",
            "output.tensorboard=false",
            "trainer.threads=1",
        ]
        start = self._start_folder()
        if start is not None:
            settings.append(f"model.name={start}")
        # Later settings win: an experiment may override the budget.
        overrides = (*self.budget.overrides, *self.experiment.overrides)
        # A copy, because whoever trains may change the settings.
        return copy.deepcopy(_compose((*config, *settings, *overrides)))

    @property
    def iterations(self) -> int:
        """The number of training iterations of the run."""
        # Without settings of a method the model is only evaluated.
        if not self.experiment.config:
            return 0
        return self.config.trainer.iterations

    @property
    def base(self) -> Job | None:
        """The run whose weights this one starts from; None for the shipped weights."""
        if self.experiment.start is None:
            return None
        key, _ = self.experiment.start
        experiment = next(entry for entry in EXPERIMENTS if entry.key == key)
        return Job(experiment, self.seed, self.root, self.budget)

    def _start_folder(self) -> Path | None:
        """The folder of the weights that this run starts from; None for the shipped weights."""
        base = self.base
        if base is None or self.experiment.start is None:
            return None
        _, iteration = self.experiment.start
        # A short run has no checkpoint this early; its last weights take the place.
        scaled = self.budget.scale(iteration)
        if scaled == 0:
            return base.folder / "model"
        return base.folder / "checkpoints" / f"{scaled:06d}" / "model"

    @property
    def recipe(self) -> dict[str, Any]:
        """Everything that determines a result, so that a finished run can be used again.

        The paths of files are left out.
        """
        # The name of the model is the path of the base; the base's own recipe stands for it.
        settings = self.config.to_dict()
        del settings["output"]["folder"], settings["model"]["name"]
        start: Any
        if self.base is not None:
            start = self.base.recipe
        else:
            # The file itself: other shipped weights make other results.
            start = hashlib.sha256((TINY / WEIGHTS).read_bytes()).hexdigest()
        updates = self.experiment.supervised_updates
        demonstrations: list[Any] = [0, None]
        if updates:
            demonstrations = [updates, UNSEEN_DEMONSTRATION, asdict(SupervisedSettings())]
        return {
            "config": self.experiment.config,
            "settings": settings,
            "start": [self.experiment.start, start],
            "demonstrations": demonstrations,
        }

    def holds(self, file: str) -> bool:
        """Whether a file of the run's folder belongs to this very recipe.

        Args:
            file: the name of a JSON file with an entry `recipe`.
        """
        path = self.folder / file
        if not path.is_file():
            return False
        # Through JSON, as the file was: tuples become lists.
        own = json.loads(json.dumps(self.recipe))
        return json.loads(path.read_text())["recipe"] == own

    @property
    def is_done(self) -> bool:
        """Whether the run is over and measured."""
        return self.holds(MEASURES)


def jobs(folder: Path, budget: Budget, only: Sequence[str] = (), extras: bool = True) -> list[Job]:
    """List the runs in order.

    Args:
        folder: the folder of all runs.
        budget: how much is run.
        only: the keys of the experiments to run; all if it is empty.
        extras: whether to include the studies that are not in the paper, if `only` is empty.

    Raises:
        ValueError: if `only` names an experiment that is not there.
    """
    known = [experiment.key for experiment in EXPERIMENTS]
    unknown = set(only) - set(known)
    if unknown:
        raise ValueError(f"unknown rows {sorted(unknown)}; expected some of: {', '.join(known)}")
    found = []
    for experiment in EXPERIMENTS:
        wanted = extras or experiment.study not in EXTRAS
        if only:
            wanted = experiment.key in only
        if wanted:
            for seed in range(min(experiment.seeds, budget.max_seeds)):
                found.append(Job(experiment, seed, str(folder), budget))
    return found

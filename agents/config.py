"""Every setting of the trainer, typed, with its one line of help; hydra composes them from `agents/configs`."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException, MissingConfigException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from agents.flow import KERNELS
from agents.guidance import RENORMS
from rewards.registry import closest

IMAGE_OBJECTIVES = {
    "flow_grpo": "clipped ratio of the stochastic steps' Gaussians, equation (6)",
    "fpo": "clipped ratio of exp(-flow-matching loss) of the finished picture, noised forward (FPO, AWR); no stochastic steps",
    "refl": "a differentiable reward, back-propagated through one step of the ODE (ReFL)",
}
"""What can teach the image expert."""


def setting(default: Any, text: str) -> Any:
    """A dataclass field with its help; lists get a fresh copy each."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass
class EnvSettings:
    """The scenario."""

    variant: str = setting("text_to_image", "registered variant of the env")
    reward: str = setting("", "reward by name, or a sum such as 'shapes + 0.1 * brevity'; empty: the variant's own")
    thought_reward: str = setting("", "process reward, paid for a thought before its image is drawn; likewise")
    round_reward: str = setting("", "reward of each picture when it is drawn; likewise")
    prompts: str | None = setting(None, "prompt file (.txt or .jsonl) in place of the variant's task")
    prompt_budget: int | None = setting(None, "tokens of a prompt at most, marks included; empty: the variant's own")
    text_budget: int | None = setting(None, "tokens of thought at most; empty: the variant's own")
    image_steps: int | None = setting(None, "denoising steps of a rollout; empty: the variant's own")
    time_shift: float | None = setting(None, "shift of the time grid towards noise; empty: the variant's own")


@dataclass
class ModelSettings:
    """What is trained."""

    name: str = setting("tiny", "known model or folder of a saved one")
    dtype: str = setting("float32", "dtype that the model computes in (by autocast): float32 or bfloat16; weights stay in float32")
    device: str = setting("cpu", "where the model and the env live")


@dataclass
class AlgorithmSettings:
    """The objective, equations (1) to (8) of the paper and what it is compared with."""

    method: str = setting("rl", "rl: learn from rewarded episodes; sft: learn from the task's lessons")
    text_weight: float = setting(1.0, "weight of the text objective (2); 0 freezes the text expert")
    image_weight: float = setting(1.0, "weight of the image objective (6), lambda; 0 freezes the image expert")
    velocity_weight: float = setting(1e-3, "weight of the velocity penalty (8)")
    latent_kl_weight: float = setting(0.0, "weight of the exact KL to the reference at the stochastic steps")
    text_kl_weight: float = setting(0.0, "weight of the tokens' KL to the reference; the paper's beta is 0")
    image_objective: str = setting("flow_grpo", "flow_grpo, fpo or refl; see unigrpo list")
    credit: str = setting(
        "episode", "advantage from: episode (all rewards of it, shared by all its parts) or onward (what was paid from each part on)"
    )
    text_clip: float = setting(0.2, "clip range of the token ratio")
    text_clip_high: float | None = setting(None, "clip range on the upper side; empty: text_clip")
    text_aggregation: str = setting("sequence", "mean over tokens: sequence (each episode's own, then over episodes) or token (all alike)")
    image_clip: float = setting(1e-4, "clip range of the latent ratio; scales with 1 / sqrt(latent values)")
    ratio: str = setting("norm", "latent ratio: norm (equation 5) or plain (equation 4)")
    through_context: bool = setting(True, "whether the image objective reaches the text that the image follows")
    through_pictures: bool = setting(
        False, "whether gradients reach the reading of pictures, which is the image expert's: the words' would drown its own"
    )
    temperature: float = setting(1.0, "sampling temperature of the tokens")
    kernel: str = setting("flow_sde", "stochastic step: flow_sde (equation 3), flow_cps or dance; ode: none")
    noise_level: float = setting(0.8, "how stochastic the window's steps are: a of the kernel")
    window_size: int = setting(3, "stochastic denoising steps an image")
    window_low: int = setting(0, "first step at which the window may begin")
    window_high: int = setting(5, "step before which the window ends")
    window_slide_every: int = setting(0, "iterations after which the window slides on by a step; 0: a random start for each group")
    shared_noise: bool = setting(False, "whether the images of a group begin with the same noise")
    old_log_prob: str | None = setting(None, "rollout or recompute; empty: rollout in float32, recompute below")
    refl_reward: str = setting("", "differentiable reward of refl; empty: env.reward")
    clean_lessons: bool = setting(False, "sft: lessons without habits and slips")

    @property
    def needs_reference(self) -> bool:
        """Whether a penalty pulls towards the model that training started from."""
        return bool(self.velocity_weight or self.latent_kl_weight or self.text_kl_weight)


@dataclass
class GuidanceSettings:
    """Classifier-free guidance, off in the paper's training; see `agents.guidance`."""

    train: float = setting(1.0, "scale in rollouts and updates; 1: off")
    evaluate: float = setting(1.0, "scale in evaluations; 1: off")
    image: float = setting(1.0, "scale away from what follows no picture, where guidance is on and a picture was read; 1: off")
    low: float = setting(0.0, "guidance acts at low < t <= high")
    high: float = setting(1.0, "see guidance.low")
    renorm: str = setting("global", "bound on the guided velocity's length: none, global, channel or text_channel")
    renorm_min: float = setting(0.0, "the length is scaled by no less than this")


@dataclass
class OptimizerSettings:
    """AdamW, one learning rate an expert."""

    text_lr: float = setting(3e-4, "learning rate of the text (understanding) expert")
    image_lr: float = setting(2e-4, "learning rate of the image (generation) expert")
    warmup: int = setting(5, "iterations in which both rise from zero")
    decay: float = setting(0.1, "share of the learning rates that is left at the last iteration (linear fall)")
    beta1: float = setting(0.9, "decay of the first moment")
    beta2: float = setting(0.99, "decay of the second moment")
    eps: float = setting(1e-12, "small, because RatioNorm's gradients are")
    weight_decay: float = setting(0.0, "decoupled weight decay")
    max_grad_norm: float = setting(1.0, "each expert's gradient is scaled down to this norm")


@dataclass
class TrainerSettings:
    """The loop."""

    iterations: int = setting(120, "rounds of collecting and updating")
    groups: int = setting(8, "prompts an iteration")
    group_size: int = setting(8, "episodes a prompt")
    minibatches: int = setting(2, "disjoint parts of an iteration's groups, one update each")
    epochs: int = setting(1, "passes over an iteration's episodes; old log-probs stay as they were")
    dynamic_sampling: str = setting(
        "keep", "groups whose rewards are all equal: keep, drop (the others count more) or replace (collect again)"
    )
    max_collects: int = setting(4, "with replace: collections an iteration, at most")
    micro_batches: int = setting(1, "parts in which an update's gradient is summed up; changes memory, not the update")
    seed: int = setting(0, "everything random is drawn from it")
    max_unscored: float = setting(0.25, "share of episodes without a score above which the run stops")
    threads: int = setting(0, "CPU threads for torch; 0 leaves torch's choice")


@dataclass
class EvaluationSettings:
    """The fixed held-out split."""

    prompts: int = setting(256, "held-out prompts")
    seed: int = setting(1_000_000, "of the choice of prompts and of the episodes' noise")
    reward: str = setting("", "what counts as accuracy; empty: the reward that is trained on (env.reward, or the variant's own)")
    image_steps: int | None = setting(None, "denoising steps; empty: as in training")
    every: int = setting(25, "iterations between evaluations in the run; 0: before and after only")


@dataclass
class OutputSettings:
    """What is written, and where."""

    folder: str = setting("outputs/run", "folder of the run")
    checkpoint_every: int = setting(50, "iterations between checkpoints; 0: at the end only")
    keep_checkpoints: int = setting(2, "how many of them are kept")
    samples_every: int = setting(25, "iterations between sheets of sample pictures; 0: none")
    samples: int = setting(8, "pictures a sheet, and in the report")
    tensorboard: bool = setting(True, "write TensorBoard events")
    wandb: str | None = setting(None, "Weights & Biases project to log to, where wandb is installed")
    imports: list[str] = setting([], "modules to import first, for the rewards and variants they register")


@dataclass
class Config:
    """All settings of a run."""

    env: EnvSettings = field(default_factory=EnvSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    algorithm: AlgorithmSettings = field(default_factory=AlgorithmSettings)
    guidance: GuidanceSettings = field(default_factory=GuidanceSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    trainer: TrainerSettings = field(default_factory=TrainerSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    output: OutputSettings = field(default_factory=OutputSettings)

    def __post_init__(self) -> None:
        trainer = self.trainer
        for name, value, least in (
            ("trainer.iterations", trainer.iterations, 0),
            ("trainer.groups", trainer.groups, 1),
            ("trainer.group_size", trainer.group_size, 2),
            ("trainer.minibatches", trainer.minibatches, 1),
            ("trainer.epochs", trainer.epochs, 1),
            ("trainer.max_collects", trainer.max_collects, 1),
            ("trainer.micro_batches", trainer.micro_batches, 1),
            ("evaluation.prompts", self.evaluation.prompts, 1),
        ):
            if value < least:
                raise ValueError(
                    f"expected {name} >= {least}, got {value}"
                    + ("; an episode is judged against the others of its group" if "size" in name else "")
                )
        if trainer.groups % (trainer.minibatches * trainer.micro_batches):
            raise ValueError(
                f"expected trainer.groups={trainer.groups} to be a multiple of minibatches x micro_batches = {trainer.minibatches * trainer.micro_batches}"
            )
        algorithm = self.algorithm
        for name, number, low, high in (
            ("algorithm.text_clip", algorithm.text_clip, 0, 1),
            ("algorithm.image_clip", algorithm.image_clip, 0, 1),
            ("algorithm.noise_level", algorithm.noise_level, 0, math.inf),
            ("algorithm.temperature", algorithm.temperature, 0, math.inf),
        ):
            if not low < number < high:
                raise ValueError(f"expected {low} < {name} < {high}, got {number}")
        for name, choice, choices in (
            ("algorithm.ratio", algorithm.ratio, ("norm", "plain")),
            ("algorithm.old_log_prob", algorithm.old_log_prob, (None, "rollout", "recompute")),
            ("algorithm.credit", algorithm.credit, ("episode", "onward")),
            ("algorithm.method", algorithm.method, ("rl", "sft")),
            ("algorithm.image_objective", algorithm.image_objective, tuple(IMAGE_OBJECTIVES)),
            ("algorithm.kernel", algorithm.kernel, (*KERNELS, "ode")),
            ("algorithm.text_aggregation", algorithm.text_aggregation, ("sequence", "token")),
            ("trainer.dynamic_sampling", trainer.dynamic_sampling, ("keep", "drop", "replace")),
            ("guidance.renorm", self.guidance.renorm, tuple(RENORMS)),
            ("model.dtype", self.model.dtype, ("float32", "bfloat16")),
        ):
            if choice not in choices:
                raise ValueError(f"expected {name} to be one of {choices}, got {choice!r}")
        if algorithm.image_objective == "fpo" and algorithm.latent_kl_weight:
            raise ValueError("expected algorithm.latent_kl_weight = 0 with fpo, whose points are no stochastic steps; use velocity_weight")
        wants_noise = algorithm.latent_kl_weight or algorithm.image_objective == "flow_grpo"
        if algorithm.method == "rl" and algorithm.kernel == "ode" and wants_noise:
            raise ValueError(
                f"expected a stochastic algorithm.kernel for flow_grpo and the latent KL, got 'ode'; choose one of {tuple(KERNELS)}"
            )
        if algorithm.kernel == "flow_cps" and algorithm.noise_level > 1:
            raise ValueError(f"expected algorithm.noise_level in (0, 1] for flow_cps, got {algorithm.noise_level}")
        if algorithm.text_clip_high is not None and not algorithm.text_clip_high > 0:
            raise ValueError(f"expected algorithm.text_clip_high > 0, got {algorithm.text_clip_high}")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Config:
        """Raises ValueError for a key that is no setting."""
        try:
            merged = OmegaConf.merge(OmegaConf.structured(cls), values)
        except OmegaConfBaseException as error:
            raise ValueError(f"not the settings of a run: {error}") from error
        return OmegaConf.to_object(merged)  # type: ignore[return-value]


ConfigStore.instance().store(name="schema", node=Config)


def settings() -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """Every setting's dotted name and field."""
    for section in dataclasses.fields(Config):
        for entry in dataclasses.fields(section.type if isinstance(section.type, type) else globals()[str(section.type)]):
            yield f"{section.name}.{entry.name}", entry


def config_names() -> list[str]:
    """The configs that come with the library."""
    from importlib.resources import files

    return sorted(entry.name.removesuffix(".yaml") for entry in files("agents.configs").iterdir() if entry.name.endswith(".yaml"))


def _check_keys(overrides: Sequence[str]) -> None:
    known = [key for key, _ in settings()]
    for override in overrides:
        key = re.split(r"[=\s]", override, maxsplit=1)[0]
        if "=" not in override or key not in known:
            raise ValueError(f"unknown setting {key!r}; expected section.key=value; {closest(key, known)}")


def override_config(config: Config, overrides: Sequence[str]) -> Config:
    """`config` with some settings changed, in hydra's grammar; raises as `load_config`."""
    _check_keys(overrides)
    values = config.to_dict()
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        section, key = override.key_or_group.split(".")
        values[section][key] = override.value()
    return Config.from_dict(values)


def load_config(name: str = "unigrpo", overrides: Sequence[str] = ()) -> Config:
    """Compose a config.

    Args:
        name: one of `config_names()`.
        overrides: `section.key=value`, hydra's grammar.

    Raises:
        ValueError: an unknown config, an unknown key (with the closest names), or a value of the wrong type.
    """
    if name not in config_names():
        raise ValueError(f"unknown config {name!r}; {closest(name, config_names())}")
    _check_keys(overrides)
    try:
        with initialize_config_module("agents.configs", version_base="1.3"):
            composed = compose(name, list(overrides))
        return OmegaConf.to_object(composed)  # type: ignore[return-value]
    except (ConfigCompositionException, MissingConfigException, OmegaConfBaseException) as error:
        cause = error.__cause__ or error
        raise ValueError(f"config {name!r} with {list(overrides)}: {cause}") from error

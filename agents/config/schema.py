"""Every setting of a run: its type, default value, bounds or choices, and one line of help."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from agents.config.fields import setting
from agents.config.messages import one_line
from agents.config.model_settings import ModelSettings
from agents.config.validation import validate

IMAGE_OBJECTIVES = {
    "flow_grpo": "clipped ratio of the stochastic steps' Gaussians, equation (6)",
    "fpo": "clipped ratio of exp(-flow-matching loss) of the final image, noised forward"
    " (FPO, AWR); no stochastic steps",
    "refl": "a differentiable reward, back-propagated through one step of the ODE (ReFL)",
}
"""The objectives by which the image expert can learn."""

# The choices below repeat the names of `agents.policy.sde.KERNELS` and `guidance.RENORMS`, which
# need torch: so the settings can be listed without it. A test compares them.
KERNELS = ("flow_sde", "flow_cps", "dance", "ode")
RENORMS = ("none", "global", "channel", "text_channel")


@dataclass
class EnvSettings:
    """The scenario: what an episode may do, its prompts and its rewards."""

    variant: str = setting("text_to_image", "registered variant of the env")
    processor: str = setting("", "registered processor; empty: the model's own")
    reward: str = setting(
        "", "reward by name, or a sum such as 'shapes + 0.1 * brevity'; empty: the variant's own"
    )
    thought_reward: str = setting(
        "", "process reward, paid for a thought before its image is drawn; likewise"
    )
    round_reward: str = setting("", "reward of each image when it is drawn; likewise")
    reward_options: dict[str, Any] = setting(
        {},
        "options of rewards by name, also of the evaluation's:"
        " env.reward_options.pickscore.device=cuda:1",
    )
    prompts: str | None = setting(
        None,
        "prompt file (.txt or .jsonl) in place of the variant's task; geneval: prompts made from"
        " GenEval's classes and templates",
    )
    test_prompts: str | None = setting(
        None,
        "file of held-out prompts, which are kept out of training; empty: a tenth of env.prompts is"
        " held out",
    )
    prompt_budget: int | None = setting(
        None, "tokens of a prompt at most, marks included; empty: the variant's own"
    )
    text_budget: int | None = setting(
        None, "tokens of a thought at most; 0: no thoughts; empty: the variant's own"
    )
    turn_budget: int | None = setting(
        None, "tokens of a user's turn at most; empty: the variant's own"
    )
    image_budget: int | None = setting(
        None, "images of an episode at most; 0: text alone; empty: the variant's own"
    )
    source_images: int | None = setting(
        None, "images that come with a prompt, at most; empty: the variant's own"
    )
    text_after_images: bool | None = setting(
        None, "whether the model writes once more after its last image; empty: the variant's own"
    )
    system_prompt: str | None = setting(
        None, "a text before every prompt; empty: the variant's own"
    )
    image_steps: int | None = setting(
        None, "denoising steps of a rollout; empty: the variant's own"
    )
    time_shift: float | None = setting(
        None, "shift of the time grid towards noise; empty: the processor's own"
    )


@dataclass
class AlgorithmSettings:
    """The objective: equations (1) to (8) of the paper, and the methods it is compared with."""

    method: str = setting(
        "rl",
        "rl: learn from rewarded episodes; sft: learn from the task's demonstrations",
        choices=("rl", "sft"),
    )
    text_weight: float = setting(1.0, "weight of the text objective (2); 0 freezes the text expert")
    image_weight: float = setting(
        1.0, "weight of the image objective (6), lambda; 0 freezes the image expert"
    )
    velocity_weight: float = setting(1e-3, "weight of the velocity penalty (8)")
    latent_kl_weight: float = setting(
        0.0, "weight of the exact KL to the reference at the stochastic steps"
    )
    text_kl_weight: float = setting(
        0.0, "weight of the tokens' KL to the reference; the paper's beta is 0"
    )
    image_objective: str = setting(
        "flow_grpo", "flow_grpo, fpo or refl; see unigrpo list", choices=tuple(IMAGE_OBJECTIVES)
    )
    advantage: str = setting(
        "episode",
        "advantage from: episode (all rewards of it, shared by all its parts) or reward_to_go"
        " (what was paid from each part on)",
        choices=("episode", "reward_to_go"),
    )
    text_clip: float = setting(0.2, "clip range of the token ratio", between=(0, 1))
    text_clip_high: float | None = setting(
        None, "clip range on the upper side; empty: text_clip", above=0
    )
    text_aggregation: str = setting(
        "sequence",
        "mean over tokens: sequence (in each episode, then over episodes) or token (over all)",
        choices=("sequence", "token"),
    )
    image_clip: float = setting(
        1e-4,
        "clip range of the latent ratio; scales with 1 / sqrt(latent values)",
        between=(0, 1),
    )
    ratio: str = setting(
        "norm",
        "latent ratio: norm (equation 5) or plain (equation 4)",
        choices=("norm", "plain"),
    )
    image_grad_to_text: bool = setting(
        True, "let the gradient of the image objective reach the text before the image"
    )
    grad_through_read_images: bool = setting(
        False,
        "let gradients reach the reading of images, which is the image expert's; the gradient of"
        " the text would be larger there than its own",
    )
    temperature: float = setting(1.0, "sampling temperature of the tokens", between=(0, math.inf))
    kernel: str = setting(
        "flow_sde",
        "stochastic step: flow_sde (equation 3), flow_cps or dance; ode: none",
        choices=KERNELS,
    )
    noise_level: float = setting(
        0.8, "how stochastic the window's steps are: a of the kernel", between=(0, math.inf)
    )
    window_size: int = setting(3, "stochastic denoising steps of an image")
    window_low: int = setting(0, "first step at which the window may begin")
    window_high: int = setting(5, "step before which the window ends")
    window_slide_every: int = setting(
        0,
        "iterations after which the window moves on by a step; 0: a random start for each group",
    )
    shared_noise: bool = setting(False, "let the images of a group begin with the same noise")
    old_log_prob: str | None = setting(
        None,
        "rollout or recompute; empty: rollout in float32, recompute below",
        choices=("rollout", "recompute"),
    )
    refl_reward: str = setting("", "differentiable reward of refl; empty: env.reward")
    clean_demonstrations: bool = setting(
        False, "sft: demonstrations without systematic and random errors"
    )

    @property
    def needs_reference(self) -> bool:
        """Whether a penalty keeps the policy near the model from which training started."""
        # Without any of them no second model is kept and no second forward is computed.
        return bool(self.velocity_weight or self.latent_kl_weight or self.text_kl_weight)


@dataclass
class GuidanceSettings:
    """Classifier-free guidance, off in the paper's training; see `agents.policy.guidance`."""

    train: float = setting(1.0, "scale in rollouts and updates; 1: off")
    evaluate: float = setting(1.0, "scale in evaluations; 1: off")
    image: float = setting(
        1.0,
        "scale away from the velocity without images and thoughts, where guidance is on; 1: off",
    )
    low: float = setting(0.0, "guidance is active at low < t <= high")
    high: float = setting(1.0, "see guidance.low")
    renorm: str = setting(
        "global",
        "bound on the norm of the guided velocity: none, global, channel or text_channel",
        choices=RENORMS,
    )
    renorm_min: float = setting(0.0, "the norm is scaled by no less than this")


@dataclass
class OptimizerSettings:
    """AdamW, with one learning rate for each expert."""

    text_lr: float = setting(3e-4, "learning rate of the text (understanding) expert")
    image_lr: float = setting(2e-4, "learning rate of the image (generation) expert")
    warmup: int = setting(5, "iterations in which both rise from zero")
    decay: float = setting(
        0.1, "share of the learning rates that is left at the last iteration (linear fall)"
    )
    beta1: float = setting(0.9, "decay of the first moment")
    beta2: float = setting(0.99, "decay of the second moment")
    eps: float = setting(1e-12, "small, because RatioNorm's gradients are")
    weight_decay: float = setting(0.0, "decoupled weight decay")
    max_grad_norm: float = setting(1.0, "each expert's gradient is scaled down to this norm")
    ema: float | None = setting(
        None, "decay of an average of the weights, such as 0.99; empty: none", between=(0, 1)
    )


@dataclass
class TrainerSettings:
    """The loop."""

    iterations: int = setting(120, "iterations of collecting and updating", at_least=0)
    groups: int = setting(8, "prompts of an iteration", at_least=1)
    group_size: int = setting(
        8,
        "episodes of a prompt",
        at_least=2,
        reason="an episode is judged against the others of its group",
    )
    minibatches: int = setting(
        2, "disjoint parts of an iteration's groups, one update each", at_least=1
    )
    epochs: int = setting(
        1, "passes over an iteration's episodes; old log-probs stay as they were", at_least=1
    )
    dynamic_sampling: str = setting(
        "keep",
        "groups whose rewards are all equal: keep, drop (the others count more) or replace"
        " (collect again)",
        choices=("keep", "drop", "replace"),
    )
    max_collects: int = setting(4, "with replace: collections of an iteration, at most", at_least=1)
    micro_batches: int = setting(
        1,
        "parts of an update's episodes, over which its gradient is summed up; changes memory, not"
        " the update",
        at_least=1,
    )
    seed: int = setting(0, "all random numbers are drawn from it")
    max_unscored: float = setting(
        0.25, "share of episodes without a score above which the run stops"
    )
    threads: int = setting(0, "CPU threads of torch; 0: torch's own choice")


@dataclass
class EvaluationSettings:
    """The fixed held-out split."""

    prompts: int = setting(256, "held-out prompts", at_least=1)
    # It is not derived from `trainer.seed`: all runs are measured on the same prompts and noise.
    seed: int = setting(1_000_000, "seed of the choice of prompts and of the episodes' noise")
    reward: str = setting(
        "",
        "reward whose mean is the accuracy; empty: the reward of training (env.reward, or the"
        " variant's own)",
    )
    image_steps: int | None = setting(None, "denoising steps; empty: as in training")
    batch_size: int = setting(
        256, "episodes that are played at once; changes memory, not the result", at_least=1
    )
    ema: bool = setting(
        False, "evaluate, sample and save at the end with the averaged weights (optimizer.ema)"
    )
    every: int = setting(
        25, "iterations between evaluations in the run; 0: before and after it only"
    )


@dataclass
class OutputSettings:
    """The files that a run writes."""

    folder: str = setting("outputs/run", "folder of the run")
    checkpoint_every: int = setting(50, "iterations between checkpoints; 0: at the end only")
    keep_checkpoints: int = setting(2, "number of checkpoints that are kept")
    samples_every: int = setting(25, "iterations between sheets of sample images; 0: none")
    samples: int = setting(8, "images of a sheet, and in the report")
    tensorboard: bool = setting(True, "write TensorBoard events")
    wandb: str | None = setting(
        None, "Weights & Biases project to log to, where wandb is installed"
    )
    imports: list[str] = setting(
        [], "modules to import first, for the rewards and variants they register"
    )


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
        """Check every setting.

        Raises:
            ValueError: a setting is out of its bounds, or two do not go together.
        """
        validate(self)

    def to_dict(self) -> dict[str, Any]:
        """Give the settings as nested dictionaries of plain values, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Config:
        """Build settings from what `to_dict` gave; those that are left out get their defaults.

        Args:
            values: the settings of each section.

        Raises:
            ValueError: a key is no setting, or a value has the wrong type or is out of bounds.
        """
        try:
            # OmegaConf checks keys and types; `to_object` then calls `__post_init__`.
            merged = OmegaConf.merge(OmegaConf.structured(cls), values)
            return cast(Config, OmegaConf.to_object(merged))
        except OmegaConfBaseException as error:
            raise ValueError(f"not the settings of a run: {one_line(error)}") from error

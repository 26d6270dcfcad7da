"""From settings to the parts of a run."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from agents.config.schema import Config, EnvSettings, GuidanceSettings
from agents.models.base import UnifiedModel
from agents.models.registry import load_model
from agents.policy.actor import Actor
from agents.policy.guidance import Guidance
from agents.policy.sde import Window
from unigrpo_env.mdp.rules import Rules
from unigrpo_env.processor import PROCESSORS, Processor
from unigrpo_env.tasks.prompt_file import PromptFile
from unigrpo_env.variants.variant import Variant, make_variant

SCENARIO_SETTINGS = (
    "prompt_budget", "text_budget", "turn_budget", "image_budget", "source_images",
    "text_after_images", "system_prompt", "image_steps", "time_shift",
)  # fmt: skip
"""Settings of the env that are handed to the maker of the variant, where they are given."""


def import_modules(names: Sequence[str]) -> None:
    """Import user modules, from the working directory too, for what they register.

    Args:
        names: modules, or paths of Python files.

    Raises:
        ImportError: one of them is not there.
    """
    if names and "" not in sys.path:
        sys.path.insert(0, "")
    for name in names:
        if name.endswith(".py"):
            _import_file(Path(name))
        else:
            importlib.import_module(name)


def _import_file(path: Path) -> None:
    if not path.is_file():
        raise ImportError(f"expected a Python file at {path}, found none; check the path")
    # Under its whole path, so that a file such as rewards.py is not taken for another module.
    name = str(path.resolve())
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        # As `import` does: what could not be executed was not imported.
        del sys.modules[name]
        raise


def build_model(config: Config) -> UnifiedModel[Any]:
    """The model that the settings name, on its device.

    Args:
        config: all settings.

    Raises:
        ValueError: an unknown model, or a device that is not there.
    """
    return place_model(load_model(config.model.name), config)


def place_model(model: UnifiedModel[Any], config: Config) -> UnifiedModel[Any]:
    """Move a model to its device, and set what it computes in.

    Args:
        model: loaded or given.
        config: all settings.

    Raises:
        ValueError: the device is not there.
    """
    try:
        device = torch.device(config.model.device)
        model = model.to(device)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(
            f"expected a device that torch can use for model.device={config.model.device!r}, "
            f"got: {str(error).splitlines()[0]}; use cpu, or install a torch that has it"
        ) from error
    # Weights stay in float32: at a learning rate of 1e-6 an update would be lost in bfloat16.
    model.compute_dtype = getattr(torch, config.model.dtype)
    return model


def build_processor(settings: EnvSettings, model: UnifiedModel[Any]) -> Processor:
    """The processor that the settings name, or the model's own."""
    if settings.processor:
        return PROCESSORS[settings.processor]()
    return model.processor


def build_variant(
    settings: EnvSettings, processor: Processor | None = None, reward: str = ""
) -> Variant:
    """The scenario that the settings name.

    Args:
        settings: of the env.
        processor: of the model that plays it; the shapes world's if left out.
        reward: in place of the settings'.

    Raises:
        ValueError: an unknown name, or a prompt file that is not there.
    """
    # Only what was set is handed on: the variant has defaults of its own.
    given: dict[str, Any] = {}
    for name in SCENARIO_SETTINGS:
        value = getattr(settings, name)
        if value is not None:
            given[name] = value
    if settings.prompts is not None:
        given["task"] = PromptFile(settings.prompts, settings.test_prompts)
    rewards = {
        "reward": reward or settings.reward,
        "thought_reward": settings.thought_reward,
        "round_reward": settings.round_reward,
    }
    for name, value in rewards.items():
        if value:
            given[name] = value
    return make_variant(settings.variant, processor=processor, **given)


def check_model_fits(model: UnifiedModel[Any], rules: Rules) -> None:
    """Refuse a model whose sizes are not those of the scenario, before a run has begun.

    Args:
        model: the policy.
        rules: of the scenario.

    Raises:
        ValueError: another vocabulary or another latent.
    """
    problems = []
    # Masks of legal tokens have the processor's width, logits have the model's.
    if model.vocab_size != rules.vocab_size:
        problems.append(f"a vocabulary of {model.vocab_size}, expected {rules.vocab_size}")
    if tuple(model.latent_shape) != tuple(rules.latent_shape):
        problems.append(f"latents {model.latent_shape}, expected {rules.latent_shape}")
    if problems:
        raise ValueError(
            f"{type(model).__name__} does not fit the scenario: it has {' and '.join(problems)}. "
            "Choose a model that brings its own processor; one whose tokenizer is smaller than "
            "the model gives the model's vocab_size, and forbids the ids that no token has"
        )


def build_guidance(settings: GuidanceSettings, scale: float) -> Guidance | None:
    """The guidance that the settings describe; None at scale 1."""
    if scale == 1:
        return None
    return Guidance(
        scale,
        settings.image,
        low=settings.low,
        high=settings.high,
        renorm=settings.renorm,
        renorm_min=settings.renorm_min,
    )


def build_actor(config: Config, model: UnifiedModel[Any], guidance: Guidance | None) -> Actor:
    """The policy of the rollouts.

    Args:
        config: all settings.
        model: what it reads and draws with.
        guidance: in rollouts; None for none.
    """
    algorithm = config.algorithm
    window = Window(
        algorithm.window_size,
        algorithm.window_low,
        algorithm.window_high,
        algorithm.window_slide_every,
    )
    return Actor(
        model,
        temperature=algorithm.temperature,
        window=window,
        noise_level=algorithm.noise_level,
        kernel=algorithm.kernel,
        guidance=guidance,
    )


def check_objective(config: Config, rules: Rules) -> None:
    """Refuse an image objective for scenarios that it was not made for.

    Args:
        config: all settings.
        rules: of the scenario.

    Raises:
        ValueError: FPO or ReFL where an episode reads images or does not draw one.
    """
    algorithm = config.algorithm
    learns_images = algorithm.method == "rl" and bool(algorithm.image_weight)
    one_image = rules.stored_images == 0 and rules.image_budget == 1
    if learns_images and not one_image and algorithm.image_objective != "flow_grpo":
        raise ValueError(
            f"expected a variant of one image and no sources for {algorithm.image_objective!r}, "
            f"got {config.env.variant!r}; those learn by flow_grpo, or from demonstrations"
        )

"""From settings to the parts of a run."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from agents.config.model_settings import LoraSettings, ModelSettings
from agents.config.schema import (
    Config,
    EnvSettings,
    GuidanceSettings,
)
from agents.models.adapter_files import ADAPTER_CONFIG
from agents.models.base import UnifiedModel
from agents.models.lora import ADAPTER, add_adapters
from agents.models.registry import MODELS, load_model, source_of
from agents.policy.actor import Actor
from agents.policy.guidance import Guidance
from agents.policy.sde import Window
from agents.storage import read_json_object
from unigrpo_env.mdp.rules import Rules
from unigrpo_env.processor import PROCESSORS, Processor
from unigrpo_env.tasks.geneval import GenEvalPrompts
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
        ValueError: an unknown model, settings that it does not take, or a device that is not there.
    """
    return place_model(read_model(config.model.source, config.model), config)


def read_model(name: str, settings: ModelSettings) -> UnifiedModel[Any]:
    """Load a model with the image size, dtype and device of the settings.

    Args:
        name: known model or folder; that of the settings, or of a checkpoint.
        settings: of the model.

    Raises:
        ValueError: see `build_model`.
    """
    # None stands for "not set" in `load_model` too; a model without these options refuses others.
    return load_model(
        name,
        thinker=settings.thinker or None,
        painter=settings.painter or None,
        tells=settings.tells,
        strict=settings.strict,
        reads_base=settings.reads_base,
        thinking=settings.thinking,
        height=settings.height,
        width=settings.width,
        vision=None if settings.vision else False,
        dtype=getattr(torch, settings.dtype),
        device=_find_device(settings.device),
    )


def read_saved_model(folder: Path, settings: ModelSettings) -> UnifiedModel[Any]:
    """The model of a checkpoint; for adapters, the model that they belong to.

    Args:
        folder: of the model, in a checkpoint.
        settings: of the run.

    Raises:
        ValueError: the settings name another model than the one that the adapters belong to.
    """
    if not (folder / ADAPTER_CONFIG).is_file():
        model = read_model(str(folder), settings)
        # The checkpoint may be dropped while the run goes on. What it began with stays.
        if Path(settings.source).is_dir():
            model.source = source_of(settings.source)
        return model
    source = read_json_object(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    model = read_model(settings.source, settings)
    # A base that is no longer there was moved, and the settings say where to.
    was_moved = source is not None and source not in MODELS and not Path(source).is_dir()
    if source is None or (source_of(source) != model.source and not was_moved):
        raise ValueError(
            f"expected the model {source!r}, to which the adapters in {folder} belong, got "
            f"model.name={settings.source!r}; name that model, or give the trainer's own as `model`"
        )
    return model


def place_model(model: UnifiedModel[Any], config: Config) -> UnifiedModel[Any]:
    """Move a model to its device, set what it computes in, and give it adapters.

    Args:
        model: loaded or given.
        config: all settings.

    Raises:
        ValueError: the device is not there, or the adapters do not fit the model.
    """
    settings = config.model
    model = model.to(_find_device(settings.device))
    model.cast_weights(getattr(torch, settings.dtype))
    model.max_rows = settings.max_rows
    model.checkpointing = settings.checkpointing
    _add_adapters(model, settings.lora, config.trainer.seed)
    return model


def _find_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        # The name of a device says nothing of whether it is there.
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(
            f"expected a device that torch can use for model.device={name!r}, "
            f"got: {str(error).splitlines()[0]}; use cpu, or install a torch that has it"
        ) from error
    return device


def _add_adapters(model: UnifiedModel[Any], settings: LoraSettings, seed: int) -> None:
    """Give the model the adapters of the settings, unless it came with them.

    Raises:
        ValueError: it came with others, or nothing in it fits the settings.
    """
    ranks = {}
    alphas = {}
    for expert, of_expert in (("text", settings.text), ("image", settings.image)):
        if of_expert.rank:
            ranks[expert] = of_expert.rank
            # Adapters count alpha / rank: with this default twice, whatever the rank.
            alphas[expert] = of_expert.alpha or 2.0 * of_expert.rank
    if not ranks:
        return
    if model.adapted_layers is None:
        add_adapters(model, ranks, alphas, settings.targets or None, seed=seed)
        return
    _check_adapters(model, ranks, alphas)


def _check_adapters(
    model: UnifiedModel[Any], ranks: dict[str, int], alphas: dict[str, float]
) -> None:
    """Refuse settings that are not those of the adapters that the model came with."""
    for expert, names in (model.adapted_layers or {}).items():
        # Rank and factor of each adapter; one pair where all adapters of the expert are alike.
        found = set()
        for name in names:
            layer: Any = model.get_submodule(name)
            found.add((layer.r[ADAPTER], layer.scaling[ADAPTER]))
        expected = set()
        if expert in ranks:
            expected = {(ranks[expert], alphas[expert] / ranks[expert])}
        if found != expected:
            raise ValueError(
                f"expected adapters of the {expert} expert with (rank, alpha / rank) "
                f"{sorted(expected)}, got a model with {sorted(found)}; leave model.lora empty to "
                "train the adapters that it has, or merge them first (unigrpo merge)"
            )


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
    if settings.prompts == "geneval":
        given["task"] = GenEvalPrompts(settings.test_prompts)
    elif settings.prompts is not None:
        given["task"] = PromptFile(settings.prompts, settings.test_prompts)
    rewards = {
        "reward": reward or settings.reward,
        "thought_reward": settings.thought_reward,
        "round_reward": settings.round_reward,
    }
    for name, value in rewards.items():
        if value:
            given[name] = value
    if settings.reward_options:
        given["reward_options"] = settings.reward_options
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

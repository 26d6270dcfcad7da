"""Low-rank adapters (LoRA) in the linear layers of any model; PEFT builds the layers.

An adapter adds `alpha / rank * B A x` to what a linear layer gives, with `A` `[rank, in]` and `B`
`[out, rank]` in float32. B is zero at first, so a model with new adapters computes what it did
without. All other weights are frozen and stay as they are. So the same model, with its adapters
switched off, is the reference of the penalties, and no copy of it is needed.

A layer with an adapter holds its own weights under `<layer>.base_layer`. Files hold adapters alone,
see `adapter_files`, or whole weights under their original names, see `merge_adapters`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from agents.models.base import UnifiedModel

if TYPE_CHECKING:
    # Imported only where adapters are used: PEFT takes a while to import.
    from peft.tuners.lora import LoraLayer

ADAPTER = "default"
"""Name of the one adapter that a layer has; PEFT allows several."""
SHOWN_LAYERS = 5
"""How many layers an error message names."""


def has_adapters(model: UnifiedModel[Any]) -> bool:
    """Whether `add_adapters` or `load_adapters` gave the model adapters."""
    return model.adapted_layers is not None


def add_adapters(
    model: UnifiedModel[Any],
    rank: Mapping[str, int],
    alpha: Mapping[str, float],
    targets: Sequence[str] | None = None,
    *,
    seed: int = 0,
) -> None:
    """Put new adapters into linear layers, in place, and freeze all other weights.

    A layer gets one if `parameters_by_expert` lists its weight, no other layer shares that weight,
    and one of `targets` is found in its name.

    Args:
        model: its class and its outputs stay what they are.
        rank: by expert, "text" or "image"; 0 or left out: that expert gets none.
        alpha: by expert; `alpha / rank` is the factor of what an adapter adds.
        targets: regular expressions; `lora_targets` of the model's class if left out.
        seed: of the first values of A.

    Raises:
        ValueError: the model has adapters already, a rank or alpha is missing or out of range, or
            no layer fits.
    """
    if has_adapters(model):
        raise ValueError(
            f"expected a {type(model).__name__} without adapters, got one that has them; load the "
            "model anew, or fill its adapters with load_adapters"
        )
    if targets is None:
        targets = type(model).lora_targets
    layers = linear_layers(model)
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for name, expert in layers.items():
        size = rank.get(expert, 0)
        if size and any(re.search(target, name) for target in targets):
            ranks[name] = size
            alphas[name] = alpha.get(expert, 0)
    _check_settings(rank, alpha, set(model.parameters_by_expert()))
    if not ranks:
        found = ", ".join(list(layers)[:SHOWN_LAYERS]) or "none"
        raise ValueError(
            f"expected linear layers of {type(model).__name__} that match one of the targets "
            f"{list(targets)} and belong to an expert with a rank (got {dict(rank)}), found none; "
            f"it has {len(layers)} linear layers to choose from: {found}"
        )
    inject(model, ranks, alphas, seed)


def _check_settings(rank: Mapping[str, int], alpha: Mapping[str, float], experts: set[str]) -> None:
    for expert, size in rank.items():
        if expert not in experts or size < 0:
            raise ValueError(
                f"expected a rank of at least 0 for one of {sorted(experts)}, got {size} for "
                f"{expert!r}"
            )
        if size and alpha.get(expert, 0) <= 0:
            raise ValueError(
                f"expected an alpha above 0 for the expert {expert!r} of rank {size}, got "
                f"{alpha.get(expert)}; twice the rank is usual"
            )


def linear_layers(model: UnifiedModel[Any]) -> dict[str, str]:
    """The layers that can have an adapter: name and expert, in the model's order."""
    expert_of = {}
    for expert, weights in model.parameters_by_expert().items():
        expert_of.update({id(weight): expert for weight in weights})
    uses = Counter(id(weight) for _, weight in model.named_parameters(remove_duplicate=False))
    layers = {}
    for name, module in model.named_modules():
        # A subclass may use its weight in a way of its own, where an adapter would have no effect.
        if type(module) is not nn.Linear or id(module.weight) not in expert_of:
            continue
        # A merged weight would change every layer that shares it.
        if uses[id(module.weight)] == 1:
            layers[name] = expert_of[id(module.weight)]
    return layers


def inject(
    model: UnifiedModel[Any], ranks: dict[str, int], alphas: dict[str, float], seed: int
) -> None:
    """Replace linear layers by layers with an adapter.

    Args:
        model: without adapters.
        ranks: by name of the layer.
        alphas: by name of the layer.
        seed: of the first values of A.
    """
    from peft import LoraConfig, inject_adapter_in_model

    experts = linear_layers(model)
    config = LoraConfig(
        # These two are for layers that the patterns below do not name: there are none.
        r=1,
        lora_alpha=1,
        target_modules=_pattern(list(ranks)),
        rank_pattern=_by_value(ranks),
        alpha_pattern=_by_value(alphas),
    )
    # PEFT draws from the global generator; what others draw from it must not depend on this.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        inject_adapter_in_model(config, model, ADAPTER)
    adapted: dict[str, list[str]] = {expert: [] for expert in model.parameters_by_expert()}
    # In the model's order, whatever that of a file is.
    for name, expert in experts.items():
        if name in ranks:
            adapted[expert].append(name)
    model.adapted_layers = adapted
    for weight in adapter_weights(model).values():
        # Steps of a small learning rate would be lost in bfloat16.
        weight.data = weight.data.float()


def _pattern(names: Sequence[str]) -> str:
    """A regular expression for exactly these names.

    PEFT takes lists of names too, but a name there also stands for longer ones that end in it.
    """
    return f"^(?:{'|'.join(re.escape(name) for name in names)})"


def _by_value(numbers: Mapping[str, float]) -> dict[str, Any]:
    """Ranks or alphas as PEFT wants them: by a pattern for all layers that have the same one."""
    names: dict[float, list[str]] = {}
    for name, number in numbers.items():
        names.setdefault(number, []).append(name)
    return {_pattern(group): number for number, group in names.items()}


def lora_layers(model: UnifiedModel[Any]) -> dict[str, LoraLayer]:
    """The layers with an adapter, by name; none without adapters."""
    layers = {}
    for names in (model.adapted_layers or {}).values():
        for name in names:
            layers[name] = cast("LoraLayer", model.get_submodule(name))
    return layers


def adapters_by_expert(model: UnifiedModel[Any]) -> dict[str, list[nn.Parameter]]:
    """List the weights of all adapters, by the expert of the layer that they are in."""
    weights = adapter_weights(model)
    found: dict[str, list[nn.Parameter]] = {}
    for expert, names in (model.adapted_layers or {}).items():
        found[expert] = []
        for name in names:
            found[expert] += [weights[key] for key in saved_names(name)]
    return found


def adapter_weights(model: UnifiedModel[Any]) -> dict[str, nn.Parameter]:
    """A and B of each adapter, under the names of PEFT's files."""
    weights = {}
    for name, layer in lora_layers(model).items():
        for key, matrix in zip(saved_names(name), (layer.lora_A, layer.lora_B), strict=True):
            weights[key] = matrix[ADAPTER].weight
    return cast(dict[str, nn.Parameter], weights)


def saved_names(layer: str) -> tuple[str, str]:
    """The names of a layer's A and B in PEFT's files."""
    return f"base_model.model.{layer}.lora_A.weight", f"base_model.model.{layer}.lora_B.weight"


@contextmanager
def switched_off(layers: Iterable[LoraLayer]) -> Iterator[None]:
    """Let a model compute without its adapters in a `with` block.

    Blocks may be nested. Adapters are on again when the block ends, with an error too.

    Args:
        layers: all that `lora_layers` gives; to look for them takes as long as a small forward.
    """
    changed = [layer for layer in layers if not layer.disable_adapters]
    _set_disabled(changed, True)
    try:
        yield
    finally:
        _set_disabled(changed, False)


def _set_disabled(layers: Sequence[LoraLayer], value: bool) -> None:
    # `enable_adapters` also freezes and unfreezes weights, and takes as long as a forward.
    for layer in layers:
        # Past `nn.Module`, which first looks whether the value is a weight.
        object.__setattr__(layer, "_disable_adapters", value)


def base_tensors(model: UnifiedModel[Any]) -> dict[str, Tensor]:
    """The model's own tensors under their original names, without adapters and without copies."""
    # By the name inside the model: the original name, or None for a weight of an adapter.
    renamed: dict[str, str | None] = {}
    for layer in lora_layers(model):
        for kind in ("weight", "bias"):
            renamed[f"{layer}.base_layer.{kind}"] = f"{layer}.{kind}"
        for matrix in ("lora_A", "lora_B"):
            renamed[f"{layer}.{matrix}.{ADAPTER}.weight"] = None
    tensors = {}
    for name, tensor in model.state_dict().items():
        original = renamed.get(name, name)
        if original is not None:
            tensors[original] = tensor
    return tensors


@torch.no_grad()
def merge_adapters(model: UnifiedModel[Any]) -> None:
    """Add what the adapters compute to the weights of their layers, in place.

    Afterwards `base_tensors` are the weights of a model without adapters that computes the same.
    Sums are computed in float32, and rounded once to the dtype of the weights.

    Args:
        model: with adapters or without.
    """
    for layer in lora_layers(model).values():
        cast(Any, layer).merge()

"""Checks of what users hand to an env: actions, prompts, options. Each error names the remedy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from unigrpo_env.mdp.rules import Rules
from unigrpo_env.mdp.state import EncodedPrompt, EpisodeState
from unigrpo_env.mdp.transition import ActingRows
from unigrpo_env.processor import Processor
from unigrpo_env.tasks.task import Prompt


def as_prompt(prompt: str | Prompt) -> Prompt:
    """A prompt as given, or one of these words."""
    if isinstance(prompt, str):
        return Prompt(prompt)
    return prompt


def check_options(options: dict[str, Any] | None, known: set[str]) -> dict[str, Any]:
    """The options of a reset; raises ValueError at a name that is not in `known`."""
    options = options or {}
    unknown = options.keys() - known
    if unknown:
        raise ValueError(
            f"unknown reset options {sorted(unknown)}; expected some of {sorted(known)}"
        )
    return options


def split_action(action: Any) -> tuple[Any, Any]:
    """The entries `token` and `next_latent` of an action; raises KeyError if one is missing."""
    try:
        return action["token"], action["next_latent"]
    except (KeyError, TypeError, IndexError) as error:
        raise KeyError(
            f"expected an action dict with 'token' and 'next_latent', got {action!r:.80}"
        ) from error


def check_action(
    state: EpisodeState, rules: Rules, token: Tensor, next_latent: Tensor, acting: ActingRows
) -> None:
    """Refuse an action that `transition` cannot take.

    A token in range passes even if it is not legal: as in Gymnasium's own masked envs, the mask is
    advice.

    Args:
        state: N episodes.
        rules: what they may do.
        token: `[N]`, integers.
        next_latent: `[N, L, C]`, floating.
        acting: the rows that act.

    Raises:
        TypeError: another dtype.
        ValueError: another shape, a token out of range, or a latent that is not finite.
    """
    rows = len(state.phase)
    _check_entry("token", token, (rows,), integral=True)
    _check_entry("next_latent", next_latent, (rows, *rules.latent_shape), integral=False)
    if len(acting.text):
        _check_tokens(token, rules.vocab_size, acting.text)
    # One sum is faster than a test of every value, and it is finite only if all its terms are. It
    # may also overflow, or meet NaN in a row that does not act: only then are the rows tested.
    if len(acting.image) == 0 or next_latent.sum().isfinite():
        return
    if not next_latent[acting.image].isfinite().all():
        raise ValueError(
            "expected a finite action['next_latent'], got NaN or infinity; "
            "look at the velocity that made it, and at the learning rate"
        )


def _check_entry(name: str, value: Tensor, shape: tuple[int, ...], integral: bool) -> None:
    if tuple(value.shape) != shape:
        raise ValueError(
            f"expected action[{name!r}] of shape {list(shape)}, got {list(value.shape)}; "
            "keep to env.action_space"
        )
    # A boolean is neither: it would pass for the tokens 0 and 1.
    if value.is_floating_point() == integral or value.dtype == torch.bool:
        kind = "a floating"
        if integral:
            kind = "an integer"
        raise TypeError(
            f"expected action[{name!r}] of {kind} dtype, got {value.dtype}; "
            "keep to env.action_space"
        )


def _check_tokens(token: Tensor, vocab_size: int, rows: Tensor) -> None:
    # One test of all rows costs least. Only if it fails does it matter which rows act.
    low, high = token.aminmax()
    if int(low) >= 0 and int(high) < vocab_size:
        return
    chosen = token[rows]
    if int(chosen.min()) < 0 or int(chosen.max()) >= vocab_size:
        raise ValueError(f"expected tokens in [0, {vocab_size}), got {chosen.tolist()}")


def encode_prompt(
    processor: Processor, rules: Rules, prompt: Prompt, system_prompt: str = ""
) -> EncodedPrompt:
    """A prompt in tokens and latents.

    Args:
        processor: of the backbone.
        rules: budgets that the prompt must keep.
        prompt: its words, sources and turns.
        system_prompt: a text before all of them.

    Raises:
        ValueError: it is over a budget, has a control token typed in it, or brings sources or turns
            that the scenario does not take.
    """
    for text in (system_prompt, prompt.text):
        check_words(processor, text)
    sources, pixels = encode_sources(processor, rules, prompt)
    tokens = processor.encode_prompt(
        prompt.text, sources=len(prompt.sources), system=system_prompt, thinks=rules.text_budget > 0
    )
    if len(tokens) > rules.prompt_budget:
        raise ValueError(
            f"the prompt {prompt.text[:60]!r} takes {len(tokens)} tokens with its marks; expected "
            f"at most prompt_budget={rules.prompt_budget}: shorten it or raise the budget"
        )
    # Without its mark in the stream a source would never be read.
    marks = [token for token in tokens if token == rules.image_id]
    if len(marks) != len(prompt.sources):
        raise ValueError(
            f"expected encode_prompt of {type(processor).__name__} to write image_id "
            f"{rules.image_id} once for each of {len(prompt.sources)} sources, got {len(marks)} of "
            "them"
        )
    return EncodedPrompt(
        tokens,
        sources,
        encode_turns(processor, rules, prompt),
        pixels,
        processor.system_length(system_prompt),
    )


def check_words(processor: Processor, text: str) -> None:
    """Refuse control tokens that were typed into a text.

    They would claim an image that does not exist, or an end that was not reached.

    Raises:
        ValueError: the text has one.
    """
    marks = processor.control_ids()
    typed = [token for token in processor.encode_text(text) if token in marks]
    if typed:
        shown = processor.describe_token(typed[0])
        raise ValueError(
            f"expected words in {text[:60]!r}, got the control token {shown!r}; take it out: "
            "the env sets its marks itself, and images come with `Prompt(sources=...)`"
        )


def fit_sources(processor: Processor, rules: Rules, prompt: Prompt) -> Prompt:
    """The prompt with its images in the processor's size; the prompt itself if it has none.

    Raises:
        ValueError: another number, shape, type or range than the scenario reads.
    """
    least = rules.min_source_images
    most = rules.source_images
    if not least <= len(prompt.sources) <= most:
        wanted = str(most)
        if least < most:
            wanted = f"{least} to {most}"
        raise ValueError(
            f"expected {wanted} source images with the prompt {prompt.text[:60]!r}, "
            f"got {len(prompt.sources)}; give `Prompt(sources=...)`"
        )
    if not prompt.sources:
        return prompt
    for image in prompt.sources:
        _check_source(image, [3, *processor.image_size])
    fitted = tuple(processor.fit_source(image.float()) for image in prompt.sources)
    return replace(prompt, sources=fitted)


def encode_sources(
    processor: Processor, rules: Rules, prompt: Prompt
) -> tuple[Tensor, Tensor | None]:
    """A prompt's images as the model reads them; they must have the processor's size.

    Returns:
        Clean latents `[sources, *rules.stored_shape]` float32; and what a vision encoder sees of
        them, `[sources, 3, *rules.pixel_size]` uint8, or None without one.
    """
    count = len(prompt.sources)
    latents = torch.zeros(count, *rules.stored_shape)
    if count == 0:
        return latents, None
    # [sources, 3, height, width]
    images = torch.stack(list(prompt.sources))
    # An image that is only to be understood needs no latent.
    if latents.numel():
        latents = processor.encode_images(images)
    pixels = None
    if rules.has_pixels:
        pixels = processor.view_images(images)
    return latents, pixels


def _check_source(image: Any, expected: list[int]) -> None:
    is_image = isinstance(image, Tensor) and image.ndim == 3 and len(image) == 3
    if not is_image or not image.is_floating_point():
        got = type(image).__name__
        if isinstance(image, Tensor):
            got = f"{list(image.shape)} of {image.dtype}"
        raise ValueError(
            f"expected source images as float tensors of shape {expected} (RGB), got {got}; "
            "resize or convert them first"
        )
    in_range = image.isfinite().all() and image.min() >= 0 and image.max() <= 1
    if not in_range:
        raise ValueError(
            f"expected source images with values in [0, 1], got [{float(image.min()):g}, "
            f"{float(image.max()):g}]; divide bytes by 255"
        )


def encode_turns(processor: Processor, rules: Rules, prompt: Prompt) -> list[list[int]]:
    """What the env writes after each image where the user speaks, as tokens.

    Raises:
        ValueError: turns where the user does not speak, more of them than images to follow, or one
            over the budget or with a control token.
    """
    # A turn stands between two rounds, so none follows the last.
    most = 0
    if rules.turn_budget:
        most = rules.rounds - 1
    if len(prompt.turns) > most:
        raise ValueError(
            f"expected at most {most} turns after the prompt {prompt.text[:60]!r}, "
            f"got {len(prompt.turns)}; raise image_budget, or use a variant in which the user "
            "speaks"
        )
    return [encode_turn(processor, rules, turn) for turn in prompt.turns]


def encode_turn(processor: Processor, rules: Rules, turn: str) -> list[int]:
    """One turn of the user and what opens the next thought, as tokens.

    Raises:
        ValueError: it is over the budget, or has a control token.
    """
    check_words(processor, turn)
    ids = processor.encode_turn(turn, thinks=rules.text_budget > 0)
    if len(ids) > rules.turn_slots:
        # The marks that open the next thought are not a part of the user's budget.
        length = len(ids) - len(rules.continuation_ids)
        raise ValueError(
            f"the turn {turn[:60]!r} takes {length} tokens with its marks; "
            f"expected at most turn_budget={rules.turn_budget}"
        )
    return ids

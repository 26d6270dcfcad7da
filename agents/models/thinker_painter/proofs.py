"""What is tried out before a pipeline is used, so that a wrong use fails at once and in words."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from agents.models.thinker_painter.asked import AskedPipeline, Source
from agents.models.thinker_painter.conditions import Conditions, find_layout

BLANK_SIDE = 64
"""Side of the empty source with which an editor is tried, in pixels, if no size is given."""
GUIDANCE = ("guidance_scale", "true_cfg_scale")
"""Arguments of a call that switch guidance on."""
LONGER = "a longer text with more words " * 8
TOLERANCE = 1e-2
"""Difference of two rows at once to each alone; a row at another's time differs by far more."""


def check_pipeline(pipeline: Any) -> None:
    """Refuse what is no flow-matching pipeline of one transformer.

    Raises:
        ValueError: it is one of another kind; the sentence says which.
    """
    name = type(pipeline).__name__
    parts = {n: p for n, p in pipeline.components.items() if isinstance(p, nn.Module)}
    denoisers = sorted(n for n in parts if n.startswith(("transformer", "unet")))
    if denoisers != ["transformer"]:
        raise ValueError(
            f"expected a pipeline with one transformer, got {name} with {denoisers or 'none'}; "
            "choose one of a family that the docs list"
        )
    missing = [n for n in ("encode_prompt", "prepare_latents") if not hasattr(pipeline, n)]
    if missing or "vae" not in parts:
        raise ValueError(
            f"expected a pipeline with encode_prompt, prepare_latents and a vae, got {name} "
            f"without {', '.join(missing) or 'a vae'}"
        )
    scheduler = pipeline.scheduler
    # Solvers of higher order say in their config whether they follow a flow.
    follows_flow = "FlowMatch" in type(scheduler).__name__ or (
        scheduler.config.get("prediction_type") == "flow_prediction"
    )
    if not follows_flow:
        raise ValueError(
            f"expected a flow-matching pipeline, got {name} with {type(scheduler).__name__}, whose "
            "model predicts noise; choose a flow-matching one, such as Stable Diffusion 3.5"
        )


class _ReachedError(Exception):
    """The transformer was called."""


def find_call(
    pipeline: Any, call: Mapping[str, Any], edits: bool
) -> tuple[dict[str, Any], Source | None]:
    """Arguments with which one velocity is one call of the transformer: guidance is off.

    Args:
        pipeline: see `Painter`.
        call: what the user gives; it is kept.
        edits: whether the pipeline takes a source.

    Returns:
        The arguments, and an empty source if the pipeline does not draw without one.

    Raises:
        ValueError: guidance stays on, or the pipeline fails with these arguments.
    """
    found, calls, failure = _try_out(pipeline, call, edits)
    if found is not None:
        return found
    name = type(pipeline).__name__
    without = {key: value for key, value in call.items() if key not in GUIDANCE}
    # Some pipelines fail in their code for guidance, and would not without it.
    if not calls and without != dict(call) and _try_out(pipeline, without, edits)[0] is not None:
        raise ValueError(
            f"expected {name} without guidance, got an error with it ({failure}): guidance is on; "
            f"switch it off in the arguments of the call, of which these were given: {dict(call)}"
        ) from failure
    if calls:
        raise ValueError(
            f"expected one call of the transformer with one row for one velocity of {name}, got "
            f"calls with {calls} rows: guidance is on; switch it off in the arguments of the call, "
            f"of which these were given: {dict(call)}"
        )
    raise ValueError(
        f"{name} cannot be asked for a velocity with {dict(call)}: {failure}"
    ) from failure


def _try_out(
    pipeline: Any, call: Mapping[str, Any], edits: bool
) -> tuple[tuple[dict[str, Any], Source | None] | None, list[int], Exception | None]:
    """Arguments and source that work, else the rows of the calls and the first error."""
    sources: list[Source | None] = [None]
    if edits:
        size = (call.get("width") or BLANK_SIDE, call.get("height") or BLANK_SIDE)
        sources.append(Source(Image.new("RGB", size)))
    failure: Exception | None = None
    calls: list[int] = []
    for source in sources:
        for extra in _candidates(pipeline, call):
            try:
                calls = _transformer_rows(pipeline, {**call, **extra}, source)
            except Exception as error:
                failure = failure or error
                continue
            if calls == [1]:
                return ({**call, **extra}, source), calls, None
    return None, calls, failure


def _candidates(pipeline: Any, call: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Arguments that may switch guidance off, the usual ones first."""
    known = inspect.signature(type(pipeline).__call__).parameters
    if "true_cfg_scale" in known:
        # Such a family has guidance by this argument alone; its other scale is distilled.
        return [{} if "true_cfg_scale" in call else {"true_cfg_scale": 1.0}]
    embedded = pipeline.transformer.config.get("guidance_embeds", False)
    # A distilled scale is an input of the transformer: the pipeline's own value stays.
    if embedded or "guidance_scale" not in known or "guidance_scale" in call:
        return [{}]
    # Some families count from 1, others from 0.
    return [{"guidance_scale": 1.0}, {"guidance_scale": 0.0}]


def _transformer_rows(pipeline: Any, call: Mapping[str, Any], source: Source | None) -> list[int]:
    """Rows of each call of the transformer that one velocity takes."""
    asked = AskedPipeline(pipeline, call)
    rows: list[int] = []

    def _count(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        latents: Any = args[0] if args else kwargs.get("hidden_states", kwargs.get("x"))
        rows.append(len(latents))

    hook = pipeline.transformer.register_forward_pre_hook(_count, with_kwargs=True)
    try:
        conditions = asked.encode([""], source)
        asked.velocity(conditions, None, torch.tensor([0.5]), source)
    finally:
        hook.remove()
    return rows


def takes_source(asked: AskedPipeline, blank: Any, size: tuple[int, int]) -> bool:
    """Whether an editor takes a source of this size: some refuse small ones.

    Args:
        asked: the pipeline.
        blank: what it encoded without a source.
        size: (height, width) in pixels.
    """

    def _stop(_: Any, args: tuple[Any, ...]) -> None:
        raise _ReachedError

    # The source is prepared before the transformer is called, which need not compute.
    hook = asked.pipeline.transformer.register_forward_pre_hook(_stop)
    source = Source(Image.new("RGB", size[::-1]))
    try:
        asked.velocity(blank, None, torch.tensor([0.5]), source)
    except _ReachedError:
        return True
    except ValueError:
        return False
    finally:
        hook.remove()
    return False


def takes_a_time_per_row(
    asked: AskedPipeline, blank: Conditions, sample: Tensor, source: Source | None
) -> bool:
    """Whether two rows at different times give what each gives alone.

    Args:
        asked: the pipeline.
        blank: conditions of one text.
        sample: one latent in the pipeline's own form.
        source: what is edited.
    """
    times = torch.tensor([0.9, 0.3], device=sample.device)
    two = blank.select(torch.zeros(2, dtype=torch.int64)).value
    alone = [asked.velocity(blank.value, sample, time[None], source)[0] for time in times]
    try:
        both, _ = asked.velocity(two, torch.cat([sample, sample]), times, source)
    except (RuntimeError, ValueError, TypeError, IndexError):
        return False
    expected = torch.cat(alone)
    if both.shape != expected.shape:
        return False
    return torch.allclose(both.float(), expected.float(), rtol=TOLERANCE, atol=TOLERANCE)


def reads_texts_together(asked: AskedPipeline, blank: Any, source: Source | None) -> bool:
    """Whether a text beside a longer one is read as it is alone.

    Some pipelines take one text alone, and some show their encoder the padding of the shorter ones.

    Args:
        asked: the pipeline.
        blank: conditions of the empty text, as `encode_prompt` returned them.
        source: what is edited.
    """
    try:
        two = asked.encode(["", LONGER], source)
    except (RuntimeError, ValueError, TypeError, IndexError):
        return False
    layout = find_layout(blank, asked.encode(["", ""], source))
    beside = Conditions(two, layout, 2).select(torch.tensor([0]))
    alone = Conditions(blank, layout, 1)
    if beside.fits(alone):
        # Padded to one length whatever stands beside it.
        return True
    time = torch.tensor([0.5])
    expected = asked.velocity(alone.value, None, time, source)[0].float()
    found = asked.velocity(beside.value, None, time, source)[0].float()
    weight = next(asked.pipeline.transformer.parameters())
    rounding = 1e-4 if weight.dtype == torch.float32 else TOLERANCE
    return bool((found - expected).norm() <= rounding * expected.norm())

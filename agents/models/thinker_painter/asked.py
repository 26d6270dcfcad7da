"""A pipeline of diffusers that answers single questions, through its own `__call__`.

What a family does between text, latents, flow time and transformer is written once, in its
pipeline. With a schedule of one time that code gives one velocity. With an empty schedule it
decodes. Its own schedule is its grid. Nothing here knows a family.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from torch import Tensor

from agents.models.thinker_painter.told_time import ToldTime

_MISSING = object()


class _AnsweredError(Exception):
    """Ends a call of the pipeline as soon as the answer is there."""


@dataclass
class Source:
    """An image to be edited.

    Attributes:
        image: as the pipeline takes it.
        encoded: what the auto-encoder made of it, so that it runs once.
    """

    image: Image.Image
    encoded: list[Any] = field(default_factory=list)


class _OneTime(FlowMatchEulerDiscreteScheduler):
    """A schedule of the times that are asked for; `step` keeps the velocity and moves nothing."""

    asked: Tensor
    """`[1, N]`: one step, in which each row has a time of its own; or `[0]`: no step."""
    velocity: Tensor | None = None
    sample: Tensor | None = None

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        sigmas: Any = None,
        mu: float | None = None,
        timesteps: Any = None,
    ) -> None:
        """Take the asked times, whatever grid the pipeline wants."""
        self.timesteps = self.asked
        self.sigmas = self.asked.flatten()

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, **_: Any) -> Any:
        """Keep what the pipeline hands over: dx/dt = noise - image, whatever its transformer gives.

        The second positional argument is the time.
        """
        self.velocity = model_output
        self.sample = sample
        return (sample,)


class AskedPipeline:
    """Questions to a flow-matching pipeline.

    All latents here are in the pipeline's own form, such as `[N, C, H, W]` or `[N, L, C]`.

    Args:
        pipeline: its members are replaced during a call, and are back after it.
        call: arguments of each call, such as `height` or `guidance_scale`.
    """

    def __init__(self, pipeline: Any, call: Mapping[str, Any]) -> None:
        self.pipeline = pipeline
        self.call = dict(call)
        # The function itself, without its `torch.no_grad`.
        self._function = inspect.unwrap(type(pipeline).__call__)
        known = inspect.signature(FlowMatchEulerDiscreteScheduler.__init__).parameters
        config = pipeline.scheduler.config
        # Pipelines read their shifts from it.
        self._one_time = _OneTime.from_config({k: v for k, v in config.items() if k in known})
        self._told: ToldTime | None = None
        # A pipeline looks through all its modules for this, which takes longer than all else here.
        self._device: torch.device | None = None
        self._device_of: torch.device | None = None
        members = {"_execution_device": property(lambda _: self._device)}
        self._same_device = type(type(pipeline).__name__, (type(pipeline),), members)

    def moved_to(self, pipeline: Any) -> AskedPipeline:
        """The same questions to a copy of the pipeline."""
        other = AskedPipeline(pipeline, self.call)
        other._told = self._told
        return other

    def encode(self, texts: Sequence[str], source: Source | None = None) -> Any:
        """What the pipeline's own `encode_prompt` returns for these texts."""
        own = self.pipeline.encode_prompt
        found: list[Any] = []

        def _encode(*args: Any, **kwargs: Any) -> None:
            found.append(own(*args, **kwargs))
            raise _AnsweredError

        self._one_time.asked = torch.zeros(0)
        with replaced(self.pipeline, scheduler=self._one_time, encode_prompt=_encode):
            self._run(list(texts), source)
        return found[0]

    def velocity(
        self, conditions: Any, latents: Tensor | None, times: Tensor, source: Source | None = None
    ) -> tuple[Tensor, Tensor]:
        """The velocity at given latents.

        Args:
            conditions: from `encode`.
            latents: N of them; None for noise of the pipeline.
            times: `[N]` flow times in [0, 1], or `[1]` for all rows.
            source: what is edited.

        Returns:
            Velocity and latents as they came to the scheduler.
        """
        place = latents if latents is not None else next(self.pipeline.transformer.parameters())
        times = times.to(place.device)
        told = times if self._told is None else self._told(times)
        self._one_time.asked = told[None] * self._one_time.config["num_train_timesteps"]
        rows = len(times) if latents is None else len(latents)
        members = self._members(conditions, latents)
        with (
            replaced(self.pipeline, **members),
            _encoded_once(self.pipeline, source),
            self._known_device(),
        ):
            self._run([""] * rows, source, output_type="latent")
        velocity = self._one_time.velocity
        sample = self._one_time.sample
        # What is kept would hold the graph of a training step.
        self._one_time.velocity = self._one_time.sample = None
        if velocity is None or sample is None:
            raise ValueError(
                f"expected {type(self.pipeline).__name__} to hand a velocity to its scheduler, got "
                "no call of scheduler.step; it is no flow-matching pipeline of the usual form"
            )
        return velocity, sample

    @contextmanager
    def _known_device(self) -> Iterator[None]:
        """Spare the pipeline the search for its device, which changes with that of its weights."""
        pipeline = self.pipeline
        weights = next(pipeline.transformer.parameters()).device
        if self._device_of != weights:
            self._device = pipeline._execution_device
            self._device_of = weights
        own = type(pipeline)
        pipeline.__class__ = self._same_device
        try:
            yield
        finally:
            pipeline.__class__ = own

    def decode(self, conditions: Any, latents: Tensor, source: Source | None = None) -> Tensor:
        """Images `[N, 3, height, width]` in [0, 1]."""
        return self._decode(conditions, latents, source)[0]

    def decoder_input(
        self, conditions: Any, latents: Tensor, source: Source | None = None
    ) -> Tensor:
        """What `decode` would give to the auto-encoder, which is not run."""
        found: list[Tensor] = []

        def _keep(values: Tensor, *args: Any, **kwargs: Any) -> None:
            found.append(values)
            raise _AnsweredError

        with replaced(self.pipeline.vae, decode=_keep):
            self._decode(conditions, latents, source)
        return found[0]

    def _decode(self, conditions: Any, latents: Tensor, source: Source | None) -> Any:
        self._one_time.asked = torch.zeros(0)
        members = self._members(conditions, latents)
        with replaced(self.pipeline, **members), _encoded_once(self.pipeline, source):
            return self._run([""] * len(latents), source, output_type="pt")

    def learn_told_time(self, conditions: Any, source: Source | None = None) -> None:
        """Find out which time the transformer is told at each flow time.

        Raises:
            ValueError: it depends on the number of steps.
        """
        told_time: ToldTime | None = None
        for steps in (self._one_time.config["num_train_timesteps"], 10):
            times, told = self._schedule(conditions, steps, source)
            if told_time is None:
                told_time = ToldTime(times[:-1], told)
            elif not told_time.agrees(times[:-1], told):
                raise ValueError(
                    f"expected {type(self.pipeline).__name__} to tell its transformer a time that "
                    f"follows from the flow time, got others for {steps} steps than for more"
                )
        self._told = told_time

    def sigmas(self, conditions: Any, steps: int, source: Source | None = None) -> Tensor:
        """`[steps + 1]` flow times of the pipeline's own schedule."""
        return self._schedule(conditions, steps, source)[0]

    def _schedule(
        self, conditions: Any, steps: int, source: Source | None
    ) -> tuple[Tensor, Tensor]:
        """`[steps + 1]` flow times, and `[steps]` what the transformer is told, in [0, 1]."""
        scheduler = self.pipeline.scheduler
        own = scheduler.set_timesteps
        scale = self._one_time.config["num_train_timesteps"]
        found: list[tuple[Tensor, Tensor]] = []

        def _set_timesteps(*args: Any, **kwargs: Any) -> None:
            own(*args, **kwargs)
            found.append((scheduler.sigmas.cpu().clone(), scheduler.timesteps.cpu() / scale))
            raise _AnsweredError

        # Pipelines look there for what they may ask of a scheduler.
        _set_timesteps.__signature__ = inspect.signature(own)  # type: ignore[attr-defined]
        with (
            replaced(self.pipeline, encode_prompt=lambda *_, **__: conditions),
            replaced(scheduler, set_timesteps=_set_timesteps),
            _encoded_once(self.pipeline, source),
        ):
            self._run([""], source, num_inference_steps=steps, output_type="latent")
        return found[0]

    def _members(self, conditions: Any, latents: Tensor | None) -> dict[str, Any]:
        """What stands in place of the pipeline's members in a call."""
        members = {
            "scheduler": self._one_time,
            "encode_prompt": lambda *_, **__: conditions,
        }
        if latents is None:
            return members
        own = self.pipeline.prepare_latents

        def _prepare_latents(*args: Any, **kwargs: Any) -> Any:
            # Its own results beside the noise are needed: positions, and latents of a source.
            result = own(*args, **kwargs)
            if isinstance(result, tuple):
                return (latents.to(result[0].dtype), *result[1:])
            return latents.to(result.dtype)

        return {**members, "prepare_latents": _prepare_latents}

    def _run(self, prompts: list[str], source: Source | None, **options: Any) -> Any:
        """Call the pipeline; None if a member ended the call."""
        if source is not None:
            options["image"] = source.image
        # Noise is drawn and thrown away. With a generator of its own the global one is untouched.
        generator = torch.Generator().manual_seed(0)
        arguments = {"num_inference_steps": 1, **self.call, **options}
        try:
            return self._function(
                self.pipeline, prompt=prompts, generator=generator, return_dict=False, **arguments
            )
        except _AnsweredError:
            return None


@contextmanager
def replaced(target: Any, **members: Any) -> Iterator[None]:
    """Put members in place of those of an object, and take them back, with an error too."""
    # Past `__setattr__`, which in a pipeline also changes its config.
    before = {name: target.__dict__.get(name, _MISSING) for name in members}
    target.__dict__.update(members)
    try:
        yield
    finally:
        for name, member in before.items():
            if member is _MISSING:
                del target.__dict__[name]
            else:
                target.__dict__[name] = member


@contextmanager
def _encoded_once(pipeline: Any, source: Source | None) -> Iterator[None]:
    """Let the auto-encoder see a source once, however often it is asked for."""
    if source is None:
        yield
        return
    own: Callable[..., Any] = pipeline.vae.encode
    # A pipeline encodes the same images in the same order in each call.
    kept = iter(list(source.encoded))

    def _encode(*args: Any, **kwargs: Any) -> Any:
        found = next(kept, None)
        if found is None:
            with torch.no_grad():
                found = own(*args, **kwargs)
            source.encoded.append(found)
        return found

    with replaced(pipeline.vae, encode=_encode):
        yield

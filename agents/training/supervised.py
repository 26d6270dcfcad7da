"""Supervised losses on demonstrations: next token for the text, flow matching for the images.

A demonstration is laid out as the env would lay out its episode, and read by the same walk as
recorded episodes. The text loss is the mean of -log p, the image loss the squared velocity error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from agents.models.base import UnifiedModel
from agents.policy.evaluate import evaluate_actions
from agents.trajectory import Trajectory
from unigrpo_env.flow_time import shift_time
from unigrpo_env.mdp.rules import Role, lay_out_roles
from unigrpo_env.processor import Processor
from unigrpo_env.tasks.task import Demonstration, DemonstrationTask
from unigrpo_env.variants.variant import Variant


@dataclass
class Stream:
    """The tokens of one demonstration.

    Attributes:
        prompt: everything before the first token that the model would sample.
        tokens: what follows it.
        chosen: for each of `tokens`, whether the model is to learn it.
        image_positions: where in prompt and tokens the images stand that are read: the sources,
            then the drawn ones.
        prompt_roles: for each of `prompt`, who wrote it, a `Role`.
        roles: for each of `tokens`, likewise.
    """

    prompt: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    chosen: list[bool] = field(default_factory=list)
    prompt_roles: list[int] = field(default_factory=list)
    roles: list[int] = field(default_factory=list)
    image_positions: list[int] = field(default_factory=list)

    def write(self, ids: Sequence[int], chosen: bool, roles: Sequence[int] | None = None) -> None:
        """Append tokens.

        Args:
            ids: the tokens.
            chosen: whether the model is to learn them.
            roles: who wrote each; the model if left out.
        """
        self.tokens += ids
        self.chosen += [chosen] * len(ids)
        self.roles += roles or [Role.MODEL] * len(ids)


def lay_out(
    processor: Processor,
    demonstration: Demonstration,
    system: str = "",
    end_id: int | None = None,
) -> Stream:
    """A demonstration as the env would lay out its episode.

    Args:
        processor: of the backbone.
        demonstration: prompt, thoughts and images.
        system: a system text before the prompt.
        end_id: the token that closes a text after the last image; None for `open_image_id`.
    """
    stream = Stream()
    prompt = demonstration.prompt
    turns: tuple[str, ...] = ()
    # None stands for no thought at all, "" for an empty one.
    first_thinks = demonstration.thoughts[0] is not None
    if prompt is not None:
        stream.prompt = processor.encode_prompt(
            prompt.text, sources=len(prompt.sources), system=system, thinks=first_thinks
        )
        turns = prompt.turns
        stream.prompt_roles = lay_out_roles(
            len(stream.prompt),
            processor.system_length(system),
            processor.opening_length(first_thinks),
        )
    # The processor decides where in the prompt its sources stand.
    for position, token in enumerate(stream.prompt):
        if token == processor.image_id:
            stream.image_positions.append(position)
    for number, thought in enumerate(demonstration.thoughts):
        if number:
            stream.image_positions.append(len(stream.prompt) + len(stream.tokens))
            stream.write([cast(int, processor.image_id)], chosen=False)
            thinks = thought is not None
            if number <= len(turns):
                ids = processor.encode_turn(turns[number - 1], thinks=thinks)
                roles = lay_out_roles(len(ids), opening=processor.opening_length(thinks))
                stream.write(ids, False, roles)
            else:
                stream.write(processor.continuation_ids(thinks), chosen=False)
        if thought is not None:
            ids = processor.encode_text(thought)
            stream.write(ids, chosen=True)
            if number < len(demonstration.images):
                stream.write([processor.open_image_id], chosen=True)
            elif processor.end_id is None or ids[-1:] != [processor.end_id]:
                # The last text ends the episode, unless it already ends in that token.
                closing = processor.open_image_id if end_id is None else end_id
                stream.write([closing], chosen=True)
    return stream


def pad(rows: Sequence[Sequence[int]], fill: int = 0) -> Tensor:
    """Lists of integers as `[N, T]` int64, padded.

    Args:
        rows: N lists.
        fill: what the unused end holds.
    """
    longest = max(map(len, rows))
    padded = [[*row, *[fill] * (longest - len(row))] for row in rows]
    return torch.tensor(padded, dtype=torch.int64).view(len(rows), longest)


def _lay_out_all(variant: Variant, demonstrations: Sequence[Demonstration]) -> list[Stream]:
    end_id = variant.rules.end_id
    streams = []
    for demonstration in demonstrations:
        stream = lay_out(variant.processor, demonstration, variant.system_prompt, end_id)
        streams.append(stream)
    return streams


def as_trajectory(
    variant: Variant,
    demonstrations: Sequence[Demonstration],
    latents: Tensor,
    t: Tensor,
    noise: Tensor,
) -> Trajectory:
    """Demonstrations as recorded episodes, each image with one point of its noising process.

    Args:
        variant: its processor and its system prompt.
        demonstrations: N episodes, of whatever scenarios that share these.
        latents: `[I, L, C]`, of the images of all demonstrations, one after the other.
        t: `[I]` in [0, 1], 1 is noise.
        noise: `[I, L, C]`; x_t = (1 - t) latents + t noise.
    """
    streams = _lay_out_all(variant, demonstrations)
    drawn = torch.tensor([len(each.images) for each in demonstrations])
    rows = len(streams)
    images = int(drawn.max())
    device = latents.device
    shape = latents.shape[1:]
    # [I] each: image `number` of row `row` is entry `row, number` of what follows.
    row = torch.arange(rows).repeat_interleave(drawn)
    number = torch.cat([torch.arange(int(count)) for count in drawn])
    level = t[:, None, None]
    window_latents = torch.zeros(rows, images, 2, *shape, device=device)
    # A window of one step: x_t, and an unused latent behind it.
    window_latents[row, number, 0] = (1 - level) * latents + level * noise
    window_times = torch.zeros(rows, images, 2, device=device)
    window_times[row, number, 0] = t
    nothing = torch.zeros(rows, images, device=device)
    none = torch.zeros(rows, dtype=torch.int64)
    trajectory = Trajectory(
        **_tokens_of(streams),
        window_latents=window_latents,
        window_means=torch.zeros(rows, images, 1, *shape, device=device),
        window_times=window_times,
        images_drawn=drawn,
        latent=torch.zeros(rows, *shape, device=device),
        **_images_to_read(variant, demonstrations, streams, latents, (row, number)),
        reward=nothing[:, 0],
        thought_reward=nothing,
        round_reward=nothing,
        group=none,
        seed=none,
        batch_size=[rows],
    )
    return trajectory.to(device)


def _tokens_of(streams: Sequence[Stream]) -> dict[str, Tensor]:
    """The fields of a trajectory that hold tokens, or say something of each of them."""
    lengths = torch.tensor([len(stream.tokens) for stream in streams])
    tokens = pad([stream.tokens for stream in streams])
    return {
        "prompt_tokens": pad([stream.prompt for stream in streams]),
        "prompt_roles": pad([stream.prompt_roles for stream in streams]),
        "prompt_length": torch.tensor([len(stream.prompt) for stream in streams]),
        "tokens": tokens,
        "roles": pad([stream.roles for stream in streams]),
        "text_mask": torch.arange(tokens.shape[1]) < lengths[:, None],
        "chosen_mask": pad([list(map(int, stream.chosen)) for stream in streams]).bool(),
        "log_prob": torch.zeros(tokens.shape),
    }


def _images_to_read(
    variant: Variant,
    demonstrations: Sequence[Demonstration],
    streams: Sequence[Stream],
    latents: Tensor,
    place: tuple[Tensor, Tensor],
) -> dict[str, Tensor]:
    """The fields of a trajectory that say which images are read, and where; sources stand first."""
    processor = variant.processor
    sources = [_fitted_sources(variant, demonstration) for demonstration in demonstrations]
    counts = torch.tensor([len(found) for found in sources])
    most = int(counts.max())
    row, number = place
    slots = most + int(number.max()) + 1
    # A row with fewer sources than another leaves slots empty.
    clean = latents.new_zeros(len(streams), slots, *latents.shape[1:])
    clean[row, most + number] = latents
    positions = torch.full((len(streams), slots), -1)
    for index, stream in enumerate(streams):
        count = len(sources[index])
        places = torch.tensor(stream.image_positions, dtype=torch.int64)
        positions[index, :count] = places[:count]
        positions[index, most : most + len(places) - count] = places[count:]
    size = processor.pixel_size or (0, 0)
    pixels = torch.zeros(len(streams), slots, 3, *size, dtype=torch.uint8)
    if most:
        # All sources side by side, and where each belongs.
        images = torch.stack([image for found in sources for image in found])
        source_row = torch.arange(len(streams)).repeat_interleave(counts)
        source_slot = torch.cat([torch.arange(int(count)) for count in counts])
        clean[source_row, source_slot] = processor.encode_images(images).to(clean)
        if processor.pixel_size is not None:
            pixels[source_row, source_slot] = processor.view_images(images)
    is_read = positions[row, most + number] >= 0
    if processor.pixel_size is not None and is_read.any():
        drawn = torch.cat([demonstration.images for demonstration in demonstrations])
        pixels[row[is_read], most + number[is_read]] = processor.view_images(drawn[is_read])
    return {"images": clean, "pixels": pixels, "image_positions": positions}


def _fitted_sources(variant: Variant, demonstration: Demonstration) -> tuple[Tensor, ...]:
    """The source images of a demonstration, in the size that the env would give them."""
    if demonstration.prompt is None:
        return ()
    fit = variant.processor.fit_source
    return tuple(fit(image.float()) for image in demonstration.prompt.sources)


def supervised_losses(
    model: UnifiedModel[Any],
    variant: Variant,
    demonstrations: Sequence[Demonstration],
    latents: Tensor,
    t: Tensor,
    noise: Tensor,
) -> tuple[Tensor, Tensor]:
    """The two losses of a batch, in nats a token (0 without text) and mean squared velocity error.

    Args:
        model: see `agents.models.base.UnifiedModel`.
        variant: its processor and its system prompt.
        demonstrations: N episodes, of whatever scenarios that share these.
        latents: `[I, L, C]`, of the images of all demonstrations, one after the other.
        t: `[I]` in [0, 1], 1 is noise.
        noise: `[I, L, C]`; the velocity to learn is noise - latents.
    """
    episodes = as_trajectory(variant, demonstrations, latents, t, noise)
    # Supervision is over the whole vocabulary: what is illegal is to be learnt as well.
    legal = torch.ones(1, model.vocab_size, dtype=torch.bool, device=latents.device)
    found = evaluate_actions(model, episodes, legal, grad_through_read_images=True)
    chosen = episodes.chosen_mask
    text = -(found.log_prob * chosen).sum() / chosen.sum().clamp(min=1)
    assert found.velocity is not None
    number = torch.arange(found.velocity.shape[1], device=latents.device)
    drawn = number < episodes.images_drawn[:, None]
    # Row by row, in the order of `latents`.
    velocity = found.velocity[:, :, 0][drawn]
    return text, ((velocity - (noise - latents)) ** 2).mean()


def sample_losses(
    model: UnifiedModel[Any],
    variant: Variant,
    demonstrations: Sequence[Demonstration],
    generator: torch.Generator,
    time_shift: float,
) -> tuple[Tensor, Tensor]:
    """`supervised_losses` at random points of the noising process.

    Args:
        model: see `supervised_losses`.
        variant: likewise.
        demonstrations: likewise.
        generator: of t (uniform, then shifted) and of standard normal noise, on the CPU.
        time_shift: of t towards noise.
    """
    device = model.device
    images = torch.cat([demonstration.images for demonstration in demonstrations])
    latents = variant.processor.encode_images(images)
    t = shift_time(torch.rand(len(latents), generator=generator), time_shift)
    noise = torch.randn(latents.shape, generator=generator)
    return supervised_losses(
        model, variant, demonstrations, latents.to(device), t.to(device), noise.to(device)
    )


def require_demonstrations(variant: Variant) -> DemonstrationTask:
    """The variant's task.

    Args:
        variant: a scenario.

    Raises:
        ValueError: its task has no demonstrations.
    """
    if not hasattr(variant.task, "demonstrations"):
        raise ValueError(f"expected a task with demonstrations, got {type(variant.task).__name__}")
    return cast(DemonstrationTask, variant.task)

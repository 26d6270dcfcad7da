"""Episodes and scores as bytes, for a reward on another machine. Nothing in them can be executed.

Episodes are one safetensors blob: the images as tensors, the words as JSON in its metadata. Scores
are JSON, with null for NaN.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from rewards.base import EpisodeBatch, Failures, Scores

FORMAT = 1
"""The number of this form. It grows when a reader of the older form would misunderstand it."""

ENTRY = "episodes"
"""Where the words stand in the metadata of the blob."""

MEDIA_TYPE = "application/octet-stream"
"""Of the blob, since safetensors has no registered type."""

DTYPES = (torch.uint8, torch.float32)
"""Images are bytes, which stand for [0, 1], or exact numbers."""


def pack_episodes(episodes: EpisodeBatch, exact: bool = False) -> bytes:
    """Turn episodes into bytes.

    Args:
        episodes: what a reward will score. Their metadata may hold what JSON has: texts, numbers,
            true and false, None, lists, and mappings with texts as keys. A tuple arrives as a list.
        exact: keep the float32 of the images. Otherwise they are rounded to bytes, a quarter of
            the size, which loses nothing of an image that came from bytes.

    Raises:
        ValueError: metadata that JSON cannot hold; or pixels that are NaN or infinite, which no
            byte stands for.
    """
    # `safetensors.torch` refuses tensors that share memory, as images cut from one batch do.
    from safetensors.numpy import save

    images = {"images": episodes.images}
    for row, (drawn, sources) in enumerate(zip(episodes.all_images, episodes.sources, strict=True)):
        # What an EpisodeBatch fills in by itself is not sent.
        if not torch.equal(drawn, episodes.images[row : row + 1]):
            images[f"all_images.{row}"] = drawn
        if sources.shape != episodes.images[:0].shape:
            images[f"sources.{row}"] = sources
    words = {
        "prompts": episodes.prompts,
        "texts": episodes.texts,
        "thoughts": episodes.thoughts,
        "metadata": [
            _plain(entries, f"metadata[{row}]") for row, entries in enumerate(episodes.metadata)
        ],
    }
    tensors = {name: _stored(image, exact, name).numpy() for name, image in images.items()}
    return save(tensors, metadata={ENTRY: json.dumps(words)})


def unpack_episodes(blob: bytes) -> EpisodeBatch:
    """Read episodes from bytes, which may come from anybody.

    Args:
        blob: from `pack_episodes`.

    Returns:
        The episodes. Their images are float32, whatever was sent.

    Raises:
        ValueError: the bytes are no safetensors, or not in the form of `pack_episodes`.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(blob)
        # The library has checked this head, but gives no access to the metadata in it.
        length = int.from_bytes(blob[:8], "little")
        head = json.loads(blob[8 : 8 + length])
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"expected episodes as a safetensors blob, got {len(blob)} bytes that are no "
            f"safetensors: {error}"
        ) from error
    try:
        return _read_episodes(tensors, json.loads(head["__metadata__"][ENTRY]))
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise ValueError(
            "expected a safetensors blob from rewards.service.wire.pack_episodes, got another one: "
            f"{type(error).__name__}: {error}"
        ) from error


def is_finite(episodes: EpisodeBatch, row: int) -> bool:
    """Whether all pixels of an episode are finite, so that bytes can stand for them.

    Args:
        episodes: a batch.
        row: of the episode.
    """
    # The last of all images need not be the one in `images`.
    images = (episodes.images[row], episodes.all_images[row], episodes.sources[row])
    return all(bool(image.isfinite().all()) for image in images)


def pack_scores(scores: Scores) -> bytes:
    """Turn scores into JSON: `reward` and each component as lists, and `failures`.

    Args:
        scores: no component is named `reward` or `failures`.
    """
    lists = {"reward": scores.reward, **scores.components}
    answer: dict[str, Any] = {}
    for name, values in lists.items():
        # JSON has neither NaN nor infinity.
        answer[name] = [value if math.isfinite(value) else None for value in values.tolist()]
    first = scores.failures.first
    text = None
    if first is not None:
        text = str(first) or type(first).__name__
    answer["failures"] = {"counts": scores.failures.counts, "first": text}
    return json.dumps(answer, allow_nan=False).encode()


def unpack_scores(answer: bytes, count: int) -> Scores:
    """Read scores from JSON.

    Args:
        answer: from `pack_scores`; `failures` may be left out.
        count: the number of episodes that were sent.

    Returns:
        The scores. The first of their failures is a RuntimeError with the text that was sent.

    Raises:
        ValueError: the bytes are no such JSON, or a list has another length.
        OverflowError: a whole number that no float holds.
    """
    entries = json.loads(answer)
    if not isinstance(entries, dict) or "reward" not in entries:
        raise ValueError("expected a JSON object with the key 'reward'")
    told = entries.pop("failures", {})
    if not isinstance(told, dict) or not isinstance(told.get("counts", {}), dict):
        raise ValueError("expected 'failures' as an object with the object 'counts'")
    lists = {name: _numbers(name, values, count) for name, values in entries.items()}
    first = None
    if told.get("first") is not None:
        first = RuntimeError(str(told["first"]))
    counts = {str(kind): int(number) for kind, number in told.get("counts", {}).items()}
    return Scores(lists.pop("reward"), lists, Failures(counts, first))


def pack_health(names: Iterable[str]) -> bytes:
    """What a server says of itself, as JSON.

    Args:
        names: of its rewards.
    """
    try:
        ours = version("unigrpo")
    except PackageNotFoundError:
        # Run from its sources.
        ours = "unknown"
    return json.dumps({"rewards": sorted(names), "version": ours, "format": FORMAT}).encode()


def unpack_health(answer: bytes) -> tuple[list[str], int]:
    """The names of the rewards of a server, and the number of the form that it reads.

    Args:
        answer: from `pack_health`.

    Raises:
        ValueError: the bytes are no such JSON.
    """
    told = json.loads(answer)
    if not isinstance(told, dict) or not {"rewards", "format"} <= told.keys():
        raise ValueError("expected a JSON object with 'rewards' and 'format'")
    return [str(name) for name in told["rewards"]], int(told["format"])


def _plain(value: Any, place: str) -> Any:
    """A value of the types that JSON has."""
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, list | tuple):
        return [_plain(entry, f"{place}[{index}]") for index, entry in enumerate(value)]
    if isinstance(value, Mapping):
        for key in value:
            # JSON would turn a number into a text without a word.
            if not isinstance(key, str):
                raise ValueError(f"expected texts as keys of {place}, got {key!r}; {_REMEDY}")
        return {key: _plain(entry, f"{place}[{key!r}]") for key, entry in value.items()}
    raise ValueError(f"expected {place} of a type that JSON has, got {type(value)}; {_REMEDY}")


_REMEDY = (
    "only texts, numbers, true and false, None, lists and mappings of texts to these reach a "
    "reward on a server: let the task make such metadata, or score in this process"
)


def _stored(image: Tensor, exact: bool, name: str) -> Tensor:
    """Images as they are sent, on the CPU."""
    image = image.detach().float().contiguous()
    if exact:
        return image.cpu()
    if not bool(image.isfinite().all()):
        raise ValueError(
            f"expected finite pixels in {name}, got NaN or infinity; leave those episodes out, or "
            "send them with exact=True"
        )
    # Converted where they are: a GPU is faster, and a quarter of the bytes leave it.
    return (image.clamp(0, 1) * 255).round().to(torch.uint8).cpu()


def _read_episodes(tensors: Mapping[str, Tensor], words: Mapping[str, Any]) -> EpisodeBatch:
    """Episodes from the checked parts of a blob."""
    read = {name: _read_images(name, tensor) for name, tensor in tensors.items()}
    images = read.pop("images")
    count = len(images)
    prompts = _listed(words, "prompts", str, count)
    texts = _listed(words, "texts", str, count)
    metadata = _listed(words, "metadata", dict, count)
    thoughts = _listed(words, "thoughts", list, count)
    for entry in thoughts:
        if not all(isinstance(thought, str) for thought in entry):
            raise ValueError("expected texts in 'thoughts'")
    all_images = []
    sources = []
    for row in range(count):
        all_images.append(read.pop(f"all_images.{row}", images[row : row + 1]))
        sources.append(read.pop(f"sources.{row}", images[:0]))
    if read:
        raise ValueError(f"unknown tensors {sorted(read)[:3]}")
    return EpisodeBatch(prompts, texts, images, metadata, all_images, thoughts, sources)


def _read_images(name: str, tensor: Tensor) -> Tensor:
    """Images as float32."""
    if tensor.ndim != 4 or tensor.shape[1] != 3 or tensor.dtype not in DTYPES:
        raise ValueError(
            f"expected {name} as [count, 3, height, width] uint8 or float32, got "
            f"{list(tensor.shape)} {tensor.dtype}"
        )
    if tensor.dtype == torch.uint8:
        return tensor.float() / 255
    return tensor


def _listed(words: Mapping[str, Any], key: str, kind: type, count: int) -> list[Any]:
    """A list of words with one entry for each episode."""
    entries: Any = words[key]
    if not isinstance(entries, list) or len(entries) != count:
        raise ValueError(f"expected a list of {count} entries, one an image, under {key!r}")
    if not all(isinstance(entry, kind) for entry in entries):
        raise ValueError(f"expected entries of the type {kind.__name__} under {key!r}")
    return entries


def _numbers(name: str, values: Sequence[float | None], count: int) -> Tensor:
    """`[count]` float32 of a list from JSON."""
    if not isinstance(values, list) or len(values) != count:
        raise ValueError(f"expected {count} numbers under {name!r}, one an episode")
    numbers = []
    for value in values:
        if value is None:
            numbers.append(math.nan)
        elif isinstance(value, int | float):
            numbers.append(float(value))
        else:
            raise ValueError(f"expected numbers or null under {name!r}, got {value!r:.60}")
    return torch.tensor(numbers, dtype=torch.float32)

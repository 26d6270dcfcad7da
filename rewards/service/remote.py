"""A reward that runs on a server of `unigrpo serve-reward`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any
from urllib.parse import quote

import torch
from torch import Tensor

from rewards.base import EpisodeBatch, Failures, Scores
from rewards.registry import did_you_mean
from rewards.service.background import then
from rewards.service.client import CallError, HttpClient, Limits, Request
from rewards.service.wire import (
    FORMAT,
    MEDIA_TYPE,
    is_finite,
    pack_episodes,
    unpack_health,
    unpack_scores,
)

LIMITS = {"concurrency": 4, "timeout": 120.0, "budget": 600.0}
"""What differs from the defaults of `Limits`. The server scores one request at a time, so more of
them only wait there, within the time of their try."""

PREPARE_SECONDS = 30.0
"""A server must answer in this time before the first episode."""


class Remote:
    """Asks a server of `unigrpo serve-reward` to score.

    The server sees all that a reward sees, so its scores are those of the same reward in this
    process. Images are sent as bytes, which rounds them to the nearest of 256 levels, unless
    `exact` is set. What cannot be sent or is not answered is NaN, never 0, with what the server
    said about it in the failures.

    Args:
        url: of the server, such as "http://gpu-box:8000".
        name: of a reward on the server; "sum" is all that it serves, with its weights.
        batch: so many episodes are sent in one request.
        exact: send images as float32, four times as many bytes.
        token: sent as bearer token. It stays in the config of the run.
        token_variable: the environment variable that holds the token; that is never stored.
        limits: entries of `rewards.service.client.Limits`, such as `{"budget": 1200}`. Here the
            concurrency is 4, a try may take 120 seconds and a batch 600, unless they are given.

    Raises:
        ValueError: a batch below 1, or what `HttpClient` refuses.
    """

    def __init__(
        self,
        *,
        url: str,
        name: str = "sum",
        batch: int = 16,
        exact: bool = False,
        token: str | None = None,
        token_variable: str | None = None,
        limits: Limits | Mapping[str, Any] | None = None,
    ) -> None:
        if not isinstance(batch, int) or batch < 1:
            raise ValueError(f"expected batch as a whole number of at least 1, got {batch!r}")
        if not isinstance(limits, Limits):
            limits = {**LIMITS, **(limits or {})}
        self.name = name
        self.batch = batch
        self.exact = exact
        self.client = HttpClient(url=url, token=token, token_variable=token_variable, limits=limits)

    def prepare(self) -> None:
        """Ask the server whether it has the reward.

        Raises:
            CallError: the server does not answer, or refuses the token.
            ValueError: it has no reward of that name, or speaks another form of the wire.
            ImportError: httpx2 is not installed.
        """
        names, form = self.client.ask(Request("/health", unpack_health), PREPARE_SECONDS)
        if form != FORMAT:
            raise ValueError(
                f"expected a server that speaks form {FORMAT} of the wire, but {self.client.url} "
                f"speaks form {form}; install the same version of this library on both sides"
            )
        if self.name not in names:
            raise ValueError(
                f"expected the option 'name' of reward 'remote' to be a reward of "
                f"{self.client.url}, got {self.name!r}; {did_you_mean(self.name, names)}"
            )

    def __call__(self, episodes: EpisodeBatch) -> Scores:
        """Score a batch of episodes, and wait for it.

        Args:
            episodes: what to score.

        Returns:
            The reward, with the components that the server has. Their names begin with that of
            their reward, except if that is the reward which was asked for.

        Raises:
            ValueError: metadata that JSON cannot hold, or the environment has no token.
            ImportError: httpx2 is not installed.
        """
        return self.submit(episodes).result()

    def submit(self, episodes: EpisodeBatch) -> Future[Scores]:
        """Begin to score a batch of episodes, and return at once.

        Args:
            episodes: what to score. They are packed while the requests before them are under
                way, so they must not change until the future is done.

        Returns:
            A future of what a call returns.

        Raises:
            ValueError: the environment has no token.
            ImportError: httpx2 is not installed.
        """
        rows = [row for row in range(len(episodes)) if self.exact or is_finite(episodes, row)]
        chunks = [rows[start : start + self.batch] for start in range(0, len(rows), self.batch)]
        requests = [self._request(episodes, chunk) for chunk in chunks]
        begun = self.client.submit_batch(requests)
        return then(begun, lambda answers: self._together(len(episodes), chunks, answers))

    def _request(self, episodes: EpisodeBatch, rows: Sequence[int]) -> Request[Scores]:
        """The request for some episodes."""
        return Request(
            f"/score/{quote(self.name)}",
            partial(unpack_scores, count=len(rows)),
            lambda: pack_episodes(_select(episodes, rows), self.exact),
            MEDIA_TYPE,
        )

    def _together(
        self, count: int, chunks: Sequence[Sequence[int]], answers: Sequence[Scores | CallError]
    ) -> Scores:
        """Put the answers in the order of the episodes."""
        unknown = torch.full((count,), torch.nan)
        reward = unknown.clone()
        components: dict[str, Tensor] = {}
        failures = Failures()
        asked = 0
        for rows, answer in zip(chunks, answers, strict=True):
            asked += len(rows)
            if isinstance(answer, CallError):
                failures = failures.merged(Failures.of([answer] * len(rows)))
                continue
            reward[rows] = answer.reward
            for name, values in answer.components.items():
                if name == self.name:
                    # The reward itself, without a weight.
                    continue
                label = name.removeprefix(f"{self.name}/")
                components.setdefault(label, unknown.clone())[rows] = values
            failures = failures.merged(answer.failures)
        if asked < count:
            error = CallError(
                "no image", "an image has pixels that are NaN or infinite; send them with `exact`"
            )
            failures = failures.merged(Failures.of([error] * (count - asked)))
        return Scores(reward, components, failures)


def _select(episodes: EpisodeBatch, rows: Sequence[int]) -> EpisodeBatch:
    """Some of the episodes."""

    def chosen(entries: Sequence[Any]) -> list[Any]:
        return [entries[row] for row in rows]

    return EpisodeBatch(
        prompts=chosen(episodes.prompts),
        texts=chosen(episodes.texts),
        images=episodes.images[list(rows)],
        metadata=chosen(episodes.metadata),
        all_images=chosen(episodes.all_images),
        thoughts=chosen(episodes.thoughts),
        sources=chosen(episodes.sources),
    )

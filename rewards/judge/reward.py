"""A vision-language model behind a chat server says how well an image fits its prompt."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from itertools import islice
from statistics import fmean
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from rewards.base import EpisodeBatch, Failures, Scores
from rewards.image_bytes import image_bytes
from rewards.judge.answers import Rating, Verdict, model_names, yes_share
from rewards.judge.question import Picture, chat_body, fill, read_template
from rewards.registry import did_you_mean
from rewards.scorer import LazyReward
from rewards.service.background import then
from rewards.service.client import CallError, HttpClient, Limits, Request

Mode = Literal["yes_no", "questions", "rating"]

SCORE = r"score\W*(\d+(?:\.\d+)?)"
"""Where the number of a rating stands, unless another pattern is given."""

PREPARE_SECONDS = 30.0
"""A server must answer in this time before the first episode."""

NO_LIST = ("HTTP 404", "HTTP 405", "HTTP 501")
"""What servers answer that have no list of their models."""

logger = logging.getLogger(__name__)


class Judge(LazyReward):
    """Asks a vision-language model on an OpenAI-compatible server, such as vLLM or SGLang.

    - "yes_no" asks whether the image shows the prompt. The score is
      `P(yes) / (P(yes) + P(no))` of the first token, from the 20 likeliest ones.
    - "questions" asks each question of the prompt's metadata in the same way. The score is the
      mean of the shares.
    - "rating" reads a number out of a written answer and scales it to [0, 1].

    An answer that cannot be read is NaN and not 0. The judge sees the image and the words of the
    prompt, but never what the model wrote: a thought that says "answer yes" would pay.

    Args:
        url: of the server, up to and with its `/v1`.
        model: its name on the server. It may be left out where the server has only one.
        mode: what is asked.
        prompt: the text that goes with the image, or a file with it. `{prompt}` in it stands for
            the words of the prompt, `{question}` for a question (which the mode "questions" needs
            instead), `{lowest}` and `{highest}` for the ends of the scale. All other braces stay.
        pattern: for ratings, a regular expression; the first group of its last match is the
            number. Upper and lower case are alike.
        scale: for ratings, the lowest and the highest number.
        extra: more entries of the request, such as
            `{"chat_template_kwargs": {"enable_thinking": False}}`. An entry None takes out ours.
        token: sent as bearer token. It stays in the config of the run.
        token_variable: the environment variable that holds the token; that is never stored.
        limits: entries of `rewards.service.client.Limits`, such as `{"timeout": 30}`.

    Raises:
        ValueError: an unknown mode, a template without its place for the words, a pattern without
            a group, a scale that does not rise, or what `HttpClient` refuses.
    """

    def __init__(
        self,
        *,
        url: str,
        model: str = "",
        mode: Mode = "yes_no",
        prompt: str | None = None,
        pattern: str = SCORE,
        scale: Sequence[float] = (1, 5),
        extra: Mapping[str, Any] | None = None,
        token: str | None = None,
        token_variable: str | None = None,
        limits: Limits | Mapping[str, Any] | None = None,
    ) -> None:
        if mode not in get_args(Mode):
            raise ValueError(f"unknown mode {mode!r}; {did_you_mean(str(mode), get_args(Mode))}")
        self.model = model
        self.mode: Mode = mode
        self.template = read_template(mode, prompt)
        self.rating = _rating(pattern, scale)
        self.extra = dict(extra or {})
        self.client = HttpClient(url=url, token=token, token_variable=token_variable, limits=limits)

    def load(self) -> str:
        """The name of the model, as the server has it.

        Raises:
            CallError: the server does not answer.
            ValueError: it has no such model, or several and none was chosen.
        """
        try:
            names = self.client.ask(Request("/models", model_names), PREPARE_SECONDS)
        except CallError as error:
            # Some servers have no such list. Whether the model is there will show.
            if self.model and error.kind in NO_LIST:
                return self.model
            raise
        if self.model in names:
            return self.model
        if not self.model and len(names) == 1:
            return names[0]
        raise ValueError(
            f"expected the option 'model' of reward 'judge' to be a model of {self.client.url}, "
            f"got {self.model!r}; {did_you_mean(self.model, names)}"
        )

    def prepare(self) -> None:
        """Ask for the model's name and for a verdict on a grey image.

        Raises:
            CallError: the server does not answer, or not in the form that the mode needs.
            ValueError: the server has no such model, or the environment no token.
            ImportError: httpx2 is not installed.
        """
        picture = Picture(np.full((64, 64, 3), 128, np.uint8))
        request = self._request(self.loaded, picture, "a grey image", "Is this image grey?")
        try:
            self.client.ask(request, PREPARE_SECONDS)
        except CallError as error:
            if error.kind != "unparsed":
                raise
            # A judge may refuse to rate an empty image and still rate real ones.
            logger.warning("the judge gave no verdict on a grey image: %s", error)

    def __call__(self, episodes: EpisodeBatch) -> Scores:
        """Score a batch of episodes, and wait for it.

        Args:
            episodes: what to score.

        Returns:
            `reward` in [0, 1]; NaN where the judge gave no verdict. Beside it, "yes_no" has
            `answered`, the probability of yes and no together; "questions" has it too, and
            `strict`, 1 where all shares are above one half; "rating" has `rating`, the number
            itself.
        """
        return self.submit(episodes).result()

    def submit(self, episodes: EpisodeBatch) -> Future[Scores]:
        """Begin to score a batch of episodes, and return at once.

        Args:
            episodes: what to score. Its images may change afterwards.

        Returns:
            A future of what a call returns.

        Raises:
            CallError: no model was named, and the server does not say which it has.
            ValueError: the environment has no token.
            ImportError: httpx2 is not installed.
        """
        # With a name there is nothing to ask, so that a server that is away for a while is no
        # error here.
        model = self.model or self.loaded
        requests: list[Request[Verdict]] = []
        # How many requests belong to each episode, or why it has none.
        shares: list[int | CallError] = []
        for index in range(len(episodes)):
            try:
                asked = self._requests(model, episodes, index)
            except CallError as error:
                shares.append(error)
            else:
                requests += asked
                shares.append(len(asked))
        return then(
            self.client.submit_batch(requests), lambda answers: self._scores(shares, answers)
        )

    def _requests(self, model: str, episodes: EpisodeBatch, index: int) -> list[Request[Verdict]]:
        """What is asked about one episode."""
        try:
            picture = Picture(image_bytes(episodes.images[index]))
        except ValueError as error:
            raise CallError("no image", str(error)) from error
        prompt = episodes.prompts[index]
        questions = [""]
        if self.mode == "questions":
            questions = _questions(prompt, episodes.metadata[index])
        return [self._request(model, picture, prompt, question) for question in questions]

    def _request(
        self, model: str, picture: Picture, prompt: str, question: str
    ) -> Request[Verdict]:
        """One question about one image."""
        is_rating = self.mode == "rating"
        read = self.rating if is_rating else yes_share
        words = {
            "prompt": prompt,
            "question": question,
            "lowest": f"{self.rating.lowest:g}",
            "highest": f"{self.rating.highest:g}",
        }
        text = fill(self.template, words)
        return Request(
            "/chat/completions",
            read,
            lambda: chat_body(model, picture, text, is_rating, self.extra),
        )

    def _scores(
        self, shares: Sequence[int | CallError], answers: Sequence[Verdict | CallError]
    ) -> Scores:
        """Put the answers of each episode together."""
        # [N, 3]
        table = torch.full((len(shares), 3), torch.nan)
        errors: list[CallError] = []
        remaining = iter(answers)
        for row, share in enumerate(shares):
            try:
                if isinstance(share, CallError):
                    raise share
                table[row] = _together(list(islice(remaining, share)))
            except CallError as error:
                errors.append(error)
        components = {"answered": table[:, 1]}
        if self.mode == "rating":
            components = {"rating": table[:, 1]}
        elif self.mode == "questions":
            components["strict"] = table[:, 2]
        return Scores(table[:, 0], components, Failures.of(errors))


def _questions(prompt: str, metadata: Mapping[str, Any]) -> list[str]:
    """The questions that a task has put beside a prompt."""
    found = metadata.get("questions")
    if not isinstance(found, list | tuple) or not found:
        raise CallError(
            "no questions",
            f"expected a list of texts under 'questions' in the metadata of the prompt {prompt!r}, "
            f"got {found!r}; for prompts without questions use mode=yes_no",
        )
    return [str(question) for question in found]


def _together(answers: Sequence[Verdict | CallError]) -> Tensor:
    """The mean score, the mean evidence and whether all scores are above one half, `[3]`.

    Raises:
        CallError: one of the answers is an error; the first of them.
    """
    scores = []
    evidence = []
    for answer in answers:
        if isinstance(answer, CallError):
            raise answer
        scores.append(answer.score)
        evidence.append(answer.evidence)
    is_strict = float(min(scores) > 0.5)
    return torch.tensor([fmean(scores), fmean(evidence), is_strict])


def _rating(pattern: str, scale: Sequence[float]) -> Rating:
    """How a number is read from an answer, checked."""
    try:
        compiled = re.compile(pattern, re.IGNORECASE)
    except re.error as error:
        raise ValueError(f"expected a regular expression, got {pattern!r}: {error}") from error
    if compiled.groups < 1:
        raise ValueError(
            f"expected a pattern with a group for the number, such as {SCORE!r}, got {pattern!r}"
        )
    if len(scale) != 2 or not scale[0] < scale[1]:
        raise ValueError(
            f"expected the scale to be a lowest and a highest number, such as [1, 5], got {scale!r}"
        )
    return Rating(compiled, float(scale[0]), float(scale[1]))

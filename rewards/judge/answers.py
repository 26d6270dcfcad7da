"""What the answers of a judge say."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass

from rewards.service.exchange import CallError

SHOWN = 200
"""So many characters of an answer without a verdict are shown."""

TOLERANCE = 0.01
"""A log-probability may be above 0 by so much, as half precision rounds it."""

_MARKS = re.compile(r"[\W_\u0120]+")
"""What may surround a word in a token; U+0120 stands for a blank in byte-level vocabularies."""


@dataclass(frozen=True)
class Verdict:
    """What one answer says.

    Attributes:
        score: in [0, 1].
        evidence: beside it for the log: the probability of yes and no together, or the number
            that was written.
    """

    score: float
    evidence: float


def yes_share(answer: bytes) -> Verdict:
    """`P(yes) / (P(yes) + P(no))` at the first token, all spellings of a word added up.

    Args:
        answer: a chat completion with `top_logprobs`.

    Raises:
        CallError: it has no log-probabilities, or neither word is among them.
        ValueError: this and its like mean that it has another form.
    """
    choice = json.loads(answer)["choices"][0]
    tokens = (choice.get("logprobs") or {}).get("content")
    if not tokens:
        raise CallError(
            "no log-probabilities",
            "the judge's answer has none; expected a server and a model that support "
            f"`top_logprobs` in chat completions, got {str(choice)[:SHOWN]}",
        )
    first = tokens[0]["top_logprobs"]
    chance = {"yes": 0.0, "no": 0.0}
    for entry in first:
        word = _MARKS.sub("", entry["token"]).lower()
        if word in chance:
            chance[word] += math.exp(_checked_log_prob(entry["logprob"]))
    total = chance["yes"] + chance["no"]
    if not total > 0:
        seen = ", ".join(repr(entry["token"]) for entry in first[:5])
        raise CallError(
            "unparsed",
            f"neither yes nor no is among the first words of the judge, which are {seen}; a model "
            "that thinks first needs extra={'chat_template_kwargs': {'enable_thinking': False}}",
        )
    return Verdict(chance["yes"] / total, total)


@dataclass(frozen=True)
class Rating:
    """Reads the number that a judge wrote.

    Attributes:
        pattern: its last match is read; the first group of it is the number.
        lowest: becomes the score 0.
        highest: becomes the score 1.
    """

    pattern: re.Pattern[str]
    lowest: float
    highest: float

    def __call__(self, answer: bytes) -> Verdict:
        """Read an answer.

        Args:
            answer: a chat completion.

        Raises:
            CallError: it has no such number, or one beyond the scale.
            ValueError: this and its like mean that it has another form.
        """
        # No text at all is an answer too, such as that of a model that thought to the end.
        text = json.loads(answer)["choices"][0]["message"]["content"] or ""
        written = [match[1] for match in self.pattern.finditer(text)]
        try:
            number = float(written[-1])
        except (IndexError, TypeError, ValueError):
            number = math.nan
        if not self.lowest <= number <= self.highest:
            raise CallError(
                "unparsed",
                f"expected a number from {self.lowest:g} to {self.highest:g} where the pattern "
                f"{self.pattern.pattern!r} matches, got the answer {text[-SHOWN:]!r}",
            )
        return Verdict((number - self.lowest) / (self.highest - self.lowest), number)


def model_names(answer: bytes) -> list[str]:
    """The models that a server has.

    Args:
        answer: to a request for `/models`.
    """
    return [str(model["id"]) for model in json.loads(answer)["data"]]


def _checked_log_prob(value: float) -> float:
    """A log-probability, if it is one."""
    # NaN is refused as well.
    if not value <= TOLERANCE:
        raise ValueError(f"expected a log-probability of at most 0, got {value!r}")
    return value

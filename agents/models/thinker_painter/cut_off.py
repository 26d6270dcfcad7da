"""Texts of which a pipeline's tokenizer would cut off the end, without a word."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from agents.models.thinker_painter.asked import replaced


@contextmanager
def watch_tokenizers(pipeline: Any, call: Mapping[str, Any]) -> Iterator[list[str]]:
    """Collect in a `with` block what was cut off: one sentence for each tokenizer.

    There is none where one of the tokenizers kept the whole text: CLIP's cuts most texts off, but
    T5's beside it reads on.

    Args:
        pipeline: its tokenizers are watched.
        call: arguments of the pipeline's call.
    """
    limit = _limit(pipeline, call)
    found: list[str] = []
    with ExitStack() as stack:
        all_watched = []
        for name, tokenizer in pipeline.components.items():
            if name.startswith("tokenizer") and tokenizer is not None:
                watched = _Watched(name, tokenizer, limit)
                stack.enter_context(replaced(pipeline, **{name: watched}))
                all_watched.append(watched)
        yield found
    used = [watched for watched in all_watched if watched.texts]
    if all(watched.too_long for watched in used):
        found += [watched.sentence() for watched in used]


def _limit(pipeline: Any, call: Mapping[str, Any]) -> int | None:
    """Tokens that the pipeline keeps of what its tokenizer gives; None where it says nothing."""
    parameter = inspect.signature(type(pipeline).__call__).parameters.get("max_sequence_length")
    if parameter is None:
        return None
    kept = call.get("max_sequence_length", parameter.default)
    # Tokens of a template before the text, which some families drop afterwards.
    names = ("prompt_template_encode_start_idx", "user_prompt_begin_id")
    return kept + sum(getattr(pipeline, name, 0) for name in names)


class _Watched:
    """A tokenizer that counts the tokens which it cuts off; all else is the tokenizer's own."""

    def __init__(self, name: str, tokenizer: Any, limit: int | None) -> None:
        self._name = name
        self._tokenizer = tokenizer
        self._pipeline_limit = limit
        self._kept = 0
        self.texts = 0
        self.too_long: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, text: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("truncation"):
            self._count(text, kwargs)
        return self._tokenizer(text, *args, **kwargs)

    def _count(self, text: Any, kwargs: dict[str, Any]) -> None:
        own_limit = self._tokenizer.model_max_length
        limit = kwargs.get("max_length") or own_limit
        # CLIP's own limit holds whatever the pipeline takes from another encoder.
        if self._pipeline_limit is not None and limit != own_limit:
            limit = min(limit, self._pipeline_limit)
        texts = [text] if isinstance(text, str) else list(text)
        special = kwargs.get("add_special_tokens", True)
        whole = self._tokenizer(texts, add_special_tokens=special, verbose=False)
        lengths = [len(ids) for ids in whole["input_ids"]]
        self.texts += len(lengths)
        self.too_long += [length for length in lengths if length > limit]
        self._kept = limit

    def sentence(self) -> str:
        """What was cut off."""
        return (
            f"{self._name} keeps {self._kept} tokens, {len(self.too_long)} have more, up to "
            f"{max(self.too_long)}"
        )

"""How a tokenizer's chat template lays out a conversation, told from what it writes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jinja2 import TemplateError

_USER = "\ue000"
_ANSWER = "\ue001"
_SYSTEM = "\ue002"
"""Private characters, by which the words of a message are found in the template's text."""


class ChatLayout:
    """The texts around the words of a conversation.

    Args:
        tokenizer: of transformers, with a chat template.
        options: further arguments of the template, such as `enable_thinking`.

    Attributes:
        opening: text before the first words of the user, without a system text.
        closing: text after the words of the user, up to the answer.
        answering: the last part of `closing`: it opens the answer.
        next_turn: text after an answer's own end mark, up to the next words of the user.
        end: the token that ends an answer.

    Raises:
        ValueError: there is no template, or its answers do not end in a token of their own.
    """

    def __init__(self, tokenizer: Any, options: Mapping[str, Any] | None = None) -> None:
        self._tokenizer = tokenizer
        self._options = dict(options or {})
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                f"expected a thinker whose tokenizer has a chat template, got {name!r} without "
                "one; choose an instruction-tuned model, or set tokenizer.chat_template"
            )
        asked = self._render([("user", _USER)], answers=True)
        self.opening, self.closing = asked.split(_USER)
        unanswered = self._render([("user", _USER)]).split(_USER)[1]
        self.answering = self.closing.removeprefix(unanswered)
        self.end, self.next_turn = self._find_end(name)
        self._system, self._opening_after_system = self._find_system()

    def _find_end(self, name: str) -> tuple[int, str]:
        """The token that ends an answer, and the text from there to the user's next words."""
        turns = [("user", "a"), ("assistant", _ANSWER), ("user", _USER)]
        between = self._render(turns).split(_ANSWER)[-1].split(_USER)[0]
        ids = self._encode(between)
        tokenizer = self._tokenizer
        ends = {tokenizer.eos_token_id, *tokenizer.get_added_vocab().values()}
        if not ids or ids[0] not in ends:
            raise ValueError(
                f"expected the chat template of {name!r} to end an answer by a special token, got "
                f"{between!r} after it; choose another model"
            )
        mark = tokenizer.convert_ids_to_tokens(ids[0])
        return ids[0], between.removeprefix(mark)

    def _render(self, messages: list[tuple[str, str]], *, answers: bool = False) -> str:
        """The template's text of (role, words)."""
        return self._tokenizer.apply_chat_template(
            [{"role": role, "content": words} for role, words in messages],
            tokenize=False,
            add_generation_prompt=answers,
            **self._options,
        )

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)

    def _find_system(self) -> tuple[str, str]:
        """Text of a system message around its words, and what opens the user's words after it."""
        try:
            before = self._render([("system", _SYSTEM), ("user", _USER)]).split(_USER)[0]
        except TemplateError:
            before = ""
        if _SYSTEM not in before:
            # There is no role for it, as in Gemma's template: it heads the words of the user.
            return f"{self.opening}{_SYSTEM}\n\n", ""
        opening = _common_end(before, self.next_turn)
        return before.removesuffix(opening), opening

    def system(self, words: str) -> str:
        """Text of a system message, with which a prompt begins; empty for no words."""
        return self._system.replace(_SYSTEM, words) if words else ""

    def prompt(self, words: str, system: str, answers: bool) -> tuple[str, str, str]:
        """Text of the system, what opens the user's words, and these with what follows them."""
        opening = self._opening_after_system if system else self.opening
        return self.system(system), opening, words + self._end_of_turn(answers)

    def turn(self, words: str, answers: bool) -> str:
        """Text after an answer's end mark: the user's next words, up to the next answer."""
        return self.next_turn + words + self._end_of_turn(answers)

    def _end_of_turn(self, answers: bool) -> str:
        if answers:
            return self.closing
        return self.closing.removesuffix(self.answering)


def _common_end(first: str, second: str) -> str:
    """The longest text in which both end."""
    length = 0
    while length < min(len(first), len(second)) and first[-1 - length] == second[-1 - length]:
        length += 1
    return first[len(first) - length :]

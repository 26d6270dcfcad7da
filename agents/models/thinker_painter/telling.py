"""What the painter is told of a conversation: the thought, the prompt, or both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from agents.models.thinker_painter.chat import ChatLayout
from unigrpo_env.mdp.rules import Role

TELLINGS = ("prompt_and_answer", "answer", "all")
"""Names of what the painter may be told; `prompt_and_answer` is the default."""
MARKERS = ("</think>", "Revised Prompt:")
"""What comes after the last of these is a thought's answer; without any, all of it is."""

Tells = Callable[[Sequence[str], Sequence[str]], str]
"""`tells(user, thoughts)`: the text, from the user's messages and the model's, oldest first."""


class Telling:
    """Tokens of a conversation to the text that the painter reads.

    Args:
        tokenizer: of the thinker.
        layout: of its chat.
        tells: one of `TELLINGS`, or a function.
        markers: see `MARKERS`.

    Raises:
        ValueError: an unknown name.
    """

    def __init__(
        self,
        tokenizer: Any,
        layout: ChatLayout,
        tells: str | Tells = "prompt_and_answer",
        markers: Sequence[str] = MARKERS,
    ) -> None:
        if not callable(tells) and tells not in TELLINGS:
            raise ValueError(
                f"expected tells as one of {', '.join(TELLINGS)} or a function, got {tells!r}"
            )
        self._tokenizer = tokenizer
        self._layout = layout
        self._tells = tells
        self._markers = tuple(markers)

    def __deepcopy__(self, memo: dict[int, Any]) -> Telling:
        """Itself: nothing in it changes."""
        return self

    def text(self, ids: Sequence[int], roles: Sequence[int]) -> str:
        """What the painter reads.

        Args:
            ids: the tokens of one row, without those of images.
            roles: a `Role` each.
        """
        user, thoughts = self._messages(ids, roles)
        if callable(self._tells):
            return self._tells(user, thoughts)
        if self._tells == "all":
            return "\n".join([*user, *thoughts])
        answer = self._answer(thoughts[-1]) if thoughts else ""
        if self._tells == "answer":
            return answer
        return "\n".join([*user, answer]).strip()

    def _messages(self, ids: Sequence[int], roles: Sequence[int]) -> tuple[list[str], list[str]]:
        """The user's messages and the model's, without marks."""
        user: list[str] = []
        thoughts: list[str] = []
        run: list[int] = []
        own = [(i, r) for i, r in zip(ids, roles, strict=True) if r != Role.SYSTEM]
        for place, (token, role) in enumerate(own):
            run.append(token)
            if place + 1 < len(own) and own[place + 1][1] == role:
                continue
            if role == Role.USER:
                user.append(self._user_words(run))
            else:
                thoughts += self._thoughts(run)
            run = []
        return [words for words in user if words], [words for words in thoughts if words]

    def _user_words(self, ids: list[int]) -> str:
        """The words of the user, of a message with all that the template writes around them."""
        text = self._tokenizer.decode(ids)
        layout = self._layout
        unanswered = layout.closing.removesuffix(layout.answering)
        for opening in (layout.next_turn, layout.opening):
            if text.startswith(opening):
                text = text.removeprefix(opening)
                break
        else:
            # After a system message the opening lacks what stands before that.
            text = text.removeprefix(layout.next_turn.lstrip())
        return text.removesuffix(unanswered).strip()

    def _thoughts(self, ids: list[int]) -> list[str]:
        """What the model wrote between its marks; several texts where nobody spoke between them."""
        texts: list[list[int]] = [[]]
        for token in ids:
            if token == self._layout.end:
                texts.append([])
            else:
                texts[-1].append(token)
        opening = self._layout.answering
        found = []
        for text in texts:
            words = self._tokenizer.decode(text).removeprefix(opening).lstrip()
            found.append(words.removeprefix(opening.lstrip()).strip())
        return found

    def _answer(self, thought: str) -> str:
        """What follows the last marker in a thought."""
        for marker in self._markers:
            thought = thought.rpartition(marker)[2]
        return thought.strip()

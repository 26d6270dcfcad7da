"""The words of the shapes world, one token each."""

from __future__ import annotations

from functools import cache

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from rewards.shapes.grid import COLOURS, PLACES, SHAPES, VERDICT_CORRECT, VERDICT_WRONG
from unigrpo_env.tasks.shapes.prompts import FACTS, NUMBERS, OPENINGS, RELATIONS, plural

MARKS = ("<pad>", "<bos>", "<eos>", "<image>", "</image>", "<unk>")
"""The tokens that are no words; they stand first in the vocabulary."""

OTHER_WORDS = ("and", "plus", "minus", "as", "many", ":", ",")
"""Words between those that name numbers, places and objects."""

ROUND_WORDS = ("<end>", "make", "remove", "put", "the", "then", VERDICT_CORRECT, VERDICT_WRONG)
"""Words that only episodes of several images need; they stand last in the vocabulary."""


def words() -> list[str]:
    """All words but `MARKS` and `ROUND_WORDS`, each once, in the order of the vocabulary."""
    # Saved models depend on this order: new words may only be added at the end.
    plurals = [plural(shape) for shape in SHAPES]
    phrases = [*NUMBERS, *PLACES, *COLOURS, *SHAPES, *plurals, *OPENINGS, *RELATIONS, *FACTS]
    # A dict keeps the place where a word was first added.
    found: dict[str, None] = {}
    for phrase in phrases:
        found.update(dict.fromkeys(phrase.split()))
    found.update(dict.fromkeys(OTHER_WORDS))
    return list(found)


# Built once in a process: every variant shares it.
@cache
def shapes_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of the world. It splits at spaces and knows one token for each word."""
    entries = [*MARKS, *words(), *ROUND_WORDS]
    vocabulary = {word: index for index, word in enumerate(entries)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        # Special tokens are left out when a thought is decoded to text.
        additional_special_tokens=["<image>", "</image>", "<end>"],
    )

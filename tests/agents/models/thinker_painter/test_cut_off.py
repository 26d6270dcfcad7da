"""A text of which the painter would not read the end is never cut off without a word."""

import logging

import pytest
import torch
from tiny import FAMILIES
from tiny_parts import count_tokens

from agents.models.thinker_painter.painter import Painter

SHORT = "two red circles"
LONG = " ".join([SHORT] * 30)


@pytest.fixture(autouse=True)
def no_gradient():
    with torch.no_grad():
        yield


def make_painter(name, strict=False):
    pipeline, call = FAMILIES[name]()
    return Painter(pipeline, strict=strict, **call)


def warnings_of(caplog):
    return [r.getMessage() for r in caplog.records if "thinker_painter" in r.name]


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("qwen_edit",)])
def test_a_warning_counts_what_is_cut_off(name, caplog):
    painter = make_painter(name)
    with caplog.at_level(logging.WARNING):
        painter.encode([SHORT])
    assert warnings_of(caplog) == []
    with caplog.at_level(logging.WARNING):
        painter.encode([LONG])
    (message,) = warnings_of(caplog)
    assert "does not read all of 1 texts" in message
    assert " tokens, 1 have more, up to " in message


@pytest.mark.parametrize("name", ["sd3", "zimage", "qwen"])
def test_a_strict_painter_refuses_it(name):
    painter = make_painter(name, strict=True)
    painter.encode([SHORT])
    with pytest.raises(ValueError, match=r"1 have more, up to \d+; .*model\.tells"):
        painter.encode([LONG])


def test_counts_are_right(caplog):
    """Two marks of the tokenizer stand around the text."""
    painter = make_painter("chroma")
    painter.encode([LONG, f"{LONG} {SHORT}", SHORT])
    most = count_tokens(f"{LONG} {SHORT}") + 2
    (message,) = warnings_of(caplog)
    assert message.endswith(f"tokenizer keeps 48 tokens, 2 have more, up to {most}")


def test_a_warning_comes_with_the_first_word_that_is_lost(caplog):
    painter = make_painter("chroma")
    texts = [SHORT]
    while not warnings_of(caplog):
        texts.append(f"{texts[-1]} a")
        assert len(texts) < 100
        painter.encode(texts[-1:])
    shorter, whole, cut = (painter.encode([text]).value[0] for text in texts[-3:])
    assert torch.equal(cut, whole)
    assert not torch.equal(shorter, whole)


def test_one_encoder_that_reads_all_is_enough(caplog):
    """CLIP keeps 77 tokens, and T5 beside it reads on."""
    pipeline, call = FAMILIES["sd3"]()
    painter = Painter(pipeline, strict=True, **{**call, "max_sequence_length": 256})
    painter.encode([LONG])
    assert warnings_of(caplog) == []
    pipeline.text_encoder_3 = None
    with pytest.raises(ValueError, match="tokenizer keeps 77 tokens"):
        painter.encode([LONG])


def test_the_tokenizers_are_back(caplog):
    painter = make_painter("sd3", strict=True)
    before = {n: p for n, p in painter.pipeline.components.items() if "tokenizer" in n}
    with pytest.raises(ValueError, match="have more"):
        painter.encode([LONG])
    after = {n: p for n, p in painter.pipeline.components.items() if "tokenizer" in n}
    assert all(after[name] is part for name, part in before.items())

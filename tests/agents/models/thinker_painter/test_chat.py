"""A chat as each family's template writes it, told from what the template writes."""

import pytest
from templates import TEMPLATES, tokenizer_of

from agents.models.thinker_painter.chat import ChatLayout

ROLES = {"llama3": "<|start_header_id|>{}<|end_header_id|>\n\n", "gemma": "<start_of_turn>{}\n"}
"""How a message of a role begins, where it is not as in Qwen's."""
ENDS = {"llama3": "<|eot_id|>", "gemma": "<end_of_turn>"}


def rendered(tokenizer, messages, **options):
    messages = [{"role": role, "content": words} for role, words in messages]
    return tokenizer.apply_chat_template(messages, tokenize=False, **options)


@pytest.mark.parametrize("family", TEMPLATES)
def test_parts_of_a_chat(family):
    tokenizer = tokenizer_of(family)
    layout = ChatLayout(tokenizer)
    answers = ROLES.get(family, "<|im_start|>{}\n").format(
        "model" if family == "gemma" else "assistant"
    )
    assert layout.answering == answers
    assert tokenizer.convert_ids_to_tokens(layout.end) == ENDS.get(family, "<|im_end|>")
    user = ROLES.get(family, "<|im_start|>{}\n").format("user")
    assert layout.next_turn.strip() == user.strip()
    assert layout.opening.endswith(user)
    messages = [("user", "one"), ("assistant", "two"), ("user", "three")]
    expected = rendered(tokenizer, messages, add_generation_prompt=True)
    end = tokenizer.convert_ids_to_tokens(layout.end)
    first = "".join(layout.prompt("one", "", True))
    assert f"{first}two{end}{layout.turn('three', True)}" == expected


@pytest.mark.parametrize("family", TEMPLATES)
@pytest.mark.parametrize("answers", [True, False])
@pytest.mark.parametrize("system", ["", "Be brief."])
def test_prompt(family, system, answers):
    tokenizer = tokenizer_of(family)
    layout = ChatLayout(tokenizer)
    messages = [("system", system)] if system else []
    if family == "gemma" and system:
        messages = [("user", f"{system}\n\ntwo dots")]
    else:
        messages += [("user", "two dots")]
    found = layout.prompt("two dots", system, answers)
    assert "".join(found) == rendered(tokenizer, messages, add_generation_prompt=answers)
    assert found[0] == layout.system(system)
    assert system in found[0]
    assert "two" not in found[0]
    if system and family != "gemma":
        assert "user" not in found[0]
        assert "user" in found[1]


def test_thinking_is_switched_off_by_an_empty_thought():
    tokenizer = tokenizer_of("qwen3")
    layout = ChatLayout(tokenizer, {"enable_thinking": False})
    assert layout.answering == "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    expected = rendered(
        tokenizer, [("user", "a")], add_generation_prompt=True, enable_thinking=False
    )
    assert "".join(layout.prompt("a", "", True)) == expected
    assert "<think>" not in "".join(layout.prompt("a", "", False))


def test_template_that_leaves_the_system_out_heads_the_words_with_it():
    tokenizer = tokenizer_of("qwen3")
    tokenizer.chat_template = (
        "{% for message in messages if message.role != 'system' %}<|im_start|>{{ message.role }}\n"
        "{{ message.content }}<|im_end|>\n{% endfor %}"
    )
    layout = ChatLayout(tokenizer)
    assert "".join(layout.prompt("dots", "Be brief.", False)) == (
        "<|im_start|>user\nBe brief.\n\ndots<|im_end|>\n"
    )


def test_template_without_an_end_of_answers():
    tokenizer = tokenizer_of("qwen3")
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }} {% endfor %}"
    with pytest.raises(ValueError, match="to end an answer by a special token, got ' ' after it"):
        ChatLayout(tokenizer)


def test_no_template():
    tokenizer = tokenizer_of("qwen3")
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"chat template, got .* without one; choose an instruct"):
        ChatLayout(tokenizer)

"""Chat templates in the manner of several families."""

from __future__ import annotations

from typing import Any

import transformers
from tiny_parts import SPECIAL, chat_tokenizer
from tokenizers import Tokenizer

TURNS = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
)
QWEN3 = (
    TURNS
    + "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)
QWEN25 = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful assistant."
    "<|im_end|>\n{% endif %}" + TURNS + "{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message.role }}"
    "<|end_header_id|>\n\n{{ message.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}<start_of_turn>"
    "{{ 'model' if message.role == 'assistant' else message.role }}\n"
    "{{ message.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MARKS = {
    "llama3": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
}
"""Special tokens beside those of `tiny_parts`."""
ENDS = {"llama3": "<|eot_id|>", "gemma": "<eos>"}
"""What closes a document in each family; Qwen's is that of an answer."""
TEMPLATES = {"qwen3": QWEN3, "qwen2.5": QWEN25, "llama3": LLAMA3, "gemma": GEMMA}


def tokenizer_of(family: str) -> Any:
    """A tokenizer with the template and the special tokens of a family.

    Args:
        family: one of `TEMPLATES`.
    """
    bytes_tokenizer = Tokenizer.from_str(chat_tokenizer().backend_tokenizer.to_str())
    marks = [*MARKS.get(family, ()), *ENDS.values()]
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bytes_tokenizer,
        pad_token=SPECIAL[0],
        bos_token="<|begin_of_text|>" if family == "llama3" else "<bos>",
        eos_token=ENDS.get(family, "<|im_end|>"),
        additional_special_tokens=[*SPECIAL[1:], *marks],
        chat_template=TEMPLATES[family],
    )

"""The words of the shapes world."""

import pytest

from unigrpo_env.tasks.shapes.multi_image import ReflectTask, StoryTask
from unigrpo_env.tasks.shapes.text_to_image import ShapesTask
from unigrpo_env.tasks.shapes.vocabulary import MARKS, ROUND_WORDS, shapes_tokenizer

ORDER = """
<pad> <bos> <eos> <image> </image> <unk> zero one two three four top-left top top-right left centre
right bottom-left bottom bottom-right red green blue yellow purple circle square triangle cross
circles squares triangles crosses draw show a picture of above below has corners sides line ends and
plus minus as many : , <end> make remove put the then right-picture wrong-picture
"""


def test_the_order_of_the_words_is_fixed():
    """Shipped and saved weights depend on it."""
    vocabulary = shapes_tokenizer().get_vocab()
    assert sorted(vocabulary, key=vocabulary.__getitem__) == ORDER.split()
    assert list(vocabulary.values()).count(0) == 1
    assert ORDER.split()[: len(MARKS)] == list(MARKS)
    assert ORDER.split()[-len(ROUND_WORDS) :] == list(ROUND_WORDS)


@pytest.mark.parametrize("task", [ShapesTask(), ReflectTask(), StoryTask()])
def test_every_word_has_a_token(task):
    tokenizer = shapes_tokenizer()
    for shown in task.demonstrations(300, 0):
        for text in (shown.prompt.text, *shown.thoughts):
            words = " ".join(text.removesuffix("<end>").split())
            ids = tokenizer.encode(words)
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids, skip_special_tokens=True) == words

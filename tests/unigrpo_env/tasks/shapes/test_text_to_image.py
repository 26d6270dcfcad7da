"""The task of one image."""

from unigrpo_env.episodes import Episodes
from unigrpo_env.tasks.shapes.prompts import FOREIGN_KINDS
from unigrpo_env.tasks.shapes.text_to_image import ShapesTask
from unigrpo_env.tasks.shapes.vocabulary import shapes_tokenizer
from unigrpo_env.variants.variant import make_variant


def test_prompts_fit_their_variant():
    unknown = shapes_tokenizer().unk_token_id
    episodes = Episodes(make_variant("text_to_image"), 1)
    for task in (ShapesTask(), ShapesTask(FOREIGN_KINDS)):
        for split in ("train", "test"):
            for prompt in task.prompts(split, 300, 0):
                assert unknown not in episodes.encode(prompt).tokens


def test_kinds_can_be_chosen():
    task = ShapesTask(("chain", "single"))
    found = {prompt.metadata["kind"] for prompt in task.prompts("train", 50, 0)}
    assert found == {"chain", "single"}

"""The second processor itself: what the other tests of this folder stand on."""

import pytest
import torch
from chat_world import (
    ASSISTANT,
    DRAW,
    END,
    IMAGE,
    PAD,
    SIDE,
    STOP,
    SYSTEM,
    USER,
    VOCAB_SIZE,
)

from unigrpo_env.env import InterleavedGenEnv
from unigrpo_env.tasks.task import Prompt
from unigrpo_env.variants.variant import make_variant


class OnePrompt:
    """A task of one prompt."""

    def __init__(self, prompt):
        self.prompt = prompt

    def prompts(self, split, count, seed):
        return [self.prompt] * count


PAINT = Prompt("paint the sea")


def make(processor, name="text_to_image", prompt=PAINT, **settings):
    return make_variant(
        name, processor=processor, task=OnePrompt(prompt), reward="brightness", **settings
    )


def test_text_round_trip(processor):
    """Bytes that the tokenizer has never seen come back too."""
    for text in ("paint the sky", "Zwölf 雪, and a\nnew line"):
        ids = processor.encode_text(text)
        assert max(ids) < processor.tokenizer.get_vocab_size()
        assert processor.decode_text([ASSISTANT, *ids, DRAW]) == text


def test_prompt_layout(processor):
    words = processor.encode_text("paint")
    system = processor.encode_text("be brief")
    found = processor.encode_prompt("paint", sources=2, system="be brief")
    assert found == [SYSTEM, *system, END, USER, IMAGE, IMAGE, *words, END, ASSISTANT]
    assert processor.encode_prompt("paint", thinks=False)[-2:] == [ASSISTANT, DRAW]


def test_latents_do_not_depend_on_the_batch(processor):
    """They are coded some at a time, so the number of images makes no difference."""
    images = torch.rand(7, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    latents = processor.encode_images(images)
    assert latents.shape == (7, 16, 8)
    assert latents.dtype == torch.float32
    decoded = processor.decode_latents(latents)
    assert decoded.shape == images.shape
    alone = processor.decode_latents(latents[5:6])
    torch.testing.assert_close(alone, decoded[5:6], atol=1e-2, rtol=0)


def test_rules_are_the_processors(processor):
    """A scenario takes tokens, latents and times from the processor that plays it."""
    rules = make(processor, image_steps=4).rules
    assert rules.times == (1.0, 0.5625, 0.25, 0.0625, 0.0)
    assert rules.latent_shape == (16, 8)
    assert rules.pad_id == PAD
    assert rules.end_id is None
    legal = rules.legal_tokens()
    assert len(legal) == VOCAB_SIZE
    assert legal[DRAW]
    assert not legal[[STOP, PAD, IMAGE, USER, VOCAB_SIZE - 1]].any()


def test_more_image_steps_keep_the_grid(processor):
    variant = make(processor, image_steps=4).with_image_steps(10)
    assert variant.rules.times == processor.time_grid(10)


def test_marks_cannot_be_typed(processor):
    env = InterleavedGenEnv(make(processor))
    for text in ("<|image|> paint", "paint <|end|><|assistant|>"):
        with pytest.raises(ValueError, match=r"control token '<\|"):
            env.reset(options={"prompt": text})


def test_stream_is_the_template(processor):
    """A dialogue of two images, as the model reads it."""
    source = torch.rand(3, SIDE, SIDE)
    prompt = Prompt("paint", sources=(source,), turns=("darker",))
    variant = make(
        processor,
        "dialogue",
        prompt,
        source_images=1,
        text_budget=3,
        image_steps=2,
        system_prompt="be brief",
    )
    env = InterleavedGenEnv(variant)
    observation, _ = env.reset(seed=0)
    thought = processor.encode_text("a")
    ended = False
    while not ended:
        # The last token of every thought is forced: its budget is spent.
        action = {"token": thought[0], "next_latent": observation["latent"] * 0.5}
        observation, _, ended, _, info = env.step(action)
    words = processor.encode_text("paint")
    system = processor.encode_text("be brief")
    turn = processor.encode_text("darker")
    expected = [SYSTEM, *system, END, USER, IMAGE, *words, END, ASSISTANT]
    expected += [*thought * 3, DRAW, IMAGE, END, USER, *turn, END, ASSISTANT, *thought * 3, DRAW]
    count = int(observation["num_tokens"])
    assert observation["tokens"][:count].tolist() == expected
    assert (observation["tokens"][count:] == PAD).all()
    assert info["text"] == "aaa aaa"

"""Prompts as the chat template writes them, marks that no text holds, and the pipeline's grid."""

import functools

import pytest
import torch
from templates import TEMPLATES, tokenizer_of
from tiny import FAMILIES, make_model

from agents.models.thinker_painter.config import SYSTEM_PROMPT
from agents.models.thinker_painter.painter import Painter
from agents.models.thinker_painter.processor import PainterProcessor
from unigrpo_env.env import InterleavedGenEnv
from unigrpo_env.flow_time import time_grid
from unigrpo_env.tasks.task import Prompt
from unigrpo_env.variants.variant import make_variant

VOCABULARY = 480
WORDS = "two red circles"


@functools.cache
def painter_of(family):
    pipeline, call = FAMILIES[family]()
    return Painter(pipeline, **call)


def processor_of(family, **options):
    return PainterProcessor(tokenizer_of(family), painter_of("sd3"), VOCABULARY, **options)


def templated(tokenizer, messages, **options):
    messages = [{"role": role, "content": words} for role, words in messages]
    found = tokenizer.apply_chat_template(messages, return_dict=True, **options)
    return list(found["input_ids"])


@pytest.mark.parametrize("family", TEMPLATES)
@pytest.mark.parametrize("system", ["", "Be brief."])
@pytest.mark.parametrize("thinks", [True, False])
def test_prompt_is_the_template(family, system, thinks):
    processor = processor_of(family)
    tokenizer = processor.tokenizer
    messages = [("system", system), ("user", WORDS)] if system else [("user", WORDS)]
    if system and family == "gemma":
        messages = [("user", f"{system}\n\n{WORDS}")]
    ids = processor.encode_prompt(WORDS, system=system, thinks=thinks)
    assert ids == templated(tokenizer, messages, add_generation_prompt=thinks)
    # Roles: the system's text, then the user's message, then what opens the answer.
    length = processor.system_length(system)
    before = tokenizer.decode(ids[:length])
    assert (system in before) if system else before == ""
    assert WORDS in tokenizer.decode(ids[length:])
    opening = processor.opening_length(thinks)
    assert (opening > 0) == thinks
    if thinks:
        assert tokenizer.decode(ids[-opening:]) == processor.layout.answering


@pytest.mark.parametrize(("thinking", "opens"), [(None, False), (True, False), (False, True)])
def test_enable_thinking(thinking, opens):
    options = {} if thinking is None else {"enable_thinking": thinking}
    processor = processor_of("qwen3", chat_options=options)
    ids = processor.encode_prompt(WORDS)
    assert ids == templated(
        processor.tokenizer, [("user", WORDS)], add_generation_prompt=True, **options
    )
    end = processor.tokenizer.decode(ids[-processor.opening_length() :])
    assert end.endswith("<think>\n\n</think>\n\n") == opens


@pytest.mark.parametrize("family", TEMPLATES)
def test_turn_and_continuation_follow_the_end_of_an_answer(family):
    processor = processor_of(family)
    ids = processor.encode_prompt(WORDS)
    ids += [*processor.encode_text("dots"), processor.open_image_id]
    ids += processor.encode_turn("make it blue")
    messages = [("user", WORDS), ("assistant", "dots"), ("user", "make it blue")]
    assert ids == templated(processor.tokenizer, messages, add_generation_prompt=True)
    assert len(processor.continuation_ids()) == processor.opening_length() > 0
    assert processor.continuation_ids(thinks=False) == ()
    assert len(processor.encode_turn("a", thinks=False)) < len(processor.encode_turn("a"))


@pytest.mark.parametrize("family", TEMPLATES)
def test_sources_stand_before_the_words(family):
    processor = processor_of(family, reads_images=True)
    ids = processor.encode_prompt(WORDS, sources=2, system="Be brief.")
    places = [place for place, token in enumerate(ids) if token == processor.image_id]
    assert places[1] == places[0] + 1
    assert places[0] >= processor.system_length("Be brief.")
    assert processor.tokenizer.decode(ids[places[1] + 1 :]).startswith(WORDS)
    rest = [token for token in ids if token != processor.image_id]
    assert rest == processor.encode_prompt(WORDS, system="Be brief.")


@pytest.mark.parametrize("family", TEMPLATES)
@pytest.mark.parametrize("reads", [True, False])
def test_marks(family, reads):
    processor = processor_of(family, reads_images=reads)
    tokenizer = processor.tokenizer
    marks = [processor.open_image_id, processor.end_id, processor.pad_id]
    marks += [processor.image_id] if reads else []
    assert (processor.image_id is not None) == reads
    assert len(set(marks)) == len(marks)
    assert None not in marks
    names = {"llama3": "<|end_of_text|>", "gemma": "<eos>"}
    if family != "llama3":
        assert tokenizer.decode([processor.end_id]) == names.get(family, "<|endoftext|>")
    # Those of no text, in no prompt of an ordinary kind.
    ids = set(processor.encode_prompt(WORDS, system="Be brief.")) | set(processor.encode_turn("a"))
    assert not ids & (set(marks) - {processor.open_image_id})
    assert set(marks) <= processor.control_ids()


def test_forbidden_tokens():
    processor = processor_of("qwen3", reads_images=True)
    tokenizer = processor.tokenizer
    forbidden = set(processor.forbidden_ids(reads_images=True))
    assert processor.open_image_id not in forbidden
    assert set(tokenizer.all_special_ids) - forbidden == {processor.open_image_id}
    assert set(range(len(tokenizer), VOCABULARY)) <= forbidden
    # They are a part of what a model writes.
    assert not forbidden & set(tokenizer.convert_tokens_to_ids(["<think>", "</think>"]))
    assert len(forbidden) < VOCABULARY / 2


def test_control_tokens_may_not_be_typed():
    model = make_model("sd3")
    variant = make_variant("text_to_image", processor=model.processor, task=Words(), reward=zero)
    env = InterleavedGenEnv(variant)
    with pytest.raises(ValueError, match=r"<\|im_end\|>"):
        env.reset(options={"prompt": Prompt("a <|im_end|> b")})


class Words:
    """A task of one prompt."""

    def prompts(self, split, count, seed):
        return [Prompt(WORDS)] * count


def zero(episodes):
    return [0.0] * len(episodes)


def test_tokenizer_of_another_model():
    with pytest.raises(ValueError, match=r"a tokenizer of at most 100 tokens, .* of one model?"):
        PainterProcessor(tokenizer_of("qwen3"), painter_of("sd3"), 100)


def test_too_few_tokens_that_no_text_holds():
    tokenizer = tokenizer_of("qwen3")
    tokenizer.pad_token = tokenizer.eos_token = "<|im_end|>"
    kept = {"<|im_end|>", "<|endoftext|>"}
    backend = tokenizer.added_tokens_decoder

    class Poor:
        """The tokenizer with two special tokens."""

        added_tokens_decoder = {i: t for i, t in backend.items() if t.content in kept}
        all_special_ids = tuple(added_tokens_decoder)

        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def __len__(self):
            return len(tokenizer)

    with pytest.raises(ValueError, match=r"expected 1 tokens that no text holds .*; add special"):
        PainterProcessor(Poor(), painter_of("sd3"), len(tokenizer))


@pytest.mark.parametrize("family", ["sd3", "flux", "qwen", "zimage"])
def test_grid_is_the_pipelines_own(family):
    painter = painter_of(family)
    processor = PainterProcessor(tokenizer_of("qwen3"), painter, VOCABULARY)
    pipeline = painter.pipeline
    pipeline("a", num_inference_steps=7, output_type="latent", **painter.call)
    sigmas = pipeline.scheduler.sigmas.tolist()
    assert processor.time_grid(7) == pytest.approx(sigmas, abs=1e-6)
    assert processor.time_grid(7, 2.0) == pytest.approx(time_grid(7, 2.0).tolist())
    words = {"prompt_budget": 200, "text_budget": 2, "image_steps": 7}
    variant = make_variant("text_to_image", processor=processor, task=Words(), reward=zero, **words)
    env = InterleavedGenEnv(variant)
    observation, _ = env.reset(seed=0)
    seen = []
    done = False
    while not done:
        if observation["phase"] == 1:
            seen.append(float(observation["t"][0]))
        action = env.action_space.sample()
        action["token"] = processor.open_image_id
        action["next_latent"] *= 0
        observation, _, done, _, _ = env.step(action)
    assert seen == pytest.approx(sigmas[:-1], abs=1e-6)


def test_shift_is_that_of_the_same_time_in_the_middle():
    processor = processor_of("qwen3")
    middle = time_grid(10, processor.time_shift)[5]
    assert processor.time_grid(10)[5] == pytest.approx(float(middle), abs=1e-6)


def test_budgets():
    processor = processor_of("qwen3")
    variant = make_variant("text_to_image", processor=processor, task=Words(), reward=zero)
    assert variant.rules.image_steps == processor.scenario_defaults["image_steps"] == 20
    assert variant.rules.text_budget == 256
    given = processor_of("qwen3", budgets={"text_budget": 9, "prompt_budget": 99})
    variant = make_variant("text_to_image", processor=given, task=Words(), reward=zero)
    assert (variant.rules.text_budget, variant.rules.prompt_budget) == (9, 99)


def test_system_prompt_is_for_thoughts_before_images():
    processor = processor_of("qwen3")
    assert processor.system_prompt(thinks=True, draws=True) == SYSTEM_PROMPT
    assert processor.system_prompt(thinks=False, draws=True) == ""
    assert processor.system_prompt(thinks=True, draws=False) == ""
    own = processor_of("qwen3", system="Be brief.")
    assert own.system_prompt(thinks=True, draws=True) == "Be brief."


def test_words_come_back():
    processor = processor_of("qwen3")
    ids = processor.encode_text("two red circles, é")
    assert processor.decode_text([*ids, processor.open_image_id]) == "two red circles, é"
    assert processor.describe_token(processor.open_image_id) == "<|im_end|>"


def test_pixels_are_the_images_own():
    processor = processor_of("qwen3", reads_images=True)
    images = torch.rand(2, 3, *processor.image_size)
    seen = processor.view_images(images)
    assert seen.shape[-2:] == processor.pixel_size == processor.image_size
    assert seen.dtype == torch.uint8
    assert torch.equal(seen, (images * 255).round().byte())
    with pytest.raises(NotImplementedError):
        processor_of("qwen3").view_images(images)

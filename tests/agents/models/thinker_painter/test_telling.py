"""What the painter is told of a conversation."""

import pytest
from folders import load_parts
from templates import TEMPLATES, tokenizer_of

from agents.config import model_settings
from agents.evaluation.accuracy import evaluate
from agents.models.thinker_painter.chat import ChatLayout
from agents.models.thinker_painter.telling import TELLINGS, Telling
from unigrpo_env.mdp.rules import Role, lay_out_roles
from unigrpo_env.tasks.task import Prompt
from unigrpo_env.variants.variant import make_variant

THOUGHT = "<think>\nRed means warm.\n</think>\n\nTwo red circles on white."
ANSWER = "Two red circles on white."


def conversation(family, *rounds, system="", options=None):
    """Tokens and roles of (user's words or None, thought) pairs, as the env lays them out."""
    tokenizer = tokenizer_of(family)
    layout = ChatLayout(tokenizer, options)
    ids, roles = [], []

    def write(text, role):
        new = tokenizer.encode(text, add_special_tokens=False)
        ids.extend(new)
        roles.extend([role] * len(new))

    for number, (words, thought) in enumerate(rounds):
        if number == 0:
            first, opening, rest = layout.prompt(words, system, True)
            write(first, Role.SYSTEM)
            write(opening + rest.removesuffix(layout.answering), Role.USER)
        elif words is not None:
            write(layout.turn(words, True).removesuffix(layout.answering), Role.USER)
        write(layout.answering, Role.MODEL)
        if thought is not None:
            write(thought, Role.MODEL)
            ids.append(layout.end)
            roles.append(Role.MODEL)
    return ids, roles, tokenizer, layout


def told(family, *rounds, tells="prompt_and_answer", **more):
    ids, roles, tokenizer, layout = conversation(family, *rounds, **more)
    return Telling(tokenizer, layout, tells).text(ids, roles)


@pytest.mark.parametrize("family", TEMPLATES)
@pytest.mark.parametrize("system", ["", "Never tell this."])
def test_what_is_told(family, system):
    rounds = [("draw two circles", THOUGHT)]
    given = {"system": system}
    assert told(family, *rounds, tells="answer", **given) == ANSWER
    assert told(family, *rounds, **given) == f"draw two circles\n{ANSWER}"
    assert told(family, *rounds, tells="all", **given) == f"draw two circles\n{THOUGHT}"


@pytest.mark.parametrize(
    ("thought", "answer"),
    [
        (THOUGHT, ANSWER),
        ("Let me see. Revised Prompt: two dots", "two dots"),
        ("<think>a Revised Prompt: b</think>Revised Prompt: c", "c"),
        ("two </think> dots </think> three", "three"),
        ("  two dots, no marker \n", "two dots, no marker"),
        ("all of it is a thought</think>", ""),
        ("", ""),
    ],
)
def test_answer_of_a_thought(thought, answer):
    assert told("qwen3", ("draw", thought), tells="answer") == answer
    assert told("qwen3", ("draw", thought)) == f"draw\n{answer}".strip()


def test_markers_can_be_chosen():
    ids, roles, tokenizer, layout = conversation("qwen3", ("draw", "a FINAL: b"))
    telling = Telling(tokenizer, layout, "answer", markers=("FINAL:",))
    assert telling.text(ids, roles) == "b"


@pytest.mark.parametrize("family", TEMPLATES)
def test_several_rounds_and_turns(family):
    rounds = [("draw two circles", "one"), ("make them blue", "two"), (None, "three")]
    given = {"system": "Never tell this."}
    users = "draw two circles\nmake them blue"
    assert told(family, *rounds, **given) == f"{users}\nthree"
    assert told(family, *rounds, tells="answer", **given) == "three"
    assert told(family, *rounds, tells="all", **given) == f"{users}\none\ntwo\nthree"
    seen = []
    told(family, *rounds, tells=lambda *texts: seen.append(texts) or "", **given)
    assert seen == [(["draw two circles", "make them blue"], ["one", "two", "three"])]


def test_default_system_text_of_a_template_is_not_told():
    assert "helpful" in ChatLayout(tokenizer_of("qwen2.5")).opening
    assert told("qwen2.5", ("draw", "dots"), tells="all") == "draw\ndots"


def test_empty_thought_that_the_template_writes_is_not_told():
    options = {"enable_thinking": False}
    assert told("qwen3", ("draw", "dots"), options=options) == "draw\ndots"
    assert told("qwen3", ("draw", "dots"), tells="all", options=options) == "draw\ndots"


def test_without_a_thought():
    tokenizer = tokenizer_of("qwen3")
    layout = ChatLayout(tokenizer)
    ids = tokenizer.encode("".join(layout.prompt("draw", "", False)), add_special_tokens=False)
    telling = Telling(tokenizer, layout)
    assert telling.text(ids, lay_out_roles(len(ids))) == "draw"
    assert Telling(tokenizer, layout, "answer").text(ids, lay_out_roles(len(ids))) == ""
    assert telling.text([], []) == ""


def test_unknown_name():
    tokenizer = tokenizer_of("qwen3")
    with pytest.raises(ValueError, match=f"one of {', '.join(TELLINGS)} or a function, got 'x'"):
        Telling(tokenizer, ChatLayout(tokenizer), "x")


def test_names_in_the_settings():
    assert model_settings.TELLINGS == TELLINGS


class Prompts:
    """A task of two prompts, with turns where they are asked for."""

    def __init__(self, turns=()):
        self.turns = turns

    def prompts(self, split, count, seed):
        words = ("two red circles", "a blue square, please")
        return [Prompt(text, turns=self.turns) for text in words][:count]


EPISODES = [
    ("sd3", "text_to_image", ()),
    ("qwen", "reflect", ()),
    ("qwen", "story", ()),
    ("qwen", "dialogue", ("make it blue",)),
]


@pytest.mark.parametrize(("family", "scenario", "turns"), EPISODES)
def test_episodes_come_back(parts, family, scenario, turns):
    """The painter is told the words and thoughts of an episode, whatever stands between them."""
    model = load_parts(parts(family))
    seen = []
    model.tell(lambda user, thoughts: seen.append((tuple(user), tuple(thoughts))) or "told")
    task = Prompts(turns)
    variant = make_variant(
        scenario,
        processor=model.processor,
        task=task,
        reward=lambda episodes: [0.0] * len(episodes),
        prompt_budget=200,
        text_budget=5,
        image_steps=2,
    )
    found = evaluate(model, variant, task.prompts("test", 2, 0), temperature=1.0, seed=1)
    for row, prompt in enumerate(found.prompts):
        thoughts = [thought.strip() for thought in found.thoughts[row]]
        rounds = len(found.all_images[row])
        assert rounds == (1 if scenario == "text_to_image" else rounds) > 0
        for drawn in range(1, rounds + 1):
            users = (prompt.text, *turns[: drawn - 1])
            written = tuple(thought for thought in thoughts[:drawn] if thought)
            assert (users, written) in seen
    told_system = model.processor.system_prompt(thinks=True, draws=True)
    assert not any(told_system[:20] in text for texts in seen for part in texts for text in part)

"""Episodes of several pictures: what stands in the token stream, when they end, what they are worth."""

import dataclasses
import random

import pytest
import torch

from rewards import EpisodeBatch
from rewards.rounds import dialogue, edit, edit_thought, extra_pictures, judge_edit, judge_story, story
from rewards.shapes import COLOURS, KINDS, draw
from unigrpo_env.env import InterleavedGenEnv
from unigrpo_env.mdp import Phase, Rules
from unigrpo_env.rounds_world import DialogueTask, EditTask, StoryTask, make_edit
from unigrpo_env.shapes_world import shapes_tokenizer
from unigrpo_env.tasks import Prompt, episodes_of
from unigrpo_env.variants import make_variant
from unigrpo_env.vector import InterleavedGenVectorEnv

IDS = shapes_tokenizer().get_vocab()
RED_CIRCLE, BLUE_SQUARE, BLUE_CIRCLE = (1 + KINDS.index(kind) for kind in (("red", "circle"), ("blue", "square"), ("blue", "circle")))


def layout(**cells):
    found = [0] * 9
    for place, value in cells.items():
        found[int(place[1:])] = value
    return found


def picture(cells):
    return draw(torch.tensor([cells]))[0]


def say(env, words):
    """Say words to a single env; returns the last step."""
    for word in words.split():
        step = env.step({"token": IDS[word], "latent": env.episodes.state.latent[0].numpy()})
    return step


def paint(env, cells):
    """Draw this very picture, in one jump and then standing still."""
    latent = env.episodes.variant.decode.encode(picture(cells)[None])[0].numpy()
    for _ in range(env.episodes.rules.image_steps):
        step = env.step({"token": 0, "latent": latent})
    return step


def words(env):
    state = env.episodes.state
    return shapes_tokenizer().convert_ids_to_tokens(state.tokens[0, : int(state.num_tokens[0])].tolist())


def test_a_story_is_one_stream():
    env = InterleavedGenEnv("story", pictures=2)
    prompt = Prompt(
        "a red circle then a blue square",
        {"parts": [{"count": 1, "colour": "red", "shape": "circle"}, {"count": 1, "colour": "blue", "shape": "square"}]},
    )
    env.reset(seed=0, options={"prompt": prompt})
    say(env, "red circle top <eos>")
    observation, reward, ended, *_ = paint(env, layout(c1=RED_CIRCLE))
    assert not ended
    assert reward == 0
    assert observation["phase"] == Phase.TEXT
    assert words(env)[-6:] == ["red", "circle", "top", "<eos>", "<image>", "<bos>"]
    assert observation["image_places"].tolist() == [len(words(env)) - 2]
    torch.testing.assert_close(env.episodes.variant.decode(torch.tensor(observation["images"]))[0], picture(layout(c1=RED_CIRCLE)))
    say(env, "blue square left <eos>")
    _, reward, ended, _, info = paint(env, layout(c1=RED_CIRCLE, c3=BLUE_SQUARE))
    assert ended
    assert reward == 1
    assert info["components"]["story/score"] == 1
    assert env.episodes.rounds([0])[0] == ["red circle top", "blue square left"]
    assert len(env.episodes.pictures([0])[0]) == 2


def test_a_story_of_one_picture_is_judged_like_any_other():
    env = InterleavedGenEnv("story", pictures=1)
    parts = [{"count": 1, "colour": "red", "shape": "circle"}]
    env.reset(seed=0, options={"prompt": Prompt("a red circle", {"parts": parts})})
    say(env, "red circle top <eos>")
    _, reward, ended, *_ = paint(env, layout(c1=RED_CIRCLE))
    assert ended
    assert reward == 1


def test_a_reflection_of_one_picture_is_one_that_cannot_go_on():
    env = InterleavedGenEnv("reflect", image_budget=1)
    env.reset(seed=0, options={"prompt": Prompt("a red circle", {"objects": [{"count": 1, "colour": "red", "shape": "circle"}]})})
    say(env, "<eos>")
    _, reward, ended, _, info = paint(env, layout(c1=RED_CIRCLE))
    assert ended
    assert reward == info["components"]["reflect/kept"] == 1


def test_each_picture_has_its_own_noise():
    env = InterleavedGenEnv("story", pictures=3, text_budget=0)
    observation, _ = env.reset(seed=0)
    starts = []
    ended = False
    while not ended:
        if observation["step"] == 0:
            starts.append(torch.tensor(observation["latent"]))
        observation, _, ended, *_ = env.step({"token": 0, "latent": observation["latent"] * 0.5})
    assert len(starts) == 3
    assert not torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[1], starts[2])


def test_reflecting_ends_when_the_model_says_so():
    env = InterleavedGenEnv("reflect", image_budget=3, price=0.1)
    wanted = {"objects": [{"count": 1, "colour": "red", "shape": "circle"}]}
    observation, _ = env.reset(seed=0, options={"prompt": Prompt("a red circle", wanted)})
    assert not observation["legal_tokens"][IDS["<end>"]], "not before the first picture"
    observation, _, ended, *_ = say(env, "<end>")
    assert not ended, "what is not legal is appended and does nothing"
    say(env, "<eos>")
    observation, *_ = paint(env, layout(c1=BLUE_SQUARE))
    assert observation["legal_tokens"][IDS["<end>"]]
    say(env, "wrong-picture <eos>")
    paint(env, layout(c1=RED_CIRCLE))
    _, reward, ended, _, info = say(env, "right-picture <end>")
    assert ended
    assert reward == pytest.approx(1 - 0.1)
    assert info["components"] == {"reflect": 1, "reflect/first": 0, "reflect/kept": 0, "reflect/content": 0, "extra_pictures": 1}
    assert env.episodes.rounds([0])[0] == ["", "wrong-picture", "right-picture"]
    assert len(env.episodes.pictures([0])[0]) == 2


def test_the_user_speaks_and_is_not_the_model():
    env = InterleavedGenEnv("dialogue")
    change = {"action": "recolour", "thing": {"colour": None, "shape": "circle", "side": None}, "colour": "blue"}
    prompt = Prompt(
        "a red circle", {"objects": [{"count": 1, "colour": "red", "shape": "circle"}], "edits": [change]}, turns=("make the circle blue",)
    )
    env.reset(seed=0, options={"prompt": prompt})
    say(env, "red circle top <eos>")
    paint(env, layout(c1=RED_CIRCLE))
    assert words(env)[-9:] == ["<eos>", "<image>", "<bos>", "make", "the", "circle", "blue", "<eos>", "<bos>"]
    assert int(env.episodes.state.sampled[0]) == 0
    say(env, "blue circle top <eos>")
    _, reward, ended, *_ = paint(env, layout(c1=BLUE_CIRCLE))
    assert ended
    assert reward == 1
    assert env.episodes.rounds([0])[0] == ["red circle top", "blue circle top"], "the user's words are not among the model's"


def test_a_user_with_no_more_to_say_ends_the_episode():
    env = InterleavedGenEnv("dialogue", reward=lambda episodes: torch.ones(len(episodes)))
    env.reset(seed=0, options={"prompt": Prompt("a red circle")})
    say(env, "<eos>")
    _, reward, ended, *_ = paint(env, layout(c1=RED_CIRCLE))
    assert ended
    assert reward == 1


def test_users_say_as_much_as_each_has_to_say():
    """Rows side by side whose users have none, one and two turns."""
    variant = make_variant("dialogue", image_budget=3, text_budget=1, image_steps=1, reward="extra_pictures")
    env = InterleavedGenVectorEnv(variant, 3)
    turns = [(), ("make the circle blue",), ("make the circle blue", "remove the circle")]
    observation, _ = env.reset(seed=0, options={"prompts": [Prompt("a red circle", turns=said) for said in turns]})
    total = torch.zeros(3)
    while (observation["phase"] != Phase.DONE).any():
        token = torch.full((3,), IDS["<eos>"])
        observation, reward, *_ = env.step({"token": token, "latent": observation["latent"]}, observation["phase"] != Phase.DONE)
        total += reward
    assert total.tolist() == [0, 1, 2]
    assert (observation["image_places"] >= 0).sum(1).tolist() == [0, 1, 2], "what nobody answers is not read"
    begun, said = "<bos> a red circle <eos> <bos> <eos>", "<image> <bos> {} <eos> <bos> <eos>"
    for row, spoken in enumerate(turns):
        ids = observation["tokens"][row, : observation["num_tokens"][row]].tolist()
        assert " ".join(shapes_tokenizer().convert_ids_to_tokens(ids)) == " ".join([begun, *map(said.format, spoken)])


def test_an_edit_begins_with_its_source():
    env = InterleavedGenEnv("edit")
    change = {"action": "remove", "thing": {"colour": "red", "shape": "circle", "side": None}}
    source = picture(layout(c1=RED_CIRCLE, c5=BLUE_SQUARE))
    observation, _ = env.reset(seed=0, options={"prompt": Prompt("remove the red circle", {"edit": change}, sources=(source,))})
    assert words(env) == ["<image>", "<bos>", "remove", "the", "red", "circle", "<eos>", "<bos>"]
    assert observation["image_places"].tolist() == [0]
    torch.testing.assert_close(env.episodes.variant.decode(torch.tensor(observation["images"]))[0], source)
    say(env, "<eos>")
    _, reward, ended, _, info = paint(env, layout(c5=BLUE_SQUARE))
    assert ended
    assert reward == 1
    assert info["components"]["edit/score"] == 1


GOOD = picture(layout(c1=RED_CIRCLE))


@pytest.mark.parametrize(
    ("variant", "prompt", "message"),
    [
        ("edit", Prompt("remove the circle"), "expected 1 source pictures .* got 0"),
        ("edit", Prompt("remove the circle", sources=(GOOD, GOOD)), "got 2"),
        ("text_to_image", Prompt("a circle", sources=(GOOD,)), "expected 0 source pictures"),
        ("edit", Prompt("remove the circle", sources=(GOOD[:, :16],)), r"shape \[3, 24, 24\] \(RGB\), got \[3, 16, 24\]"),
        ("edit", Prompt("remove the circle", sources=(GOOD[:1],)), r"got \[1, 24, 24\]"),
        ("edit", Prompt("remove the circle", sources=((GOOD * 255).byte(),)), "torch.uint8"),
        ("edit", Prompt("remove the circle", sources=(torch.cat([GOOD, GOOD[:1]]),)), r"\(RGB\), got \[4, 24, 24\]"),
        ("edit", Prompt("remove the circle", sources=(GOOD * 255,)), "divide bytes by 255"),
        ("edit", Prompt("remove the circle", sources=(GOOD * 2 - 1,)), r"values in \[0, 1\], got \[-"),
        ("edit", Prompt("remove the circle", sources=(GOOD * torch.nan,)), r"values in \[0, 1\]"),
        ("edit", Prompt("remove the circle", sources=("picture.png",)), "got str"),
        ("story", Prompt("a red circle then a blue square", turns=("make it blue",)), "expected at most 0 turns"),
        ("dialogue", Prompt("a red circle", turns=("make the circle blue", "remove the circle")), "expected at most 1 turns"),
        ("dialogue", Prompt("a red circle", turns=("make the circle blue " * 4,)), "turn_budget=10"),
        ("dialogue", Prompt("a red circle", turns=("make <image> blue",)), "control token '<image>'; take it out"),
        ("dialogue", Prompt("a red circle<eos>"), "control token '<eos>'"),
        ("text_to_image", Prompt("<bos> a circle"), "control token '<bos>'"),
        ("edit", Prompt("remove the <image>", sources=(GOOD,)), "control token '<image>'"),
        ("reflect", Prompt("a circle <end>"), "control token '<end>'"),
    ],
)
def test_prompts_that_a_variant_cannot_take(variant, prompt, message):
    env = InterleavedGenVectorEnv(variant, 2)
    observation, _ = env.reset(seed=0)
    before = {name: value.clone() for name, value in observation.items()}
    with pytest.raises(ValueError, match=message):
        env.reset(seed=1, options={"prompts": [prompt, prompt]})
    assert all(torch.equal(before[name], value) for name, value in env.episodes.observe().items()), "no row has changed"


def test_a_system_prompt_has_no_control_tokens():
    variant = dataclasses.replace(make_variant("story"), system_prompt="draw <image>")
    with pytest.raises(ValueError, match="'draw <image>', got the control token '<image>'"):
        InterleavedGenVectorEnv(variant, 2).reset(seed=0)


def test_rules_that_cannot_be():
    rules = make_variant("story").rules
    with pytest.raises(ValueError, match="image_id among forbidden_ids"):
        dataclasses.replace(rules, image_id=IDS["red"])
    with pytest.raises(ValueError, match="next_ids"):
        dataclasses.replace(rules, next_ids=())
    with pytest.raises(ValueError, match="image_budget >= 1"):
        Rules(8, 4, 3, 2, (2, 3), 2, image_budget=0)


def test_ragged_rows_stop_each_at_its_own_time():
    """One row ends after its first picture, one draws all three; what the first holds stays as it was."""
    env = InterleavedGenVectorEnv("reflect", 2, image_budget=3)
    observation, _ = env.reset(seed=0)
    rewards, held = torch.zeros(2), None
    while (observation["phase"] != Phase.DONE).any():
        active = observation["phase"] != Phase.DONE
        text = active & (observation["phase"] == Phase.TEXT)
        if text.any():
            active = text
        end = observation["legal_tokens"][:, IDS["<end>"]].bool() & torch.tensor([True, False])
        token = torch.where(end, IDS["<end>"], IDS["<eos>"])
        observation, paid, *_ = env.step({"token": token, "latent": observation["latent"] * 0.5}, active)
        rewards += paid
        if observation["phase"][0] == Phase.DONE:
            now = {name: value[0].clone() for name, value in observation.items()}
            assert held is None or all(torch.equal(held[name], now[name]) for name in now)
            held = now
    assert env.episodes.state.images_drawn.tolist() == [1, 3]
    assert rewards.tolist() == pytest.approx([0.0, -0.1])


@pytest.mark.parametrize("seed", range(40))
def test_edits_are_judged_by_the_change_and_by_the_rest(seed):
    rng = random.Random(seed)
    prompt = EditTask().prompts("train", 1, seed)[0]
    before, change = prompt.metadata["before"], prompt.metadata["edit"]
    right = solve(before, change, rng)
    assert judge_edit(before, right, change).strict == 1
    assert judge_edit(before, before, change).strict == 0, "nothing was done"
    free = [p for p in range(9) if right[p] == before[p] == 0]
    for place in free[:2]:
        more = [*right]
        more[place] = RED_CIRCLE
        assert judge_edit(before, more, change).strict == 0, "something else was added"
    bystanders = [p for p in range(9) if right[p] == before[p] != 0]
    assert bystanders
    for place in bystanders:
        colour, shape = KINDS[before[place] - 1]
        others = [1 + KINDS.index((other, shape)) for other in COLOURS if other != colour]
        for there, here in [*((place, other) for other in others), *((p, 0) for p in range(9) if right[p] == 0)]:
            changed = [*right]
            changed[there], changed[place] = before[place], here  # recoloured, or moved
            assert not judge_edit(before, changed, change).requirements["all else stays"]
    batch = EpisodeBatch(
        [prompt.text], [""], picture(right)[None], [prompt.metadata], [picture(right)[None]], [[""]], [torch.stack(prompt.sources)]
    )
    assert edit(batch)["reward"].tolist() == [1]
    assert edit(dataclasses.replace(batch, images=prompt.sources[0][None]))["reward"].tolist() == [0]


def test_the_thought_of_an_edit_is_judged_apart_from_its_picture():
    told = episodes_of(EditTask().drills(50, 0))
    assert edit_thought(told).sum() == 50
    undrawn = dataclasses.replace(told, images=torch.stack([sources[-1] for sources in told.sources]))
    assert [edit(undrawn)[part].sum() for part in ("reward", "thought", "lucky")] == [0, 50, 0]
    assert edit_thought(undrawn).sum() == 50
    unsaid = dataclasses.replace(told, texts=["nonsense"] * 50)
    assert edit_thought(unsaid).sum() == 0
    assert edit(unsaid)["lucky"].sum() == 50
    assert edit_thought(dataclasses.replace(told, metadata=[{}] * 50)).isnan().all()


def solve(before, change, rng):
    """Some picture that an instruction allows."""
    for _ in range(2000):
        after = [*before]
        place = rng.randrange(9)
        after[place] = 0 if change["action"] == "remove" else rng.randint(1, len(KINDS))
        if judge_edit(before, after, change).strict == 1:
            return after
    raise AssertionError(change)


def test_instructions_name_one_thing():
    rng = random.Random(0)
    texts = {made[0] for _ in range(2000) if (made := make_edit([RED_CIRCLE, 0, RED_CIRCLE, 0, BLUE_SQUARE, 0, 0, 0, 0], rng))}
    assert "remove the left circle" in texts
    assert "make the square red" in texts
    assert not any("the red circle" in text or "the circle" in text for text in texts), "there are two"


def test_stories_are_judged_picture_by_picture():
    parts = [{"count": 1, "colour": "red", "shape": "circle"}, {"count": 1, "colour": "blue", "shape": "square"}]
    first, both, moved = layout(c1=RED_CIRCLE), layout(c1=RED_CIRCLE, c3=BLUE_SQUARE), layout(c2=RED_CIRCLE, c3=BLUE_SQUARE)
    assert judge_story([first, both], parts).strict == 1
    assert judge_story([first, moved], parts).requirements == {"as many pictures as parts": True, "picture 1": True, "picture 2": False}
    assert judge_story([first], parts).strict == 0
    assert judge_story([both, both], parts).strict == 0
    batch = EpisodeBatch([""], [""], picture(both)[None], [{"parts": parts}], [draw(torch.tensor([first, both]))], [["", ""]], [])
    assert story(batch)["reward"].tolist() == [1]
    assert extra_pictures(batch).tolist() == [1]


@pytest.mark.parametrize("seed", range(10))
def test_dialogues_are_judged_turn_by_turn(seed):
    prompt = DialogueTask().prompts("test", 1, seed)[0]
    one, two = (1 + KINDS.index((o["colour"], o["shape"])) for o in prompt.metadata["objects"])
    first = layout(c0=one, c8=two)
    second = solve(first, prompt.metadata["edits"][0], random.Random(seed))

    def scored(*layouts):
        pictures = draw(torch.tensor(layouts))
        return dialogue(EpisodeBatch([prompt.text], [""], pictures[-1:], [prompt.metadata], [pictures], [[""]], []))["reward"].tolist()

    assert scored(first, second) == [1]
    assert scored(first, first) == [0]
    assert scored(second, second) == [0]
    assert scored(first) == [0]


@pytest.mark.parametrize("task", [EditTask(), StoryTask(), DialogueTask()])
def test_tasks_split_and_fit_their_variant(task):
    name = type(task).__name__.removesuffix("Task").lower()
    episodes = InterleavedGenVectorEnv(name, 1).episodes
    train, test = (task.prompts(split, 300, 0) for split in ("train", "test"))
    assert [p.text for p in train] == [p.text for p in task.prompts("train", 300, 0)]
    keys = [{(p.text, str(p.metadata.get("before")), p.turns) for p in prompts} for prompts in (train, test)]
    assert not keys[0] & keys[1]
    for prompt in train + test:
        assert len(episodes.encode(prompt)) <= episodes.rules.prompt_budget
        said = [episodes.encode(prompt), *episodes.encode_turns(prompt)]
        assert not any(IDS["<unk>"] in ids for ids in said)
        episodes.encode_sources(prompt)

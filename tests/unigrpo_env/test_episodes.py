"""What stands in the token stream, when episodes end, and what a reward sees of them."""

import pytest
import torch

from rewards.shapes.grid import KINDS, draw
from unigrpo_env.env import InterleavedGenEnv
from unigrpo_env.episodes import Episodes
from unigrpo_env.mdp.rules import Phase
from unigrpo_env.tasks.shapes.vocabulary import shapes_tokenizer
from unigrpo_env.tasks.task import Prompt
from unigrpo_env.variants.variant import make_variant
from unigrpo_env.vector_env import InterleavedGenVectorEnv

IDS = shapes_tokenizer().get_vocab()
RED_CIRCLE = 1 + KINDS.index(("red", "circle"))
BLUE_SQUARE = 1 + KINDS.index(("blue", "square"))
BLUE_CIRCLE = 1 + KINDS.index(("blue", "circle"))
CIRCLE_PART = {"count": 1, "colour": "red", "shape": "circle"}
SQUARE_PART = {"count": 1, "colour": "blue", "shape": "square"}


def layout(**cells):
    found = [0] * 9
    for place, value in cells.items():
        found[int(place[1:])] = value
    return found


def image(cells):
    return draw(torch.tensor([cells]))[0]


FIRST = layout(c1=RED_CIRCLE)
BOTH = layout(c1=RED_CIRCLE, c3=BLUE_SQUARE)


def test_a_story_is_one_stream(play):
    parts = {"parts": [CIRCLE_PART, SQUARE_PART]}
    player = play("story", Prompt("a red circle then a blue square", parts), images=2)
    player.write("red circle top <eos>")
    player.paint(FIRST)
    assert not player.ended
    assert player.reward == 0
    seen = player.observation
    assert seen["phase"] == Phase.TEXT
    assert seen["images_drawn"] == 1
    assert player.stream().endswith("<bos> red circle top <eos> <image> <bos>")
    assert seen["image_positions"].tolist() == [seen["num_tokens"] - 2]
    decoded = player.env.episodes.processor.decode_latents(torch.tensor(seen["images"]))
    torch.testing.assert_close(decoded[0], image(FIRST))
    player.write("blue square left <eos>")
    info = player.paint(BOTH)
    assert player.ended
    assert player.reward == 1
    assert info["components"]["story/score"] == 1
    assert player.env.episodes.thoughts([0]) == [["red circle top", "blue square left"]]
    assert len(player.env.episodes.all_images([0])[0]) == 2


def test_a_story_of_one_image(play):
    player = play("story", Prompt("a red circle", {"parts": [CIRCLE_PART]}), images=1)
    player.write("red circle top <eos>")
    player.paint(FIRST)
    assert player.ended
    assert player.reward == 1


def test_reflecting_on_one_image_cannot_go_on(play):
    player = play("reflect", Prompt("a red circle", {"objects": [CIRCLE_PART]}), image_budget=1)
    player.write("<eos>")
    info = player.paint(FIRST)
    assert player.ended
    assert player.reward == info["components"]["reflect/first_correct"] == 1


def test_each_image_has_its_own_noise():
    env = InterleavedGenEnv("story", images=3, text_budget=0)
    observation, _ = env.reset(seed=0)
    starts = []
    ended = False
    while not ended:
        if observation["step"] == 0:
            starts.append(torch.tensor(observation["latent"]))
        action = {"token": 0, "next_latent": observation["latent"] * 0.5}
        observation, _, ended, *_ = env.step(action)
    assert len(starts) == 3
    assert not torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[1], starts[2])


def test_reflecting_ends_when_the_model_says_so(play):
    prompt = Prompt("a red circle", {"objects": [CIRCLE_PART]})
    player = play("reflect", prompt, image_budget=3, extra_image_penalty=0.1)
    assert not player.may_write("<end>"), "not before the first image"
    player.write("<end>")
    assert not player.ended, "a token that is not legal is appended and does nothing"
    player.write("<eos>")
    player.paint(layout(c1=BLUE_SQUARE))
    assert player.may_write("<end>")
    player.write("wrong-picture <eos>")
    player.paint(FIRST)
    info = player.write("right-picture <end>")
    assert player.ended
    assert player.reward == pytest.approx(1 - 0.1)
    assert info["components"] == {
        "reflect": 1,
        "reflect/first_correct": 0,
        "reflect/stopped_correct": 0,
        "reflect/stopped_wrong": 0,
        "extra_images": 1,
    }
    episodes = player.env.episodes
    assert episodes.thoughts([0]) == [["", "wrong-picture", "right-picture"]]
    assert episodes.texts([0]) == ["wrong-picture right-picture"]
    assert len(episodes.all_images([0])[0]) == 2


def test_the_user_speaks_and_is_not_the_model(play):
    thing = {"colour": None, "shape": "circle", "side": None}
    change = {"action": "recolour", "thing": thing, "colour": "blue"}
    metadata = {"objects": [CIRCLE_PART], "edits": [change]}
    player = play("dialogue", Prompt("a red circle", metadata, turns=("make the circle blue",)))
    player.write("red circle top <eos>")
    player.paint(FIRST)
    assert player.stream().endswith("<eos> <image> <bos> make the circle blue <eos> <bos>")
    assert int(player.env.episodes.state.sampled[0]) == 0
    player.write("blue circle top <eos>")
    player.paint(layout(c1=BLUE_CIRCLE))
    assert player.ended
    assert player.reward == 1
    thoughts = player.env.episodes.thoughts([0])
    assert thoughts == [["red circle top", "blue circle top"]], "without the user's words"


def test_a_silent_user_ends_the_episode(play):
    reward = lambda episodes: torch.ones(len(episodes))  # noqa: E731
    player = play("dialogue", "a red circle", reward=reward)
    player.write("<eos>")
    player.paint(FIRST)
    assert player.ended
    assert player.reward == 1


def play_out(env, observation, token=IDS["<eos>"]):
    """Write one token wherever there is text, and keep the latents; the total reward."""
    total = torch.zeros(env.num_envs)
    while (observation["phase"] != Phase.DONE).any():
        active = observation["phase"] != Phase.DONE
        actions = {
            "token": torch.full((env.num_envs,), token),
            "next_latent": observation["latent"],
        }
        observation, reward, *_ = env.step(actions, active)
        total += reward
    return observation, total


def streams(observation):
    found = []
    for tokens, count in zip(observation["tokens"], observation["num_tokens"], strict=True):
        ids = tokens[: int(count)].tolist()
        found.append(" ".join(shapes_tokenizer().convert_ids_to_tokens(ids)))
    return found


def test_users_say_as_much_as_each_has_to_say():
    """Rows whose users have none, one and two turns stand side by side."""
    variant = make_variant(
        "dialogue", image_budget=3, text_budget=1, image_steps=1, reward="extra_images"
    )
    env = InterleavedGenVectorEnv(variant, 3)
    turns = [(), ("make the circle blue",), ("make the circle blue", "remove the circle")]
    prompts = [Prompt("a red circle", turns=texts) for texts in turns]
    observation, _ = env.reset(seed=0, options={"prompts": prompts})
    observation, total = play_out(env, observation)
    assert total.tolist() == [0, 1, 2]
    read = (observation["image_positions"] >= 0).sum(1)
    assert read.tolist() == [0, 1, 2], "an image that nobody answers is not read"
    for stream, texts in zip(streams(observation), turns, strict=True):
        rounds = [f"<image> <bos> {text} <eos> <bos> <eos>" for text in texts]
        assert stream == " ".join(["<bos> a red circle <eos> <bos> <eos>", *rounds])


def test_an_edit_begins_with_its_source(play):
    thing = {"colour": "red", "shape": "circle", "side": None}
    metadata = {"edit": {"action": "remove", "thing": thing}}
    source = image(layout(c1=RED_CIRCLE, c5=BLUE_SQUARE))
    player = play("edit", Prompt("remove the red circle", metadata, sources=(source,)))
    assert player.stream() == "<image> <bos> remove the red circle <eos> <bos>"
    assert player.observation["image_positions"].tolist() == [0]
    latents = torch.tensor(player.observation["images"])
    decoded = player.env.episodes.processor.decode_latents(latents)
    torch.testing.assert_close(decoded[0], source)
    player.write("<eos>")
    info = player.paint(layout(c5=BLUE_SQUARE))
    assert player.ended
    assert player.reward == 1
    assert info["components"]["edit/score"] == 1


def test_rows_have_as_many_sources_as_they_bring():
    variant = make_variant(
        "edit", source_images=2, min_source_images=0, prompt_budget=24, image_steps=1
    )
    env = InterleavedGenVectorEnv(variant, 3)
    sources = (image(FIRST), image(BOTH))
    prompts = [Prompt("the circle", sources=sources[:count]) for count in range(3)]
    observation, _ = env.reset(seed=0, options={"prompts": prompts})
    words = "<bos> the circle <eos> <bos>"
    assert streams(observation) == [words, f"<image> {words}", f"<image> <image> {words}"]
    assert observation["image_positions"].tolist() == [[-1, -1], [0, -1], [0, 1]]
    decoded = env.episodes.processor.decode_latents(observation["images"][2])
    torch.testing.assert_close(decoded, torch.stack(sources))
    assert not observation["images"][0].any()
    assert not observation["images"][1, 1].any()
    batch = env.episodes.batch([0, 1, 2])
    assert [len(given) for given in batch.sources] == [0, 1, 2]
    message = "expected 0 to 2 source images .* got 3"
    with pytest.raises(ValueError, match=message):
        env.reset(options={"prompts": [Prompt("a", sources=(*sources, sources[0]))] * 3})


def test_a_row_begun_anew_forgets_its_sources():
    variant = make_variant("edit", min_source_images=0)
    env = InterleavedGenVectorEnv(variant, 1)
    env.reset(seed=0)
    observation, _ = env.reset(seed=0, options={"prompts": ["a circle"]})
    assert observation["image_positions"].tolist() == [[-1]]
    assert not observation["images"].any()


def test_system_text_stands_before_sources(play):
    prompt = Prompt("the circle", sources=(image(FIRST),) * 2)
    settings = {"source_images": 2, "prompt_budget": 24, "system_prompt": "make the square blue"}
    player = play("edit", prompt, **settings)
    expected = "<bos> make the square blue <eos> <image> <image> <bos> the circle <eos> <bos>"
    assert player.stream() == expected
    assert player.observation["image_positions"].tolist() == [6, 7]
    assert player.observation["prompt_length"] == 13


def test_an_explicit_time_grid_is_used(play):
    player = play("text_to_image", times=(1.0, 0.6, 0.0), text_budget=0)
    times = [(player.observation["t"], player.observation["next_t"])]
    while not player.ended:
        player.step(0, player.observation["latent"])
        times.append((player.observation["t"], player.observation["next_t"]))
    assert [t.shape for pair in times for t in pair] == [(1,)] * 6
    found = [(float(t[0]), float(following[0])) for t, following in times]
    assert found == [(1.0, pytest.approx(0.6)), (pytest.approx(0.6), 0.0), (0.0, 0.0)]


class OneCircle:
    """A task of one prompt, for tests that need no other."""

    def prompts(self, split, count, seed):
        return [Prompt("a red circle")] * count


def length_reward(episodes):
    return [float(len(text.split())) for text in episodes.texts]


TEXT_ONLY = {"image_budget": 0, "text_budget": 4, "task": OneCircle(), "reward": length_reward}


@pytest.mark.parametrize(
    ("settings", "words", "reward"),
    [
        ({}, "red <eos>", 1),
        ({}, "red circle top blue", 4),
        ({"may_end": True}, "red <end>", 1),
        ({"may_end": True}, "red <eos> top <end>", 2),
        ({"may_end": True}, "red <eos> <eos> <eos>", 1),
    ],
)
def test_text_alone_is_an_episode(play, settings, words, reward):
    player = play("text_to_image", **TEXT_ONLY, **settings)
    assert "images" not in player.observation
    assert player.may_write("<eos>") != bool(settings)
    assert player.may_write("<end>") == bool(settings)
    *first, last = words.split()
    player.write(" ".join(first))
    assert not player.ended
    info = player.write(last)
    assert player.ended
    assert player.reward == reward
    assert "image" not in info
    assert player.stream() == f"<bos> a red circle <eos> <bos> {words}"
    assert player.observation["images_drawn"] == 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "right-picture <eos>"),
        ({}, "red circle top blue"),
        ({"may_end": True}, "right-picture <end>"),
        ({"may_end": True}, "<eos> red circle <end>"),
        ({"may_end": True}, "<eos> <eos> <eos> <eos>"),
    ],
)
def test_a_last_text_follows_the_image(play, settings, words):
    given = {**TEXT_ONLY, "image_budget": 1, "text_after_images": True}
    player = play("text_to_image", **given, **settings)
    player.write("red <eos>")
    info = player.paint(FIRST)
    assert not player.ended
    assert "image" not in info
    assert player.stream() == "<bos> a red circle <eos> <bos> red <eos> <image> <bos>"
    assert player.may_write("<eos>") != bool(settings)
    assert player.may_write("<end>") == bool(settings)
    *first, last = words.split()
    player.write(" ".join(first))
    assert not player.ended
    info = player.write(last)
    assert player.ended
    torch.testing.assert_close(torch.tensor(info["image"]), image(FIRST))
    plain = [word for word in words.split() if not word.startswith("<")]
    assert player.env.episodes.thoughts([0]) == [["red", " ".join(plain)]]
    assert player.reward == 1 + len(plain)
    assert len(player.env.episodes.all_images([0])[0]) == 1


def test_the_model_may_end_before_the_last_text(play):
    settings = {**TEXT_ONLY, "image_budget": 2, "text_after_images": True, "may_end": True}
    player = play("text_to_image", **settings)
    assert not player.may_write("<end>")
    player.write("red <eos>")
    player.paint(FIRST)
    assert player.may_write("<end>")
    assert player.may_write("<eos>")
    player.write("<end>")
    assert player.ended
    assert player.observation["images_drawn"] == 1


def test_some_token_is_always_legal():
    variant = make_variant("reflect", text_budget=2, image_steps=1, text_after_images=True)
    env = InterleavedGenVectorEnv(variant, 2)
    pad = torch.arange(64) == env.episodes.rules.pad_id
    assert env.episodes.observe()["legal_tokens"].tolist() == [pad.tolist()] * 2
    observation, _ = env.reset(seed=0)
    while (observation["phase"] != Phase.DONE).any():
        active = observation["phase"] != Phase.DONE
        legal = observation["legal_tokens"]
        writes = observation["phase"] == Phase.TEXT
        assert (legal[~writes] == pad).all()
        assert not legal[writes, 0].any(), "padding is never written"
        token = torch.multinomial(legal.float(), 1)[:, 0]
        actions = {"token": token, "next_latent": observation["latent"]}
        observation, *_ = env.step(actions, active)
    assert (observation["legal_tokens"] == pad).all()


def test_ragged_rows_end_each_at_its_own_time():
    """Row 0 ends after its first image, row 1 draws all three; row 0 stays as it was."""
    env = InterleavedGenVectorEnv("reflect", 2, image_budget=3)
    observation, _ = env.reset(seed=0)
    rewards = torch.zeros(2)
    kept = None
    while (observation["phase"] != Phase.DONE).any():
        active = observation["phase"] != Phase.DONE
        writes = active & (observation["phase"] == Phase.TEXT)
        if writes.any():
            active = writes
        end = observation["legal_tokens"][:, IDS["<end>"]] & torch.tensor([True, False])
        token = torch.where(end, IDS["<end>"], IDS["<eos>"])
        actions = {"token": token, "next_latent": observation["latent"] * 0.5}
        observation, paid, *_ = env.step(actions, active)
        rewards += paid
        if observation["phase"][0] == Phase.DONE:
            now = {name: value[0].clone() for name, value in observation.items()}
            assert kept is None or all(torch.equal(kept[name], now[name]) for name in now)
            kept = now
    assert observation["images_drawn"].tolist() == [1, 3]
    assert rewards.tolist() == pytest.approx([0.0, -0.1])


def test_there_is_at_least_one_episode():
    with pytest.raises(ValueError, match="expected at least one episode, got rows=0"):
        Episodes(make_variant("toy"), 0)


def test_a_prompt_of_a_group_is_encoded_once(monkeypatch):
    episodes = Episodes(make_variant("text_to_image"), 4)
    prompts = episodes.variant.task.prompts("train", 2, 0)
    counts = []
    encode = episodes.processor.encode_prompt
    monkeypatch.setattr(
        episodes.processor,
        "encode_prompt",
        lambda text, **settings: counts.append(text) or encode(text, **settings),
    )
    episodes.reset(range(4), [prompts[0]] * 2 + [prompts[1]] * 2, range(4))
    assert counts == [prompt.text for prompt in prompts]

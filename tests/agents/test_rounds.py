"""Several pictures: the actor reads each once, a fresh one in mid-episode thinks the same, and training sees what the rollout saw."""

import copy
import dataclasses
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console

from agents.actor import Actor
from agents.collector import Collector, play
from agents.config import AlgorithmSettings, load_config
from agents.evaluation import evaluate
from agents.flow import Window
from agents.logs import read_metrics
from agents.loss import UniGRPOLoss, replay
from agents.objectives import group_advantage
from agents.run import run
from agents.trainer import CLOCKED, Trainer
from unigrpo_env.episodes import Episodes
from unigrpo_env.mdp import Phase
from unigrpo_env.variants import make_variant
from unigrpo_env.vector import InterleavedGenVectorEnv

ROUNDS = ["edit", "reflect", "story", "dialogue"]


def short(name, **settings):
    return make_variant(name, text_budget=5, image_steps=3, **settings)


def test_a_vision_tower_looks_at_every_picture_that_is_read(seeing_bagel):
    """Source and drawn picture alike, in rollout, training and reference; a segment of the tower's patches follows each one's latents."""
    shown = []
    tower = seeing_bagel.vit_model.forward
    seeing_bagel.vit_model.forward = lambda pixels: shown.append(len(pixels)) or tower(pixels)
    variant, episodes = collect(seeing_bagel, "edit")
    assert sum(shown) == 2, "two prompts' sources, once a group"
    shown.clear()
    variant, episodes = collect(seeing_bagel, "story")
    assert sum(shown) == 2 * 8
    shown.clear()
    ready(episodes, variant, seeing_bagel, through_pictures=True, velocity_weight=0.0)(episodes)["loss_text"].backward()
    assert sum(shown) == 2 * 8
    assert seeing_bagel.connector.fc1.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ROUNDS)
def test_a_fresh_actor_in_mid_episode_gives_the_same_distribution(small_bagel, name):
    env = InterleavedGenVectorEnv(short(name), 3)
    actor = Actor(small_bagel, window=Window(1, 0, 2))
    observation, _ = env.reset(seed=0)
    seeds = [5, 6, 7]
    actor.start(seeds)
    rounds, ended = 0, False
    while not ended:
        fresh = Actor(small_bagel, window=Window(1, 0, 2))
        fresh.start(seeds)
        decision, other = actor.act(observation), fresh.act(observation)
        rows = decision.active
        assert torch.equal(rows, other.active)
        if decision.log_prob is not None:
            assert torch.equal(decision.token[rows], other.token[rows])
            torch.testing.assert_close(decision.log_prob[rows], other.log_prob[rows], atol=1e-5, rtol=0)
        else:
            torch.testing.assert_close(decision.latent[rows], other.latent[rows], atol=1e-4, rtol=0)
        observation, _, terminated, *_ = env.step(decision.env_action, decision.active)
        rounds = max(rounds, int(env.episodes.state.images_drawn.max()))
        ended = bool(terminated.all())
    assert rounds == env.episodes.rules.image_budget


def test_every_segment_is_read_once(small_bagel):
    """Tokens and pictures go through the model once a rollout, whatever the number of rounds."""
    read = {"text": 0, "images": 0}
    kind = type(small_bagel)

    def read_text(context, ids, mask=None, **kwargs):
        read["text"] += int(ids.numel() if mask is None else mask.sum())
        return kind.read_text(small_bagel, context, ids, mask, **kwargs)

    def read_image(context, latent, mask=None, **kwargs):
        read["images"] += int(mask.sum())
        return kind.read_image(small_bagel, context, latent, mask=mask, **kwargs)

    small_bagel.read_text, small_bagel.read_image = read_text, read_image
    env = InterleavedGenVectorEnv(short("story"), 1)
    actor = Actor(small_bagel)
    observation, _ = env.reset(seed=0)
    actor.start([0])
    while observation["phase"][0] != Phase.DONE:
        decision = actor.act(observation)
        observation, *_ = env.step(decision.env_action, decision.active)
    assert read == {"text": int(observation["num_tokens"][0]) - 2, "images": 2}, "two placeholders are pictures, not words"


@pytest.mark.parametrize("name", ROUNDS)
def test_training_reads_every_segment_once(small_bagel, name):
    """Each token and each picture of an episode, and the prompt and its source once a group; rows that stopped early read no more."""
    variant, episodes = collect_ragged(small_bagel) if name == "reflect" else collect(small_bagel, name)
    sources, kind, words, pictures = variant.rules.source_images, type(small_bagel), [], []

    def read_text(context, ids, mask=None, **kwargs):
        words.extend(ids[mask].tolist())
        return kind.read_text(small_bagel, context, ids, mask, **kwargs)

    def read_image(context, latent, **kwargs):
        pictures.extend(latent)
        return kind.read_image(small_bagel, context, latent, **kwargs)

    small_bagel.read_text, small_bagel.read_image = read_text, read_image
    replay(small_bagel, episodes, ready(episodes, variant, small_bagel).legal_tokens)
    said = [token for row in episodes for token in row["tokens"][row["text_mask"]].tolist()]
    prompts = [token for row in episodes[::4] for token in row["prompt_tokens"][sources : row["prompt_length"]].tolist()]
    assert sorted(words) == sorted([*prompts, *(token for token in said if token != variant.rules.image_id)])
    assert len(pictures) == 2 * sources + said.count(variant.rules.image_id)


def test_a_group_reads_its_prompt_and_its_source_once(small_bagel):
    rows = []
    kind = type(small_bagel)
    small_bagel.read_image = lambda context, latent, **kwargs: (
        rows.append(len(latent)) or kind.read_image(small_bagel, context, latent, **kwargs)
    )
    variant = short("edit")
    first, second = variant.task.prompts("train", 2, 0)
    other = dataclasses.replace(first, sources=second.sources)  # the same words about another picture
    prompts = [first, other, first, second, first, other]
    shared = evaluate(small_bagel, variant, prompts)
    assert rows == [3]
    alone = evaluate(small_bagel, variant, prompts, batch_size=1)
    assert shared.texts == alone.texts
    torch.testing.assert_close(shared.images, alone.images, atol=1e-4, rtol=0)


def test_the_model_sees_its_own_picture(small_bagel):
    """Another first picture, the same words: other words may follow."""
    env = InterleavedGenVectorEnv(short("story"), 2)
    observation, _ = env.reset(seed=0, options={"prompts": ["a red circle then a blue square then a red cross"] * 2})
    actor = Actor(small_bagel)
    actor.start([0, 1])
    latent = torch.stack([torch.zeros(36, 48), torch.ones(36, 48)])
    both = torch.ones(2, dtype=torch.bool)
    observation, *_ = env.step({"token": torch.tensor([2, 2]), "latent": latent}, both)
    for _ in range(3):
        observation, *_ = env.step({"token": torch.tensor([2, 2]), "latent": latent}, both)
    assert torch.equal(observation["tokens"][0], observation["tokens"][1])
    actor.act(observation)
    assert not torch.allclose(actor._logits[0], actor._logits[1], atol=1e-3)
    changed = {**observation, "images": observation["images"].flip(0)}
    before = actor._logits.clone()
    actor.act(changed)
    torch.testing.assert_close(actor._logits, before.flip(0), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ROUNDS)
def test_every_variant_can_be_evaluated_and_batches_change_nothing(small_bagel, name):
    variant = short(name)
    prompts = variant.task.prompts("test", 6, 0)
    whole, parts = (evaluate(small_bagel, variant, prompts, batch_size=size) for size in (6, 2))
    assert whole.texts == parts.texts
    torch.testing.assert_close(whole.images, parts.images, atol=1e-4, rtol=0)
    assert torch.equal(whole.reward, parts.reward)


WINDOW = Window(2, 0, 3)


def collect(model, name, *, reward=lambda episodes: episodes.images.mean((1, 2, 3)) * 100 % 1):
    variant = make_variant(name, text_budget=5, image_steps=4, reward=reward) if isinstance(name, str) else name
    env = InterleavedGenVectorEnv(variant, 8, copy=False)
    episodes = Collector(env, Actor(model, window=WINDOW), 4).collect(variant.task.prompts("train", 2, 0), 3)
    return variant, episodes.flatten(0, 1)


def collect_ragged(model):
    """What row 0 says first after its first picture ends an episode: some rows stop early."""
    variant, episodes = collect(model, "reflect")
    after = episodes["image_places"][0, 0] - episodes["prompt_length"][0] + 2
    end = int(episodes["tokens"][0, after])
    variant, episodes = collect(model, dataclasses.replace(variant, rules=dataclasses.replace(variant.rules, end_id=end)))
    assert len(episodes["images_drawn"].unique()) > 1
    return variant, episodes


def ready(episodes, variant, model, **settings):
    episodes["advantage"] = group_advantage(episodes["reward"], episodes["group"])
    episodes["weight"] = episodes["text_share"] = torch.full((len(episodes),), 1 / len(episodes))
    legal = torch.stack([variant.rules.legal_tokens(), variant.rules.legal_tokens(after_image=True)])
    return UniGRPOLoss(model, model, legal, AlgorithmSettings(**settings))


@pytest.mark.parametrize("name", ROUNDS)
def test_trajectories_of_rounds(small_bagel, name):
    variant, episodes = collect(small_bagel, name)
    rules, drawn = variant.rules, episodes["images_drawn"]
    assert episodes["window_latents"].shape == (8, rules.image_budget * 3, 36, 48)
    assert (drawn >= 1).all()
    times = episodes["window_times"].unflatten(1, (rules.image_budget, 3))
    assert (times.diff(dim=-1) < 0).all()
    user = [Episodes(variant, 1).encode_turns(prompt) for prompt in variant.task.prompts("train", 2, 0)]
    assert all(user) == (name == "dialogue")
    for row in range(8):
        latents = episodes["window_latents"][row].unflatten(0, (rules.image_budget, 3))
        assert latents[: drawn[row]].abs().sum((1, 2, 3)).gt(0).all()
        assert not latents[drawn[row] :].any()
        chosen, said = episodes["chosen_mask"][row], episodes["tokens"][row]
        assert chosen.sum() <= rules.image_budget * rules.text_budget
        assert not (said[chosen] == rules.image_id).any()
        places = [p for p in (episodes["image_places"][row] - episodes["prompt_length"][row]).tolist() if p >= 0]
        turns = user[episodes["group"][row]] or [[]] * len(places)
        for place, turn in zip(places, turns, strict=True):
            spoken = [rules.image_id, *turn, *rules.next_ids]
            end = place + len(spoken)
            assert said[place:end].tolist() == spoken, "the picture, what the user then says, and the opening of the next thought"
            assert not chosen[place:end].any(), "what the env says is nobody's choice"
            assert chosen[end]


@pytest.mark.parametrize("model", ["small_bagel", "seeing_bagel"])
@pytest.mark.parametrize("name", ROUNDS)
def test_nothing_is_clipped_before_the_first_update(request, model, name):
    """One teacher-forced walk over all rounds gives what the rollout saw, for words and pictures of every round."""
    model = request.getfixturevalue(model)
    variant, episodes = collect(model, name)
    loss = ready(episodes, variant, model, text_clip=1e-2, image_clip=1e-5)
    out = loss(episodes)
    assert out["text_clip_fraction"] == 0
    assert out["image_clip_fraction"] == 0
    assert out["text_log_ratio"] < 1e-3
    assert out["image_log_ratio"] < 1e-6
    assert out["loss_velocity"] == 0
    changed = episodes.clone()
    changed["images"] = changed["images"] + 0.5
    if (changed["image_places"] >= 0).any():
        assert loss(changed)["text_log_ratio"] > 1e-3 or loss(changed)["image_log_ratio"] > 1e-6, "the pictures that were read matter"


def gradient(model, parts, loss):
    model.zero_grad()
    for part in parts:
        out = loss(part)
        (out["loss_text"] + out["loss_image"] + out["loss_velocity"] + out["loss_kl"]).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("name", ["edit", "story"])
def test_gradients_reach_the_reading_of_pictures_only_if_asked(small_bagel, name):
    """By default the words teach the image expert nothing; the words before a picture still learn from what comes after it."""
    variant, episodes = collect(small_bagel, name)
    found = {}
    for through in (False, True):
        out = ready(episodes, variant, small_bagel, through_pictures=through, velocity_weight=0.0)(episodes)
        small_bagel.zero_grad()
        out["loss_text"].backward(retain_graph=True)
        lists = small_bagel.parameter_lists()
        found[through] = {expert: sum(float(p.grad.abs().sum()) for p in part if p.grad is not None) for expert, part in lists.items()}
        assert found[through]["text"] > 0
        found[through]["loss"] = out["loss_text"].detach(), out["loss_image"].detach()
    assert found[False]["image"] == 0 < found[True]["image"]
    assert found[False]["loss"] == found[True]["loss"]


@pytest.mark.parametrize("name", ["reflect", "dialogue", "edit"])
def test_splits_and_order_change_nothing(small_bagel, name):
    """Ragged rounds side by side, alone, or turned round: one gradient."""
    variant, episodes = collect_ragged(small_bagel) if name == "reflect" else collect(small_bagel, name)
    loss = ready(episodes, variant, small_bagel, velocity_weight=0.0)
    whole = gradient(small_bagel, [episodes], loss)
    assert whole.isfinite().all()
    assert whole.abs().sum() > 0
    for parts in (episodes.split(2), [episodes[torch.arange(7, -1, -1)]], list(episodes.split([1, 7]))):
        torch.testing.assert_close(gradient(small_bagel, parts, loss), whole, atol=3e-6, rtol=1e-3)


def test_a_row_plays_among_ragged_others_as_it_plays_alone(small_bagel):
    variant, episodes = collect_ragged(small_bagel)
    prompts = variant.task.prompts("train", 2, 0)
    for row in episodes:
        env, actor, seed = InterleavedGenVectorEnv(variant, 1), Actor(small_bagel, window=WINDOW), int(row["seed"])
        observation, _ = env.reset(seed=[seed], options={"prompts": [prompts[row["group"]]]})
        actor.start([seed], (row["window_times"][:1] < 1).long())
        alone = play(env, actor, observation).observation
        assert env.episodes.state.images_drawn[0] == row["images_drawn"]
        assert torch.equal(alone["tokens"][0, row["prompt_length"] : alone["num_tokens"][0]], row["tokens"][row["text_mask"]])
        assert torch.equal(alone["image_places"][0], row["image_places"])
        torch.testing.assert_close(alone["latent"][0], row["latent"], atol=1e-4, rtol=0)
        torch.testing.assert_close(alone["images"][0], row["images"], atol=1e-4, rtol=0)


def test_what_unused_entries_hold_changes_nothing(small_bagel):
    """Rounds that were not drawn, pictures that were not read, tokens beyond the last: whatever is there, losses and gradients are the same."""
    variant, episodes = collect_ragged(small_bagel)
    legal = ready(episodes, variant, small_bagel).legal_tokens
    reference = copy.deepcopy(small_bagel).initialise(1)
    loss = UniGRPOLoss(small_bagel, reference, legal, AlgorithmSettings(velocity_weight=1.0, latent_kl_weight=1.0, text_kl_weight=1.0))
    junk = episodes.clone()
    undrawn = torch.arange(variant.rules.image_budget) >= junk["images_drawn"][:, None]
    for name in ("window_latents", "window_means", "window_times"):
        junk[name].unflatten(1, (variant.rules.image_budget, -1))[undrawn] = torch.nan
    junk["images"][junk["image_places"] < 0] = torch.nan
    junk["tokens"][~junk["text_mask"]] = variant.rules.image_id
    assert junk["window_times"].isnan().any()
    assert junk["images"].isnan().any()
    expected, found = loss(episodes), loss(junk)
    assert all(expected[name] != 0 for name in ("loss_text", "loss_image", "loss_velocity", "loss_kl"))
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert torch.equal(gradient(small_bagel, [junk], loss), gradient(small_bagel, [episodes], loss))


@pytest.mark.parametrize("name", ["reflect", "edit", "dialogue"])
def test_a_run_over_rounds_stops_and_goes_on(small_bagel, tmp_path, name):
    """Same weights, same metrics, and the same pictures in the report, those from before the stop included."""
    small_bagel.save_pretrained(tmp_path / "start")
    settings = [
        f"env.variant={name}", "env.text_budget=4", "env.image_steps=4", "algorithm.window_size=2", "algorithm.window_high=3",
        "trainer.groups=2", "trainer.group_size=2", "evaluation.prompts=4", "env.reward=crispness", "env.thought_reward=brevity",
        "output.tensorboard=false", "output.samples_every=0", "evaluation.every=0", "output.checkpoint_every=1",
    ]  # fmt: skip

    def trainer(folder, iterations):
        model = type(small_bagel).from_pretrained(tmp_path / "start")
        return Trainer(load_config("unigrpo", [*settings, f"trainer.iterations={iterations}", f"output.folder={tmp_path / folder}"]), model)

    def longer(config):
        config.trainer.iterations = 2
        return config

    def account(one):
        summary, folder = run(one, Console(quiet=True)), Path(one.config.output.folder)
        pictures = re.findall('data:image/png[^"]*', (folder / "report.html").read_text())
        rows = [{key: value for key, value in row.items() if key not in CLOCKED} for row in read_metrics(folder)]
        return {key: value for key, value in summary.items() if not key.endswith("seconds_training")}, pictures, rows

    whole = trainer("whole", 2)
    expected = account(whole)
    account(trainer("stopped", 1))
    again = Trainer.resume(tmp_path / "stopped", longer)
    assert account(again) == expected
    assert len(expected[1]) > 2 * 4, "four episodes before and after, of several pictures or with a source"
    assert len(expected[2]) == 2
    weights = whole.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in again.model.state_dict().items())
    assert any(not torch.equal(value, small_bagel.state_dict()[name]) for name, value in weights.items())


def test_other_objectives_say_that_they_take_one_picture(small_bagel, tmp_path):
    for config in ("fpo", "refl"):
        with pytest.raises(ValueError, match="one picture and no sources"):
            Trainer(load_config(config, ["env.variant=story", f"output.folder={tmp_path}"]), small_bagel)


def test_one_picture_needs_no_reading(small_bagel):
    variant = dataclasses.replace(make_variant("text_to_image"))
    assert variant.rules.stored_images == 0
    assert "images" not in InterleavedGenVectorEnv(variant, 1).observation_space.spaces

"""Episodes and scores as bytes and back."""

import json
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save

from rewards import EpisodeBatch, Failures, Scores
from rewards.service.wire import (
    ENTRY,
    is_finite,
    pack_episodes,
    pack_health,
    pack_scores,
    unpack_episodes,
    unpack_health,
    unpack_scores,
)


def random_images(count, seed=0, side=6):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, side, side + 2, generator=generator)


def several_rounds():
    """Episodes of no, one and three images, the first with sources of another size."""
    images = random_images(3)
    images[0] = 0
    return EpisodeBatch(
        prompts=["ein Tee, 茶", 'says "tea" \ud800', ""],
        texts=["", "a", "a b c"],
        images=images,
        metadata=[{}, {"objects": [{"count": 2, "colour": None}], "is": True}, {"x": {"y": 0.1}}],
        all_images=[images[:0], images[1:2], torch.cat([random_images(2, 1), images[2:]])],
        thoughts=[[], ["a"], ["a", "b", "c"]],
        sources=[random_images(2, 2, side=4), random_images(0, side=4), random_images(1, 3)],
    )


def same(one, other):
    assert one.prompts == other.prompts
    assert one.texts == other.texts
    assert one.thoughts == other.thoughts
    assert one.metadata == other.metadata
    for name in ("all_images", "sources"):
        for mine, theirs in zip(getattr(one, name), getattr(other, name), strict=True):
            assert mine.dtype == torch.float32
            assert torch.equal(mine, theirs)
    assert torch.equal(one.images, other.images)


def test_exact_images_come_back_bit_for_bit():
    episodes = several_rounds()
    same(unpack_episodes(pack_episodes(episodes, exact=True)), episodes)


def test_images_become_the_nearest_bytes():
    episodes = several_rounds()
    found = unpack_episodes(pack_episodes(episodes))
    assert (found.images - episodes.images).abs().max() <= 0.5001 / 255
    # A second trip changes nothing: these images come from bytes.
    same(unpack_episodes(pack_episodes(found)), found)


def test_pixels_beyond_the_range_are_cut_off():
    images = torch.tensor([-0.5, 0.0, 1.0, 7.0]).view(1, 1, 2, 2).expand(1, 3, 2, 2)
    found = unpack_episodes(pack_episodes(EpisodeBatch([""], [""], images, [{}])))
    assert found.images[0, 0].flatten().tolist() == [0, 0, 1, 1]


def test_bytes_are_a_quarter_and_images_are_sent_once():
    images = random_images(4, side=64)
    episodes = EpisodeBatch([""] * 4, [""] * 4, images, [{}] * 4)
    assert images.numel() < len(pack_episodes(episodes)) < images.numel() + 1000
    exact = len(pack_episodes(episodes, exact=True))
    assert 4 * images.numel() < exact < 4 * images.numel() + 1000


def test_images_in_another_order_of_memory():
    images = random_images(2).permute(0, 1, 3, 2)
    episodes = EpisodeBatch([""] * 2, [""] * 2, images, [{}] * 2)
    same(unpack_episodes(pack_episodes(episodes, exact=True)), episodes)


def test_no_episodes():
    nothing = EpisodeBatch([], [], random_images(2)[:0], [])
    assert len(unpack_episodes(pack_episodes(nothing))) == 0


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_pixels_that_no_byte_stands_for(wrong):
    episodes = several_rounds()
    episodes.all_images[2][1, 0, 0, 0] = wrong
    assert [is_finite(episodes, row) for row in range(3)] == [True, True, False]
    with pytest.raises(ValueError, match=r"expected finite pixels in all_images\.2"):
        pack_episodes(episodes)
    found = unpack_episodes(pack_episodes(episodes, exact=True))
    assert not found.all_images[2].isfinite().all()


def test_a_tuple_arrives_as_a_list():
    episodes = EpisodeBatch([""], [""], random_images(1), [{"size": (1, (2, 3))}])
    assert unpack_episodes(pack_episodes(episodes)).metadata == [{"size": [1, [2, 3]]}]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"a": [0, {"b": {1}}]}, r"metadata\[1\]\['a'\]\[1\]\['b'\] .* got <class 'set'>"),
        ({"a": np.float32(1)}, r"metadata\[1\]\['a'\] .* got <class 'numpy.float32'>"),
        ({"a": {1: 2}}, r"texts as keys of metadata\[1\]\['a'\], got 1; only texts, numbers"),
    ],
)
def test_metadata_that_json_cannot_hold(entry, message):
    episodes = EpisodeBatch([""] * 2, [""] * 2, random_images(2), [{}, entry])
    with pytest.raises(ValueError, match=message):
        pack_episodes(episodes)


def words(**changes):
    entries = {"prompts": ["a"], "texts": [""], "thoughts": [[]], "metadata": [{}]}
    return {ENTRY: json.dumps(entries | changes)}


IMAGE = {"images": torch.zeros(1, 3, 2, 2)}


def test_the_form_that_others_may_write():
    found = unpack_episodes(save(IMAGE, words()))
    assert found.prompts == ["a"]
    assert found.all_images[0].shape == (1, 3, 2, 2)


@pytest.mark.parametrize(
    "body",
    [b"", b"{}", bytes(100), pickle.dumps([1] * 50), save(IMAGE, words())[:-1]],
    ids=["nothing", "json", "zeros", "pickle", "cut"],
)
def test_bytes_that_are_no_safetensors(body):
    with pytest.raises(ValueError, match=f"got {len(body)} bytes that are no safetensors"):
        unpack_episodes(body)


@pytest.mark.parametrize(
    "body",
    [
        save(IMAGE),
        save(IMAGE, {ENTRY: "[1"}),
        save(IMAGE, {ENTRY: "[" * 100_000}),
        save(IMAGE, {ENTRY: "[]"}),
        save(IMAGE, words(prompts=["a", "b"])),
        save(IMAGE, words(prompts=[1])),
        save(IMAGE, words(thoughts=[[1]])),
        save(IMAGE, words(metadata=[[]])),
        save({}, words()),
        save({"images": torch.zeros(1, 4, 2, 2)}, words()),
        save({"images": torch.zeros(1, 3, 2, 2, dtype=torch.int64)}, words()),
        save(IMAGE | {"sources.1": torch.zeros(1, 3, 2, 2)}, words()),
    ],
)
def test_a_blob_that_holds_no_episodes(body):
    with pytest.raises(ValueError, match=r"wire\.pack_episodes, got another one"):
        unpack_episodes(body)


def test_scores_come_back_bit_for_bit():
    reward = torch.tensor([0.1, torch.nan, -3e-39])
    failures = Failures({"ocr: timeout": 1}, ValueError("no ink"))
    scores = Scores(reward, {"ocr/exact": torch.tensor([1.0, torch.inf, 0.0])}, failures)
    answer = pack_scores(scores)
    assert json.loads(answer)["reward"][1] is None
    found = unpack_scores(answer, 3)
    assert torch.equal(found.reward[::2], reward[::2])
    assert found.reward[1].isnan()
    assert found.components["ocr/exact"].isnan().tolist() == [False, True, False]
    assert found.failures.counts == {"ocr: timeout": 1}
    assert str(found.failures.first) == "no ink"


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"[]",
        b"{}",
        b'{"reward": [1]}',
        b'{"reward": [1, "2"]}',
        b'{"reward": [1, 2], "a": [1]}',
        b'{"reward": [1, 2], "failures": 3}',
        b'{"reward": [1, 2], "failures": {"counts": [3]}}',
    ],
)
def test_answers_that_are_no_scores(answer):
    with pytest.raises(ValueError):
        unpack_scores(answer, 2)


def test_health():
    names, form = unpack_health(pack_health({"b": 1, "a": 2}))
    assert (names, form) == (["a", "b"], 1)
    with pytest.raises(ValueError, match="'rewards' and 'format'"):
        unpack_health(b'{"status": "ok"}')

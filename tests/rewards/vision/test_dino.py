"""Likeness to a reference image."""

import pytest
import torch
from PIL import Image
from torch.nn import functional
from transformers import BitImageProcessorPil, Dinov2Model

from rewards import EpisodeBatch
from rewards.vision.dino import Dino


def image(seed, height=40, width=40):
    levels = torch.randint(
        0, 256, (3, height, width), generator=torch.Generator().manual_seed(seed)
    )
    return levels.float() / 255


def episodes(images, sources=(), metadata=None):
    count = len(images)
    return EpisodeBatch(
        ["a"] * count, [""] * count, images, metadata or [{}] * count, sources=list(sources)
    )


def class_token(folder, picture):
    """The normalised class token of an image, by transformers alone."""
    levels = (picture * 255).byte().permute(1, 2, 0).numpy()
    processor = BitImageProcessorPil.from_pretrained(folder)
    inputs = processor(images=[Image.fromarray(levels)], return_tensors="pt")
    with torch.no_grad():
        states = Dinov2Model.from_pretrained(folder)(**inputs).last_hidden_state
    return functional.normalize(states[0, 0], dim=0)


def test_the_score_is_the_cosine_of_class_tokens(tiny_dino):
    drawn = torch.stack([image(0), image(1)])
    # The references differ in size; of two sources the first counts.
    sources = [torch.stack([image(2, 50, 64), image(3, 50, 64)]), image(4, 33, 40)[None]]
    reward = Dino(model=tiny_dino, device="cpu")
    scores = reward(episodes(drawn, sources)).reward
    for row in range(2):
        expected = class_token(tiny_dino, drawn[row]) @ class_token(tiny_dino, sources[row][0])
        assert float(scores[row]) == pytest.approx(float(expected), abs=1e-3)
    assert scores[0] != pytest.approx(float(scores[1]), abs=2e-3)


def test_an_image_is_like_itself(tiny_dino):
    drawn = torch.stack([image(0), image(1)])
    reward = Dino(model=tiny_dino, device="cpu")
    reward.prepare()
    assert reward(episodes(drawn, drawn.split(1))).reward == pytest.approx([1, 1], abs=1e-6)
    assert (reward(episodes(drawn, drawn.flip(0).split(1))).reward < 0.999).all()


def test_a_reference_may_be_in_the_metadata(tiny_dino, tmp_path):
    levels = (image(0) * 255).byte().permute(1, 2, 0).numpy()
    Image.fromarray(levels).save(tmp_path / "target.png")
    metadata = [{"target": str(tmp_path / "target.png")}, {"target": image(0)}]
    drawn = torch.stack([image(0), image(0)])
    reward = Dino(model=tiny_dino, device="cpu", reference="target")
    reward.prepare()
    scores = reward(episodes(drawn, metadata=metadata)).reward
    assert scores == pytest.approx([1, 1], abs=1e-6)


def test_an_episode_without_a_reference_has_no_score(tiny_dino):
    drawn = torch.stack([image(0), image(1), image(2)])
    metadata = [{"target": "nowhere.png"}, {"target": image(1)}, {}]
    reward = Dino(model=tiny_dino, device="cpu", reference="target")
    found = reward(episodes(drawn, metadata=metadata))
    assert found.reward.isnan().tolist() == [True, False, True]
    assert found.failures.counts == {"ValueError": 1, "no reference image": 1}
    nothing = Dino(model=tiny_dino, device="cpu")(episodes(drawn))
    assert nothing.reward.isnan().all()
    assert "option 'reference'" in str(nothing.failures.first)


def test_each_reference_is_embedded_once(tiny_dino, monkeypatch):
    reward = Dino(model=tiny_dino, device="cpu")
    seen = []
    embed = reward.embed

    def counted(engine, images):
        seen.append(len(images))
        return embed(engine, images)

    monkeypatch.setattr(reward, "embed", counted)
    drawn = torch.stack([image(0), image(1), image(2)])
    batch = episodes(drawn, [image(5)[None].clone() for _ in range(3)])
    first = reward(batch).reward
    assert torch.equal(reward(batch).reward, first)
    # One reference and three images; then the images alone.
    assert seen == [1, 3, 3]


def test_the_gradient_reaches_the_drawn_image_alone(tiny_dino):
    drawn = torch.stack([image(0), image(1)]).requires_grad_()
    source = image(2)[None].requires_grad_()
    reward = Dino(model=tiny_dino, device="cpu")
    reward(episodes(drawn, [source, source])).reward.sum().backward()
    assert (drawn.grad.abs().amax((1, 2, 3)) > 0).all()
    assert source.grad is None

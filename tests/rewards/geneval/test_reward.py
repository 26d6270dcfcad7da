"""GenEval as a reward."""

import pickle

import pytest
import torch

from rewards import EpisodeBatch, WeightedReward
from rewards.factory import make_reward
from rewards.geneval.detector import Mask2FormerDetector
from rewards.geneval.names import COLOURS
from rewards.geneval.reward import GenEval
from rewards.geneval.verifier import Detection

CUP = {"tag": "single_object", "include": [{"class": "cup", "count": 1}]}
TWO_CUPS = {
    "tag": "counting",
    "include": [{"class": "cup", "count": 2}],
    "exclude": [{"class": "cup", "count": 3}],
}
RED_CUP = {"tag": "colors", "include": [{"class": "cup", "count": 1, "color": "red"}]}


def batch(metadata, images=None):
    if images is None:
        images = torch.zeros(len(metadata), 3, 8, 8)
    return EpisodeBatch(["a photo"] * len(metadata), [""] * len(metadata), images, metadata)


def finds(*scores):
    """A detector that finds cups of these certainties in every image."""
    box = (0.0, 0.0, 8.0, 8.0)

    def detect(images):
        return [[Detection("cup", score, box) for score in scores] for _ in images]

    return detect


def names(colour):
    """A judge of colours that always sees the same one."""

    def name_colours(image, objects, name):
        assert image.shape == (3, 8, 8)
        assert name == "cup"
        return [colour] * len(objects)

    return name_colours


def test_strict_and_soft():
    metadata = [CUP, RED_CUP, {"include": [{"class": "fork", "count": 1}]}]
    options = {"detector": finds(0.5), "colours": names("blue")}
    strict = GenEval(**options)(batch(metadata))
    assert strict.reward.tolist() == [1, 0, 0]
    assert strict.components["soft"].tolist() == [1, 0.5, 0]
    soft = GenEval(score="soft", **options)(batch(metadata))
    assert soft.reward.tolist() == [1, 0.5, 0]
    assert soft.components["strict"].tolist() == [1, 0, 0]


def test_counting_has_a_threshold_of_its_own():
    reward = GenEval(detector=finds(0.95, 0.95, 0.85), colours=names("red"))
    assert reward(batch([TWO_CUPS])).reward.tolist() == [1]
    # With the same threshold as the others it sees three.
    lower = GenEval(detector=finds(0.95, 0.95, 0.85), colours=names("red"), counting_threshold=0.3)
    assert lower(batch([TWO_CUPS])).reward.tolist() == [0]


def test_logged_by_name():
    reward = GenEval(detector=finds(0.5), colours=names("red"))
    scores = WeightedReward({reward: 2.0})(batch([RED_CUP]))
    assert scores.reward.tolist() == [2]
    assert {name.partition("/")[2] for name in scores.components} == {"", "strict", "soft"}


def test_an_image_that_is_not_finite_has_no_score():
    images = torch.zeros(2, 3, 8, 8)
    images[1, 0, 0, 0] = torch.nan
    scores = GenEval(detector=finds(0.5), colours=names("red"))(batch([CUP, CUP], images))
    assert scores.reward[0] == 1
    assert scores.reward[1].isnan()
    assert scores.failures.counts == {"not finite": 1}
    none = GenEval(detector=finds(0.5), colours=names("red"))(batch([CUP], images[1:]))
    assert none.reward.isnan().all()


def test_other_metadata_is_an_error():
    reward = GenEval(detector=finds(0.5), colours=names("red"))
    with pytest.raises(ValueError, match="expected metadata in GenEval's form"):
        reward(batch([{"kind": "two"}]))


def test_unknown_class(tiny_detector):
    reward = GenEval(detector=tiny_detector, colours=names("red"))
    with pytest.raises(ValueError, match=r"got 'mouse'; did you mean .*'computer mouse'"):
        reward(batch([{"include": [{"class": "mouse", "count": 1}]}]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "fuzzy"}, "one of strict, soft, got 'fuzzy'"),
        ({"threshold": 1.0}, "threshold of reward 'geneval' at least 0 and below 1, got 1.0"),
        ({"counting_threshold": -1}, "counting_threshold"),
        ({"dtype": "float64"}, "dtype of reward 'geneval/detector'"),
        ({"batch": 0}, "at least 1, got 0"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        GenEval(**options)


def test_end_to_end_with_tiny_models(tiny_detector, tiny_clip):
    options = {"detector": tiny_detector, "colours": tiny_clip, "device": "cpu"}
    reward = make_reward("geneval", {**options, "threshold": 0.0, "score": "soft"})
    reward.prepare()
    images = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    # What the network finds in the first image is asked for, in each colour.
    found = Mask2FormerDetector(model=tiny_detector, threshold=0.0)(images)
    wanted = {"class": found[0][0].name, "count": 1}
    verdicts = []
    for colour in COLOURS[:3]:
        verdicts += reward.verdicts(images, [{"include": [{**wanted, "color": colour}]}])
    assert sum(verdict.correct for verdict in verdicts) <= 1
    episodes = batch([{"include": [wanted]}], images)
    assert reward(episodes).components["strict"].tolist() == [1]
    again = pickle.loads(pickle.dumps(reward))
    assert torch.equal(again(episodes).reward, reward(episodes).reward)
    # At the thresholds of GenEval nothing is found.
    usual = make_reward("geneval", options)
    assert usual(episodes).reward.tolist() == [0]


def test_a_missing_model_is_known_before_the_first_episode(tmp_path):
    reward = GenEval(detector=str(tmp_path / "none"))
    with pytest.raises(OSError, match="reward 'geneval/detector' cannot load its model from"):
        reward.prepare()

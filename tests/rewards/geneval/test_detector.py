"""Objects found by a Mask2Former of transformers."""

import importlib.util
import pickle
from types import SimpleNamespace

import pytest
import torch
from transformers import Mask2FormerImageProcessorPil

from rewards.geneval.detector import Mask2FormerDetector, box_of, find_objects
from rewards.geneval.names import CLASSES


def sure_of(labels):
    """Logits `[len(labels), 81]` of queries that are sure of their labels."""
    logits = torch.zeros(len(labels), 81)
    logits[range(len(labels)), labels] = 12.0
    return logits


def test_classes_are_looked_up_by_number():
    assert len(set(CLASSES)) == 80
    for label, name in enumerate(CLASSES):
        (found,) = find_objects(sure_of([label]), torch.full((1, 4, 4), 9.0), (4, 4))
        assert found.name == name


# Numbers of COCO's labels; GenEval names some objects otherwise than COCO.
@pytest.mark.parametrize(
    ("label", "name"),
    [
        (0, "person"), (3, "motorcycle"), (4, "airplane"), (6, "train"), (32, "sports ball"),
        (57, "couch"), (58, "potted plant"), (60, "dining table"), (62, "tv"),
        (64, "computer mouse"), (65, "tv remote"), (66, "computer keyboard"), (79, "toothbrush"),
    ],
)  # fmt: skip
def test_names_of_labels(label, name):
    assert CLASSES[label] == name


def test_same_as_transformers_at_the_size_of_its_own_masks():
    generator = torch.Generator().manual_seed(0)
    # [6, 81] and [6, 24, 24]
    classes = 6 * torch.randn(6, 81, generator=generator)
    masks = 4 * torch.randn(6, 24, 24, generator=generator)
    output = SimpleNamespace(class_queries_logits=classes[None], masks_queries_logits=masks[None])
    theirs = Mask2FormerImageProcessorPil().post_process_instance_segmentation(
        output, threshold=0.3, return_binary_maps=True
    )[0]
    ours = find_objects(classes, masks, (384, 384))
    assert len(ours) == len(theirs["segments_info"]) > 2
    by_score = sorted(ours, key=lambda each: each.score)
    # Their list has the order of `topk`, which is not sorted.
    expected = list(zip(theirs["segments_info"], theirs["segmentation"], strict=True))
    expected.sort(key=lambda pair: pair[0]["score"])
    for each, (info, mask) in zip(by_score, expected, strict=True):
        assert each.name == CLASSES[info["label_id"]]
        assert each.score == pytest.approx(info["score"], abs=1e-6)
        assert torch.equal(each.mask, mask == 1)


def test_boxes_are_around_masks():
    mask = torch.full((1, 20, 30), -9.0)
    mask[0, 3:7, 10:25] = 9.0
    (found,) = find_objects(sure_of([0]), mask, (20, 30))
    assert found.box == (10, 3, 25, 7) == box_of(found.mask)
    assert found.mask.sum() == 4 * 15


def test_an_object_without_pixels_or_certainty_is_none():
    masks = torch.full((1, 8, 8), -9.0)
    assert find_objects(sure_of([0]), masks, (8, 8), threshold=0.0) == []
    # The last class stands for "no object".
    assert find_objects(sure_of([80]), -masks, (8, 8)) == []
    # Sure of the class, but the pixels of the mask are likely by little more than a half.
    assert find_objects(sure_of([0]), -masks / 90, (8, 8), threshold=0.6) == []


def test_end_to_end(tiny_detector):
    images = torch.rand(3, 3, 40, 56, generator=torch.Generator().manual_seed(0))
    detector = Mask2FormerDetector(model=tiny_detector, threshold=0.0, batch=2)
    found = detector(images)
    assert [len(objects) for objects in found] == [10, 10, 10]
    for each in found[0]:
        assert each.mask.shape == (40, 56)
        assert each.mask.dtype == torch.bool
    again = pickle.loads(pickle.dumps(detector))
    (alone,) = again(images[2:])
    assert [each.name for each in alone] == [each.name for each in found[2]]
    assert [each.score for each in alone] == pytest.approx([each.score for each in found[2]])


def test_nothing_found(tiny_detector):
    detector = Mask2FormerDetector(model=tiny_detector)
    assert detector(torch.zeros(2, 3, 64, 64)) == [[], []]


def test_other_classes_are_refused(detector_of_three_classes):
    detector = Mask2FormerDetector(model=detector_of_three_classes)
    with pytest.raises(ValueError, match="80 classes, got 3"):
        detector(torch.zeros(1, 3, 64, 64))


def test_without_scipy(monkeypatch, tiny_detector):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs scipy; install it with: .*unigrpo\[geneval\]"):
        Mask2FormerDetector(model=tiny_detector).load()

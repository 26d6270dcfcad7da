"""GenEval's verdict on hand-made detections."""

import pytest

from rewards.geneval.verifier import Detection, group, positions, verify


def at(name, x, y=0.0, score=0.9, size=10.0):
    """An object whose box of this size has its centre at x, y."""
    half = size / 2
    return Detection(name, score, (x - half, y - half, x + half, y + half))


def judge(objects, wanted, colours=None, threshold=0.3):
    """The verdict; `colours` are named by the x of an object's centre."""

    def name_colours(some):
        return [colours[(each.box[0] + each.box[2]) / 2] for each in some]

    return verify(group(objects, threshold), wanted, name_colours)


CUP = {"include": [{"class": "cup", "count": 1}]}
CUP_AND_FORK = {"include": [{"class": "cup", "count": 1}, {"class": "fork", "count": 1}]}
TWO_CUPS = {
    "include": [{"class": "cup", "count": 2}],
    "exclude": [{"class": "cup", "count": 3}],
}
RED_CUP = {"include": [{"class": "cup", "count": 1, "color": "red"}]}
TWO_RED_CUPS = {"include": [{"class": "cup", "count": 2, "color": "red"}]}
FORK_LEFT_OF_CUP = {
    "include": [
        {"class": "cup", "count": 1},
        {"class": "fork", "count": 1, "position": ["left of", 0]},
    ]
}
RED_CUP_BLUE_FORK = {
    "include": [
        {"class": "cup", "count": 1, "color": "red"},
        {"class": "fork", "count": 1, "color": "blue"},
    ]
}
RED_FORK_LEFT_OF_RED_CUP = {
    "include": [
        {"class": "cup", "count": 1, "color": "red"},
        {"class": "fork", "count": 1, "color": "red", "position": ["left of", 0]},
    ]
}
CUPS = [at("cup", 0), at("cup", 50), at("cup", 100)]

# What is found, what is wanted, colours by x; the verdict and the soft score.
TABLE = {
    "single: there": ([at("cup", 0)], CUP, {}, True, 1.0),
    "single: nothing": ([], CUP, {}, False, 0.0),
    "single: another object": ([at("fork", 0)], CUP, {}, False, 0.0),
    "single: more are no fault but lower the soft score": (CUPS[:2], CUP, {}, True, 0.0),
    "single: the soft score may be below 0": (CUPS, CUP, {}, True, -1.0),
    "two: both": ([at("cup", 0), at("fork", 50)], CUP_AND_FORK, {}, True, 1.0),
    "two: one": ([at("fork", 50)], CUP_AND_FORK, {}, False, 0.5),
    "counting: exact": (CUPS[:2], TWO_CUPS, {}, True, 1.0),
    "counting: too few": (CUPS[:1], TWO_CUPS, {}, False, 0.5),
    "counting: too many": (CUPS, TWO_CUPS, {}, False, 0.5),
    "colours: right": ([at("cup", 0)], RED_CUP, {0: "red"}, True, 1.0),
    "colours: wrong": ([at("cup", 0)], RED_CUP, {0: "pink"}, False, 0.5),
    "colours: not there": ([], RED_CUP, {}, False, 0.0),
    "colours: one of two": (CUPS[:2], TWO_RED_CUPS, {0: "red", 50: "blue"}, False, 0.75),
    "position: as asked for": ([at("cup", 50), at("fork", 0)], FORK_LEFT_OF_CUP, {}, True, 1.0),
    "position: the other way": (
        [at("cup", 0), at("fork", 50)], FORK_LEFT_OF_CUP, {}, False, 2 / 3,
    ),
    "position: no target": ([at("fork", 0)], FORK_LEFT_OF_CUP, {}, False, 1 / 3),
    "position: nothing to place": ([at("cup", 0)], FORK_LEFT_OF_CUP, {}, False, 1 / 3),
    "attributes: both": (
        [at("cup", 0), at("fork", 50)], RED_CUP_BLUE_FORK, {0: "red", 50: "blue"}, True, 1.0,
    ),
    "attributes: exchanged": (
        [at("cup", 0), at("fork", 50)], RED_CUP_BLUE_FORK, {0: "blue", 50: "red"}, False, 0.5,
    ),
    "colour and position: both": (
        [at("cup", 50), at("fork", 0)], RED_FORK_LEFT_OF_RED_CUP, {50: "red", 0: "red"}, True, 1.0,
    ),
    "colour and position: a wrong target is none": (
        [at("cup", 50), at("fork", 0)],
        RED_FORK_LEFT_OF_RED_CUP,
        {50: "blue", 0: "red"},
        False,
        # Counts 1 and 1, colours 0 and 1, position 0.
        3 / 5,
    ),
    "colour and position: a wrong colour leaves the position out": (
        [at("cup", 50), at("fork", 0)],
        RED_FORK_LEFT_OF_RED_CUP,
        {50: "red", 0: "blue"},
        False,
        3 / 4,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TABLE)
def test_verdicts(case):
    objects, wanted, colours, correct, soft = TABLE[case]
    verdict = judge(objects, wanted, colours)
    assert verdict.correct == correct
    assert verdict.soft == pytest.approx(soft)
    assert bool(verdict.reasons) != correct


@pytest.mark.parametrize(
    ("objects", "wanted", "reason"),
    [
        ([], CUP, "expected 1 cup, found 0"),
        (CUPS, TWO_CUPS, "expected fewer than 3 cup, found 3"),
        (CUPS[:1], RED_CUP, "expected 1 red cup, found pink"),
        ([at("cup", 0), at("fork", 50)], FORK_LEFT_OF_CUP, "fork left of cup, found right of"),
        ([at("cup", 0), at("fork", 0)], FORK_LEFT_OF_CUP, "found no clear position"),
        ([at("fork", 0)], FORK_LEFT_OF_CUP, "which is not there as asked for"),
    ],
)
def test_reasons(objects, wanted, reason):
    verdict = judge(objects, wanted, {0: "pink"})
    assert any(reason in found for found in verdict.reasons), verdict.reasons


def test_the_most_certain_stand_for_the_class():
    unsure = at("cup", 0, score=0.5)
    sure = at("cup", 50, score=0.8)
    assert judge([unsure, sure], RED_CUP, {0: "red", 50: "blue"}).correct is False
    assert judge([unsure, sure], RED_CUP, {0: "blue", 50: "red"}).correct is True


def test_of_equally_certain_objects_the_first_stands_for_the_class():
    objects = [at("cup", 0), at("cup", 50)]
    assert judge(objects, RED_CUP, {0: "red", 50: "blue"}).correct
    assert not judge(objects[::-1], RED_CUP, {0: "red", 50: "blue"}).correct


def test_an_object_at_the_threshold_does_not_count():
    assert not judge([at("cup", 0, score=0.3)], CUP).correct
    assert judge([at("cup", 0, score=0.301)], CUP).correct


def test_only_the_16_most_certain_of_a_class_count():
    objects = [at("cup", x, score=0.5 + x / 100) for x in range(20)]
    assert [each.box[0] + 5 for each in group(objects, 0.3)["cup"]] == list(range(19, 3, -1))


def test_colours_are_asked_once_and_only_where_they_matter():
    asked = []

    def name_colours(some):
        asked.append(len(some))
        return ["red"] * len(some)

    found = group([*CUPS, at("fork", 20)], 0.3)
    verify(found, TWO_CUPS, name_colours)
    assert asked == []
    verify(found, RED_CUP, name_colours)
    assert asked == [1]
    # The verdict and the soft score both ask for the fork's colour.
    verify(found, {"include": [{"class": "fork", "count": 1, "color": "red"}]}, name_colours)
    assert asked == [1, 1]


def test_every_pair_must_stand_as_asked_for():
    wanted = {
        "include": [
            {"class": "cup", "count": 2},
            {"class": "fork", "count": 1, "position": ["left of", 0]},
        ]
    }
    assert judge([at("fork", -50), *CUPS[:2]], wanted).correct
    assert not judge([at("fork", 25), *CUPS[:2]], wanted).correct


# Boxes of side 10: the margin takes 0.1 * (10 + 10) = 2 off each side.
@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        (0, 0, set()),
        # Beyond the margin by less than half of the distance: 2 / 4 is not more than 0.5.
        (4, 0, set()),
        (4.01, 0, {"right of"}),
        (-4.01, 0, {"left of"}),
        (0, 4.01, {"below"}),
        (0, -4.01, {"above"}),
        (2, 2, set()),
        (40, 40, {"right of", "below"}),
        (-40, -40, {"left of", "above"}),
        # 60 degrees from a direction: (40 - 2) / 80 is below 0.5.
        (40, 69.28, {"below"}),
        (45, 66, {"right of", "below"}),
    ],
)
def test_positions(x, y, expected):
    assert positions(at("fork", x, y).box, at("cup", 0).box) == expected


def test_large_objects_need_a_larger_distance():
    assert positions(at("fork", 5, size=10).box, at("cup", 0, size=10).box) == {"right of"}
    assert positions(at("fork", 5, size=10).box, at("cup", 0, size=40).box) == set()


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"kind": "counting"}, r"'include' or 'exclude', got the keys \['kind'\]"),
        ({"include": [{"count": 1}]}, "an object with a 'class'"),
        ({"include": [{"class": "cup"}]}, "a 'count' of at least 1"),
        ({"include": [{"class": "cup", "count": 0}]}, "a 'count' of at least 1"),
        ({"exclude": [{"class": "cup", "count": "2"}]}, "in 'exclude', entry 0"),
        (
            {"include": [{"class": "cup", "count": 1, "position": ["left of", 0]}]},
            r"a 'position' such as \['left of', number of an earlier entry\]",
        ),
        (
            {"include": [{"class": "cup", "count": 1, "position": ["beside", 0]}]},
            "a 'position' such as",
        ),
    ],
)
def test_metadata_of_another_form(wanted, message):
    with pytest.raises(ValueError, match=message):
        judge([], wanted)

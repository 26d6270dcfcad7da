"""Prompts in GenEval's form."""

import functools
import json

import pytest

from rewards.geneval.names import CLASSES
from rewards.geneval.verifier import check_form
from unigrpo_env.tasks.geneval import TEMPLATES, GenEvalPrompts

# By hand, in the form of GenEval's file.
PUBLIC = [
    {
        "tag": "two_object",
        "include": [{"class": "cup", "count": 1}, {"class": "fork", "count": 1}],
        "prompt": "a photo of a cup and a fork",
    },
    {
        "tag": "position",
        "include": [
            {"class": "cup", "count": 1},
            {"class": "fork", "count": 1, "position": ["left of", 0]},
        ],
        "prompt": "a photo of a fork left of a cup",
    },
    {
        "tag": "color_attr",
        "include": [
            {"class": "cup", "count": 1, "color": "red"},
            {"class": "fork", "count": 1, "color": "blue"},
        ],
        "prompt": "a photo of a red cup and a blue fork",
    },
    {
        "tag": "counting",
        "include": [{"class": "cup", "count": 2}],
        "exclude": [{"class": "cup", "count": 3}],
        "prompt": "a photo of two cups",
    },
]
SINGLE = [
    {"tag": "single_object", "include": [{"class": name, "count": 1}], "prompt": f"one {name}"}
    for name in CLASSES
]


def write(tmp_path, lines):
    path = tmp_path / "public.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@functools.cache
def every_prompt(tag):
    return list(TEMPLATES[tag].all_prompts())


def texts(task, tag):
    """The texts of a kind that the task trains on, all of them where they are few."""
    return {prompt.text for prompt in every_prompt(tag) if task.split_of(prompt) == "train"}


@pytest.mark.parametrize(
    ("tag", "count"),
    [
        ("single_object", 80),
        ("two_object", 80 * 79),
        ("counting", 80 * 3),
        ("colors", 79 * 10),
        ("position", 80 * 79 * 4),
    ],
)
def test_all_prompts_of_a_kind(tag, count):
    prompts = every_prompt(tag)
    assert len({prompt.text for prompt in prompts}) == len(prompts) == count
    for prompt in prompts[:: max(1, count // 50)]:
        assert prompt.metadata["tag"] == tag
        check_form(prompt.metadata)


def test_words_and_metadata():
    found = {}
    for tag in ("counting", "colors", "position", "two_object"):
        found |= {prompt.text: prompt.metadata for prompt in every_prompt(tag)}
    assert found["a photo of four buses"]["exclude"] == [{"class": "bus", "count": 5}]
    assert found["a photo of an orange orange"]["include"] == [
        {"class": "orange", "count": 1, "color": "orange"}
    ]
    for line in PUBLIC:
        if line["prompt"] in found:
            assert {**found[line["prompt"]], "prompt": line["prompt"]} == line
    assert {line["prompt"] for line in PUBLIC} - set(found) == {
        "a photo of a red cup and a blue fork"
    }


def test_same_seed_same_prompts():
    task = GenEvalPrompts()
    first = task.prompts("train", 20, 3)
    assert first == GenEvalPrompts().prompts("train", 20, 3)
    assert first != task.prompts("train", 20, 4)
    assert {prompt.metadata["tag"] for prompt in task.prompts("train", 200, 0)} == set(TEMPLATES)


def test_the_splits_share_no_prompt():
    task = GenEvalPrompts()
    test = {prompt.text for prompt in task.prompts("test", 500, 0)}
    train = {prompt.text for prompt in task.prompts("train", 2000, 0)}
    assert len(test) > 200
    assert not test & train


def test_a_public_file_is_kept_out_of_training(tmp_path):
    task = GenEvalPrompts(write(tmp_path, PUBLIC))
    test = task.prompts("test", 4, 0)
    assert {prompt.text for prompt in test} == {line["prompt"] for line in PUBLIC}
    assert len(task.prompts("test", 9, 0)) == 9
    for tag, left_out in {
        "two_object": {"a photo of a cup and a fork", "a photo of a fork and a cup"},
        "position": {"a photo of a fork left of a cup", "a photo of a cup right of a fork"},
        "counting": {"a photo of two cups"},
    }.items():
        assert {prompt.text for prompt in every_prompt(tag)} - texts(task, tag) == left_out
    attributes = {"a photo of a blue fork and a red cup", "a photo of a red cup and a blue fork"}
    drawn = GenEvalPrompts(write(tmp_path, PUBLIC), {"color_attr": 1}).prompts("train", 500, 0)
    assert not attributes & {prompt.text for prompt in drawn}


def test_a_file_of_texts_alone_is_kept_out_too(tmp_path):
    path = tmp_path / "public.txt"
    path.write_text("a photo of a cup\na photo of two cups\n")
    task = GenEvalPrompts(path)
    assert texts(task, "single_object") == {
        prompt.text for prompt in every_prompt("single_object")
    } - {"a photo of a cup"}


def test_a_kind_without_prompts_is_not_drawn(tmp_path):
    path = write(tmp_path, SINGLE)
    drawn = GenEvalPrompts(path).prompts("train", 500, 0)
    assert {prompt.metadata["tag"] for prompt in drawn} == set(TEMPLATES) - {"single_object"}
    with pytest.raises(ValueError, match="got 'single_object' with 1"):
        GenEvalPrompts(path, {"single_object": 1})


def test_weights():
    drawn = GenEvalPrompts(weights={"counting": 3, "colors": 1}).prompts("train", 1000, 0)
    counting = sum(prompt.metadata["tag"] == "counting" for prompt in drawn)
    assert 700 < counting < 800
    for weights in ({}, {"counting": 0}, {"count": 1}):
        with pytest.raises(ValueError, match="expected"):
            GenEvalPrompts(weights=weights)


def test_a_public_file_of_another_form(tmp_path):
    path = write(tmp_path, [{"prompt": "two circles", "kind": "counting"}])
    with pytest.raises(ValueError, match="expected metadata in GenEval's form"):
        GenEvalPrompts(path)

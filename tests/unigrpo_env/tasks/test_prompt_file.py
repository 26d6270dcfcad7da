"""Prompts from files, with their images and turns."""

import json

import pytest
import torch
from PIL import Image

from unigrpo_env.episodes import Episodes
from unigrpo_env.tasks.prompt_file import PromptFile, read_prompts
from unigrpo_env.variants.variant import make_variant


def write_lines(path, *lines):
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


def texts(task, split, count):
    return [prompt.text for prompt in task.prompts(split, count, 0)]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.txt", "\n \n", "empty file; write one prompt a line"),
        ("p.jsonl", '{"text": 1}\n', r'p.jsonl line 1: expected a JSON object with a "prompt"'),
        ("p.jsonl", '{"prompt": 1}\n', "line 1"),
        ("p.jsonl", '["a circle"]\n', "line 1"),
        ("p.jsonl", '\n{"prompt": "a"}\ncircle\n', "line 3: .* got 'circle'"),
        ("p.jsonl", '{"prompt": "a", "turns": "b"}', 'line 1: expected "turns" to be a list'),
        ("p.jsonl", '{"prompt": "a", "turns": ["b", 3]}', 'line 1: .* "turns".* got int: 3'),
        ("p.jsonl", '{"prompt": "a", "sources": "b.png"}', '"sources" to be a list.* got str'),
        ("p.jsonl", '{"prompt": "a", "sources": {"b": 1}}', '"sources" to be a list.* got dict'),
        ("p.jsonl", '{"prompt": "a", "sources": [null]}', '"sources".* got NoneType'),
        ("p.jsonl", '{"prompt": "a", "sources": ["b.png"]}', "line 1: .* image at .*b.png"),
    ],
)
def test_bad_prompt_files(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        PromptFile(tmp_path / name)


def test_a_missing_prompt_file(tmp_path):
    with pytest.raises(ValueError, match=r"found none at .*other.txt; check the path"):
        PromptFile(tmp_path / "other.txt")
    (tmp_path / "p.txt").write_text("a circle")
    with pytest.raises(ValueError, match=r"found none at .*other"):
        PromptFile(tmp_path / "p.txt", test_path=tmp_path / "other.txt")


def test_other_encodings_are_refused(tmp_path):
    path = tmp_path / "p.txt"
    path.write_bytes("ein grüner Kreis".encode("latin-1"))
    with pytest.raises(ValueError, match=r"UTF-8 at .*p.txt"):
        PromptFile(path)
    path.write_bytes("ein grüner Kreis".encode("utf-8-sig"))
    assert read_prompts(path)[0].text == "ein grüner Kreis"


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n"])
def test_a_broken_source_names_its_line(tmp_path, content):
    (tmp_path / "broken.png").write_bytes(content)
    path = tmp_path / "p.jsonl"
    write_lines(path, {"prompt": "a"}, {"prompt": "b", "sources": ["broken.png"]})
    with pytest.raises(ValueError, match=r"p.jsonl line 2: expected a whole image at .*broken.png"):
        PromptFile(path)


def test_a_share_of_the_lines_is_held_out(tmp_path):
    (tmp_path / "p.txt").write_text("\n".join(f"prompt {number}" for number in range(30)))
    task = PromptFile(tmp_path / "p.txt")
    train = set(texts(task, "train", 60))
    test = set(texts(task, "test", 60))
    assert len(train) == 27
    assert len(test) == 3
    assert not train & test
    half = PromptFile(tmp_path / "p.txt", test_share=0.5)
    assert len(set(texts(half, "test", 60))) == 15


@pytest.mark.parametrize("share", [0, -0.1, 1, 2])
def test_the_share_is_between_0_and_1(tmp_path, share):
    (tmp_path / "p.txt").write_text("a circle")
    with pytest.raises(ValueError, match="test_share between 0 and 1"):
        PromptFile(tmp_path / "p.txt", test_share=share)


def test_one_line_serves_both_splits(tmp_path):
    (tmp_path / "p.txt").write_text("a circle\n")
    task = PromptFile(tmp_path / "p.txt")
    assert texts(task, "train", 2) == texts(task, "test", 2) == ["a circle"] * 2


def test_equal_lines_count_once(tmp_path):
    (tmp_path / "p.txt").write_text("a\n b \n\nb\na\nc\n")
    assert [prompt.text for prompt in read_prompts(tmp_path / "p.txt")] == ["a", "b", "c"]


def test_every_pass_has_all_prompts(tmp_path):
    (tmp_path / "p.txt").write_text("\n".join("abcdefgh"))
    task = PromptFile(tmp_path / "p.txt", test_share=0.5)
    found = texts(task, "train", 9)
    assert sorted(found[:4]) == sorted(found[4:8]) == ["b", "d", "f", "h"]
    assert found == texts(task, "train", 9)
    assert task.prompts("train", 0, 0) == []


def test_a_second_file_is_the_test_split(tmp_path):
    (tmp_path / "train.txt").write_text("a\nb\nc\n")
    (tmp_path / "test.txt").write_text("c\nd\n")
    task = PromptFile(tmp_path / "train.txt", test_path=tmp_path / "test.txt")
    assert sorted(texts(task, "train", 2)) == ["a", "b"]
    assert sorted(texts(task, "test", 2)) == ["c", "d"]
    with pytest.raises(ValueError, match=r"expected prompts in .* that are not in"):
        PromptFile(tmp_path / "test.txt", test_path=tmp_path / "test.txt")


def test_equal_lines_with_other_images_differ(tmp_path):
    """The same relative path names two images in two folders, and one image in one folder."""
    for folder in ("train", "test"):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (2, 2)).save(tmp_path / folder / "a.png")
        write_lines(tmp_path / folder / "p.jsonl", {"prompt": "a", "sources": ["a.png"]})
    train = tmp_path / "train" / "p.jsonl"
    task = PromptFile(train, test_path=tmp_path / "test" / "p.jsonl")
    assert texts(task, "train", 1) == texts(task, "test", 1) == ["a"]
    copy = tmp_path / "train" / "copy.jsonl"
    copy.write_text(train.read_text())
    with pytest.raises(ValueError, match="that are not in"):
        PromptFile(train, test_path=copy)


def test_lines_have_images_turns_and_metadata(tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (3, 2), (255, 102, 0)).save(tmp_path / "images" / "a.png")
    path = write_lines(
        tmp_path / "p.jsonl",
        {
            "prompt": "make it blue",
            "sources": ["images/a.png", "images/a.png"],
            "turns": ["and now red", "and green"],
            "objects": [{"count": 1}],
            "kind": "recolour",
        },
        {"prompt": "a circle"},
    )
    edit, plain = read_prompts(path)
    assert edit.text == "make it blue"
    assert edit.turns == ("and now red", "and green")
    assert edit.metadata == {"objects": [{"count": 1}], "kind": "recolour"}
    assert len(edit.sources) == 2
    assert edit.sources[0].dtype == torch.float32
    expected = torch.tensor([1.0, 0.4, 0.0])[:, None, None].expand(3, 2, 3)
    torch.testing.assert_close(edit.sources[0], expected)
    assert edit.sources[0] is edit.sources[1], "an image that is named twice is read once"
    assert plain.sources == plain.turns == ()
    assert plain.metadata == {}


def test_a_file_is_played_in_its_variants(tmp_path):
    Image.new("RGB", (24, 24), (245, 245, 240)).save(tmp_path / "a.png")
    edits = write_lines(
        tmp_path / "edit.jsonl", {"prompt": "remove the circle", "sources": ["a.png"]}
    )
    talks = write_lines(tmp_path / "talk.jsonl", {"prompt": "a circle", "turns": ["make it blue"]})
    for name, path in (("edit", edits), ("dialogue", talks)):
        variant = make_variant(name, task=PromptFile(path))
        prompt = variant.task.prompts("train", 1, 0)[0]
        encoded = Episodes(variant, 1).encode(prompt)
        assert len(encoded.sources) == len(prompt.sources)
        assert len(encoded.turns) == len(prompt.turns)

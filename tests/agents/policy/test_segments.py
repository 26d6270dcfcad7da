"""The walk along token streams, on streams that are laid out by hand."""

import torch

from agents.policy.segments import ImageSegment, segments

IMAGE = 99
STREAMS = [
    [11, 12, IMAGE, 13, IMAGE, 14],
    [21, IMAGE, 22, 23],
    [31, 32, 33],
]
POSITIONS = [[2, 4], [1, -1], [-1, -1]]


def padded(streams):
    width = max(map(len, streams))
    return torch.tensor([stream + [0] * (width - len(stream)) for stream in streams])


def walk(streams, positions, start=None, **options):
    """The segments as lists: texts by row, or (row, image number) for those that read one."""
    tokens = padded(streams)
    stop = torch.tensor([len(stream) for stream in streams])
    start = torch.tensor(start or [0] * len(streams))
    found = []
    for part in segments(tokens, start, stop, torch.tensor(positions), **options):
        if isinstance(part, ImageSegment):
            reads = part.reads.tolist()
            pairs = zip(part.rows.tolist(), part.numbers.tolist(), strict=True)
            found.append([pair for pair, read in zip(pairs, reads, strict=True) if read])
            continue
        texts = {}
        for row, ids, mask in zip(part.rows.tolist(), part.ids, part.mask, strict=True):
            texts[row] = ids[mask].tolist()
        found.append(texts)
    return found


def test_text_and_images_in_turn():
    assert walk(STREAMS, POSITIONS) == [
        {0: [11, 12], 1: [21], 2: [31, 32, 33]},
        [(0, 0), (1, 0)],
        {0: [13], 1: [22, 23], 2: []},
        [(0, 1)],
        {0: [14], 1: [], 2: []},
    ]


def test_finished_rows_are_dropped():
    assert walk(STREAMS, POSITIONS, drop_finished=True) == [
        {0: [11, 12], 1: [21], 2: [31, 32, 33]},
        [(0, 0), (1, 0)],
        {0: [13], 1: [22, 23]},
        [(0, 1)],
        {0: [14]},
    ]


def test_dropped_rows_are_named():
    tokens = padded(STREAMS)
    start = torch.zeros(3, dtype=torch.int64)
    stop = torch.tensor([6, 4, 3])
    parts = segments(tokens, start, stop, torch.tensor(POSITIONS), drop_finished=True)
    images = [part for part in parts if isinstance(part, ImageSegment)]
    assert images[0].kept.tolist() == [0, 1]
    assert images[1].kept.tolist() == [0]
    assert all(part.reads.all() for part in images)


def test_walk_begins_where_it_is_told():
    assert walk(STREAMS, POSITIONS, start=[3, 1, 3]) == [
        {0: [13], 1: [], 2: []},
        [(0, 1), (1, 0)],
        {0: [14], 1: [22, 23], 2: []},
    ]


def test_stream_without_images_is_one_text():
    tokens = padded([[1, 2], [3]])
    none = tokens[:, :0]
    (part,) = segments(tokens, torch.tensor([0, 0]), torch.tensor([2, 1]), none)
    assert part.mask.tolist() == [[True, True], [True, False]]
    assert part.positions.tolist() == [[0, 1], [0, 1]]


def test_images_may_stand_side_by_side():
    assert walk([[IMAGE, IMAGE, 5]], [[0, 1]]) == [{0: []}, [(0, 0)], {0: []}, [(0, 1)], {0: [5]}]


def test_images_behind_the_end_are_not_read():
    assert walk([[1, 2], [3, IMAGE, 4, 5]], [[3], [1]]) == [
        {0: [1, 2], 1: [3]},
        [(1, 0)],
        {0: [], 1: [4, 5]},
    ]


def test_empty_streams():
    nothing = torch.zeros(2, 0, dtype=torch.int64)
    zeros = torch.tensor([0, 0])
    (part,) = segments(nothing, zeros, zeros, nothing)
    assert part.ids.shape == (2, 0)

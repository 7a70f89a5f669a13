"""Which reads ranks have in common."""

from __future__ import annotations

import json

import numpy as np
import torch

from aiodcp._load.plan import TensorRead
from aiodcp._load.sharing import MIN_NBYTES, Group, OpenProposal, agree_on_open, groups_of, share_out, table_of


def table(*reads: tuple[int, int]) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    return np.array(reads, dtype=np.int64).reshape(-1, 2)


def read(**changes: object) -> TensorRead:
    into = torch.zeros(8)
    made = TensorRead("w", "file", 0, 32, torch.float32, into.shape, None, None, into, bare=False)
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def test_reads_of_the_same_bytes_in_the_same_way_are_alike() -> None:
    assert table_of([read()], {})[0].tolist() == table_of([read()], {})[0].tolist()
    part, rest = (torch.Size([0]), torch.Size([8])), (torch.Size([8]), torch.Size([8]))
    others: list[dict[str, object]] = [
        {"offset": 8},
        {"file": "g"},
        {"nbytes": 33},
        {"dtype": torch.int32},
        {"bare": True},
    ]
    others += [{"part": part}, {"part": rest}]
    others.append({"into": torch.nn.Buffer(torch.zeros(8, dtype=torch.complex64).conj())})
    digests = {int(table_of([read(**change)], {})[0, 0]) for change in [{}, *others]}
    assert len(digests) == 1 + len(others)
    memory = torch.zeros(8)
    tied = table_of([read(into=memory), read(into=memory)], {})[:, 0].tolist()
    assert tied[0] == tied[1] != table_of([read()], {})[0, 0]


def test_all_read_alike_or_not() -> None:
    one, other = table((1, 10), (2, 20)), table((2, 20), (1, 10))
    rows = [OpenProposal.of(each, is_replaced=False).to_row() for each in (one, other)]
    agreed = OpenProposal.from_row(agree_on_open(rows))
    assert agreed.digest
    assert (agreed.nbytes, agreed.is_replaced) == (30, False)
    rows.append(OpenProposal.of(table((1, 10)), is_replaced=True).to_row())
    agreed = OpenProposal.from_row(agree_on_open(rows))
    assert (agreed.digest, agreed.nbytes, agreed.is_replaced) == (0, 30, True)
    assert OpenProposal.of(table(), is_replaced=False).digest == 0


def test_each_set_of_ranks_that_read_the_same_is_a_group() -> None:
    large = MIN_NBYTES
    tables = [
        table((1, large), (2, large), (9, 5)),
        table((2, large), (1, large), (9, 5)),
        table((3, 2 * large), (1, large), (4, large)),
        table((3, 2 * large), (3, 2 * large), (1, large)),  # twice: tied
    ]
    parts = share_out([each.tobytes() for each in tables])
    groups = [groups_of(part, each) for part, each in zip(parts, tables, strict=True)]
    assert groups[0] == [Group(members=[0, 1], numbers=[1, 2]), Group(members=[0, 1, 2, 3], numbers=[0])]
    assert groups[1] == [Group(members=[0, 1], numbers=[0, 2]), Group(members=[0, 1, 2, 3], numbers=[1])]
    assert groups[2] == [Group(members=[2, 3], numbers=[0]), Group(members=[0, 1, 2, 3], numbers=[1])]
    assert groups[3] == [Group(members=[2, 3], numbers=[0]), Group(members=[0, 1, 2, 3], numbers=[2])]


def test_of_many_ranks_each_so_many_read_once() -> None:
    group = Group(members=list(range(0, 140, 2)), numbers=[4])
    assert group.near(2) == Group(members=list(range(0, 64, 2)), numbers=[4])
    assert group.near(64) == Group(members=list(range(64, 128, 2)), numbers=[4])
    assert group.near(138) == Group(members=list(range(128, 140, 2)), numbers=[4])


def test_little_is_not_worth_a_group_and_nobody_belongs_to_many() -> None:
    assert share_out([table((1, MIN_NBYTES - 1)).tobytes()] * 2) == [b"[]", b"[]"]
    assert share_out([table().tobytes(), table((1, MIN_NBYTES)).tobytes()]) == [b"[]", b"[]"]
    ranks = 12
    tables = [table(*((other, MIN_NBYTES) for other in range(1, ranks)))]
    tables += [table((rank, MIN_NBYTES)) for rank in range(1, ranks)]
    parts = [json.loads(part) for part in share_out([each.tobytes() for each in tables])]
    assert len(parts[0]) == 8
    assert sum(len(part) for part in parts[1:]) == 8

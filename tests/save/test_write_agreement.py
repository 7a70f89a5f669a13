"""What the ranks agree on when all have written."""

from __future__ import annotations

import pytest

from aiodcp._save.sharing import agree
from aiodcp._save.write_agreement import WriteAgreed, WriteProposal, agree_on_write


def rows(*proposals: tuple[bool, int, int]) -> list[list[int]]:
    return [
        WriteProposal(is_moved=moved, digest=digest, table_crc=crc, ranges_nbytes=crc).to_row()
        for moved, digest, crc in proposals
    ]


@pytest.mark.parametrize(
    ("moved", "digests", "agreed"),
    [
        ([False, False], [5, -5], WriteAgreed(is_moved=False, differs=False, ranges_nbytes=8)),
        ([False, True], [5, -5], WriteAgreed(is_moved=True, differs=False, ranges_nbytes=8)),
        ([False, False], [5, -4], WriteAgreed(is_moved=False, differs=True, ranges_nbytes=8)),
    ],
)
def test_one_rank_suffices_to_move_or_to_differ(moved: list[bool], digests: list[int], agreed: WriteAgreed) -> None:
    table = rows(*zip(moved, digests, [7, 8], strict=True))
    assert agree_on_write(table) == (agreed, [7, 8])
    assert agree(digests) is not agreed.differs
    assert WriteAgreed.from_row(agreed.to_row()) == agreed

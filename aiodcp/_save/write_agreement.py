"""What the ranks agree on when all have written: whether values moved, and whether what they share is the same."""

from __future__ import annotations

from dataclasses import dataclass

from .._distributed.votes import Proposal, Row
from .sharing import agree


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteProposal(Proposal):
    """What a rank has written.

    Attributes:
        is_moved: whether its frozen values lie elsewhere than in the last save.
        digest: of what it shares with other ranks.
        table_crc: CRC32 of its file's table.
        ranges_nbytes: bytes that say where its frozen values lie.
    """

    is_moved: bool
    digest: int
    table_crc: int
    ranges_nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteAgreed(Proposal):
    """What all ranks do after writing: gather where frozen values lie, find out which shared values differ.

    Attributes:
        is_moved: whether they lie elsewhere than in the last save, on any rank.
        differs: whether any do.
        ranges_nbytes: bytes by which a rank says where they lie, at most.
    """

    is_moved: bool
    differs: bool
    ranges_nbytes: int


def agree_on_write(table: list[Row]) -> tuple[WriteAgreed, list[int]]:
    """Agree on what to do next; return that, and the CRC32 of each rank's table."""
    proposed = WriteProposal.columns(table)
    agreed = WriteAgreed(
        is_moved=any(proposed["is_moved"]),
        differs=not agree(proposed["digest"]),
        ranges_nbytes=max(proposed["ranges_nbytes"]),
    )
    return agreed, list(proposed["table_crc"])

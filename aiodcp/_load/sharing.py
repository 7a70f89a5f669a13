"""Which reads several ranks have in common: such bytes leave storage once, and go from rank to rank. Pure.

Each rank says what it reads in numbers: a digest of where and what, and how many bytes. Whoever reads what others read
too reads it with them; each such set of ranks is a group.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from .._distributed.votes import Proposal, Row
from .._format.archive_reader import StoredTensor
from .._format.arrays import Array
from .coalesce import overlapping
from .large_reads import takes_windows
from .plan import TensorRead

MIN_NBYTES = 1 << 20  # bytes for which a group is made: below them each rank reads for itself

MAX_MEMBERS = 32  # ranks that are connected with each other: of more, each so many read once

MAX_GROUPS = 8  # of one rank: those with most bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenProposal(Proposal):
    """What a rank has opened the files of a checkpoint for, or what all have.

    Attributes:
        is_replaced: whether a save has replaced the checkpoint meanwhile; on any rank.
        digest: of what this rank reads of tensors; 0 if it does not share, or the ranks read different things.
        nbytes: of those; none if it is to be read by each rank for itself.
    """

    is_replaced: bool
    digest: int
    nbytes: int

    @classmethod
    def of(cls, table: Array, *, is_replaced: bool) -> OpenProposal:
        """Return a rank's, from its table: in whatever order it reads."""
        digest = 0
        if len(table):
            digest = 1 + int.from_bytes(blake2b(np.unique(table[:, 0]).tobytes(), digest_size=7).digest(), "little")
        return cls(is_replaced=is_replaced, digest=digest, nbytes=int(table[:, 1].sum()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Ranks that read the same.

    Attributes:
        members: their positions, in order.
        numbers: which of this rank's reads: of several of the same bytes one.
    """

    members: list[int]
    numbers: list[int]

    def near(self, rank: int) -> Group:
        """Return the part of it, of `MAX_MEMBERS` at most, to which a rank belongs."""
        start = self.members.index(rank) // MAX_MEMBERS * MAX_MEMBERS
        return Group(members=self.members[start : start + MAX_MEMBERS], numbers=self.numbers)


def agree_on_open(table: list[Row]) -> Row:
    """Agree on an `OpenProposal`."""
    proposals = [OpenProposal.from_row(row) for row in table]
    digests = {each.digest for each in proposals}
    return OpenProposal(
        is_replaced=any(each.is_replaced for each in proposals),
        digest=digests.pop() if len(digests) == 1 else 0,
        nbytes=max(each.nbytes for each in proposals),
    ).to_row()


def table_of(reads: Sequence[TensorRead], stored: Mapping[int, StoredTensor]) -> Array:
    """Return what a rank reads, to compare it with others': [reads, 2] of digests and bytes.

    Args:
        reads: as they are read: after `FileReads.find_stored`.
        stored: what that has returned.
    """
    tied = overlapping(reads)
    table = np.zeros((len(reads), 2), dtype=np.int64)
    for row, read in zip(table, reads, strict=True):
        windows = id(read) not in tied and takes_windows(read.into)  # else it is read whole, however large
        place = (read.file, read.offset, read.nbytes, read.bare, windows)
        what = (str(read.dtype), read.sizes, read.part, stored.get(id(read)))
        digest = blake2b(repr((place, what)).encode(), digest_size=8).digest()
        row[:] = int.from_bytes(digest, "little", signed=True), read.nbytes
    return table


def share_out(tables: Sequence[bytes]) -> list[bytes]:
    """Find the groups, from all ranks' tables; return, for each rank, its groups."""
    arrays = [np.unique(np.frombuffer(table, dtype=np.int64).reshape(-1, 2), axis=0) for table in tables]
    ranks = np.concatenate([np.full(len(each), rank, dtype=np.int64) for rank, each in enumerate(arrays)])
    rows = np.concatenate(arrays)
    order = np.lexsort((ranks, rows[:, 0]))
    ranks, rows = ranks[order], rows[order]
    starts = np.flatnonzero(np.r_[True, rows[1:, 0] != rows[:-1, 0]]) if len(rows) else np.zeros(0, dtype=np.int64)
    stops = np.r_[starts[1:], len(rows)].astype(np.int64)
    groups: dict[tuple[int, ...], list[int]] = {}
    for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
        if stop - start > 1:
            groups.setdefault(tuple(ranks[start:stop].tolist()), []).append(start)
    nbytes = {members: int(rows[found, 1].sum()) for members, found in groups.items()}
    joined: list[int] = [0] * len(tables)
    parts: list[list[tuple[list[int], list[int]]]] = [[] for _ in tables]
    for members, found in sorted(groups.items(), key=lambda each: (-nbytes[each[0]], each[0])):
        if nbytes[members] < MIN_NBYTES or any(joined[rank] >= MAX_GROUPS for rank in members):
            continue
        for rank in members:
            joined[rank] += 1
            parts[rank].append((list(members), rows[found, 0].tolist()))
    return [json.dumps(part).encode() for part in parts]


def groups_of(part: bytes, table: Array) -> list[Group]:
    """Return this rank's groups from its part of what `share_out` returned; in one order on all ranks."""
    numbers = _numbers_of(table)
    return [
        Group(members=members, numbers=sorted(numbers[digest] for digest in digests))
        for members, digests in json.loads(part)
    ]


def one_group(size: int, table: Array) -> Group:
    """Return the group of all ranks, which all read the same."""
    return Group(members=list(range(size)), numbers=sorted(_numbers_of(table).values()))


def _numbers_of(table: Array) -> dict[int, int]:
    digests, numbers = np.unique(table[:, 0], return_index=True)
    return dict(zip(digests.tolist(), numbers.tolist(), strict=True))

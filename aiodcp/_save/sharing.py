"""Which items several ranks hold, and by which weights their checksums cancel out. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import numpy.typing as npt
from torch.distributed.checkpoint.planner import WriteItem

from .._format.arrays import Array, Flags

OnDisagreement = Literal["warn", "raise", "ignore"]
POLICIES: tuple[OnDisagreement, ...] = ("warn", "raise", "ignore")

WHOLE_NBYTES = (64 << 10, 16 << 10, 4 << 10, 1 << 10)
"""Bytes up to which an item is compared whole: the first of them with which no rank compares more than `MOST_NBYTES`.

Small values (RNG states, counters, positions) may differ in one bit.
"""

MOST_NBYTES = 16 << 20

MODULUS = 1 << 64


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedItems:
    """What one rank shares with others. All but the last go in step.

    Attributes:
        numbers: of its local plan's items.
        ids: by which all ranks know them, ascending.
        groups: numbers of the groups of ranks with which it shares them.
        whole: whether all of their bytes are compared.
        weights: of each group, by which its CRC32 is multiplied.
    """

    numbers: Array
    ids: Array
    groups: Array
    whole: Flags
    weights: npt.NDArray[np.uint64]

    def pack(self) -> bytes:
        """Return it as bytes."""
        counts = np.array([len(self.numbers), len(self.weights)], dtype=np.int64)
        small = [each.astype(np.int32).tobytes() for each in (self.numbers, self.ids, self.groups)]
        return b"".join((counts.tobytes(), *small, self.whole.tobytes(), self.weights.tobytes()))

    @classmethod
    def unpack(cls, data: bytes) -> SharedItems:
        """Return what `pack` has made bytes of."""
        count, groups = np.frombuffer(data, dtype=np.int64, count=2).tolist()
        small = np.frombuffer(data, dtype=np.int32, offset=16, count=3 * count).astype(np.int64).reshape(3, count)
        whole = np.frombuffer(data, dtype=np.bool_, offset=16 + 12 * count, count=count)
        weights = np.frombuffer(data[16 + 13 * count :], dtype=np.uint64, count=groups)
        return cls(numbers=small[0], ids=small[1], groups=small[2], whole=whole, weights=weights)


@dataclass(frozen=True, slots=True, kw_only=True)
class SharingPlan:
    """Who shares what, as the coordinator knows it.

    Attributes:
        fqns: of all items that are shared, by id.
        writers: which rank writes each of them.
        parts: by rank.
    """

    fqns: list[str]
    writers: list[int]
    parts: list[SharedItems]


def plan_sharing(
    *, fqns: Sequence[str], starts: Array, ranks: Array, numbers: Array, writers: Array, nbytes: Array, size: int
) -> SharingPlan:
    """Find out which items are shared, and choose their weights.

    Args:
        fqns: names of all items.
        starts: by item, where those who hold it begin; and the end.
        ranks, numbers: who they are, of one item by rank, and which item of its local plan it is for each.
        writers: by item, which rank writes it.
        nbytes: by item.
        size: how many ranks there are.
    """
    counts = np.diff(starts)
    [shared] = np.nonzero(counts > 1)
    holders = np.repeat(counts > 1, counts)
    ranks, numbers, counts = ranks[holders], numbers[holders], counts[shared]
    ids = np.repeat(np.arange(len(shared)), counts)
    bounds = np.append(0, np.cumsum(counts))
    groups, members = _group(ranks, bounds)
    known, weights = _weigh(members, size)  # what each rank calls its groups
    group_of = groups[ids]
    place = np.arange(len(ranks)) - bounds[:-1][ids]  # of a rank among those of the group
    first = np.append(0, np.cumsum([len(each) for each in members])).astype(np.int64)
    is_whole = (nbytes[shared] <= _whole_nbytes(nbytes[shared][ids], ranks, size))[ids]
    order = np.argsort(ranks, kind="stable")
    ends = np.searchsorted(ranks[order], np.arange(size + 1))
    parts = []
    for rank in range(size):
        mine = order[ends[rank] : ends[rank + 1]]
        parts.append(
            SharedItems(
                numbers=numbers[mine],
                ids=ids[mine],
                groups=known[first[group_of[mine]] + place[mine]],
                whole=is_whole[mine],
                weights=weights[rank],
            )
        )
    return SharingPlan(fqns=[fqns[item] for item in shared.tolist()], writers=writers[shared].tolist(), parts=parts)


def _group(ranks: Array, bounds: Array) -> tuple[Array, list[Array]]:
    """Return of each item the number of the group of ranks that hold it, and the groups."""
    known: dict[bytes, int] = {}
    members: list[Array] = []
    groups = np.zeros(len(bounds) - 1, dtype=np.int64)
    edges = bounds.tolist()
    for item, (start, stop) in enumerate(pairwise(edges)):
        key = ranks[start:stop].tobytes()
        if key not in known:
            known[key] = len(members)
            members.append(ranks[start:stop])
        groups[item] = known[key]
    return groups, members


def _weigh(members: Sequence[Array], size: int) -> tuple[Array, list[npt.NDArray[np.uint64]]]:
    """Choose the weights of all groups: of one they make zero together.

    Returns:
        For the ranks of the first group, then those of the next and so on, what each of them calls it; and by rank its
        weights, in the order of these.
    """
    numbers = np.concatenate(members) if members else np.zeros(0, dtype=np.int64)
    counts = np.array([len(each) for each in members], dtype=np.int64)
    groups = np.repeat(np.arange(len(members)), counts)
    begins = (np.cumsum(counts) - counts).astype(np.int64)
    weights = _scramble(numbers.astype(np.uint64), groups.astype(np.uint64))
    if len(begins):
        weights[begins] = 0
        weights[begins] = np.uint64(0) - np.add.reduceat(weights, begins)
    order = np.argsort(numbers, kind="stable")
    ends = np.searchsorted(numbers[order], np.arange(size + 1))
    known = np.zeros(len(numbers), dtype=np.int64)
    known[order] = np.arange(len(numbers)) - ends[:-1][numbers[order]]
    return known, [weights[order[ends[rank] : ends[rank + 1]]] for rank in range(size)]


def _whole_nbytes(nbytes: Array, ranks: Array, size: int) -> int:
    """Return up to how many bytes items are compared whole, given the sizes of all that ranks share, and whose."""
    for most in WHOLE_NBYTES:
        compared = np.bincount(ranks, weights=np.where(nbytes <= most, nbytes, 0), minlength=size)
        if compared.max(initial=0) <= MOST_NBYTES:
            break
    return most


def _scramble(numbers: npt.NDArray[np.uint64], salt: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Return odd numbers that look random. Source: https://prng.di.unimi.it/splitmix64.c."""
    one, other = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD1342543DE82EF95)
    mixed = numbers * one + salt * other + np.uint64(0x632BE59BD9B4E019)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (mixed ^ (mixed >> np.uint64(31))) | np.uint64(1)


def agree(digests: Sequence[int]) -> bool:
    """Whether all ranks hold the same, given the digest of each."""
    return sum(digests) % MODULUS == 0


def find_disagreements(plan: SharingPlan, checksums: Sequence[bytes]) -> dict[str, int]:
    """Return the names on which the ranks disagree, with the rank whose value is saved.

    Args:
        plan: who shares what.
        checksums: by rank, what `Comparison.packed` returned.
    """
    first: dict[int, int] = {}
    found: dict[str, int] = {}
    for part, data in zip(plan.parts, checksums, strict=True):
        for item, checksum in zip(part.ids.tolist(), memoryview(data).cast("I"), strict=True):
            if first.setdefault(item, checksum) != checksum:
                found[plan.fqns[item]] = plan.writers[item]
    return dict(sorted(found.items()))


def nbytes_of(item: WriteItem) -> int:
    """Return how many bytes of a tensor an item writes; of another value 0, as it is compared whole in any case."""
    if item.tensor_data is None:
        return 0
    return item.tensor_data.chunk.sizes.numel() * item.tensor_data.properties.dtype.itemsize

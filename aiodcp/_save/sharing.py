"""Which items several ranks hold, and by which weights their checksums cancel out. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch.distributed.checkpoint.planner import WriteItem

OnDisagreement = Literal["warn", "raise", "ignore"]
POLICIES: tuple[OnDisagreement, ...] = ("warn", "raise", "ignore")

WHOLE_NBYTES = (64 << 10, 16 << 10, 4 << 10, 1 << 10)
"""Bytes up to which an item is compared whole: the first of them with which no rank compares more than `MOST_NBYTES`.

Small values (RNG states, counters, positions) may differ in one bit.
"""

MOST_NBYTES = 16 << 20

MODULUS = 1 << 64

Key = tuple[str, torch.Size | None]  # fqn and offset: what names an item


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedItems:
    """What one rank shares with others. All lists but the last go in step.

    Attributes:
        numbers: of its local plan's items.
        ids: by which all ranks know them, ascending.
        groups: numbers of the groups of ranks with which it shares them.
        whole: whether all of their bytes are compared.
        weights: of each group, by which its CRC32 is multiplied.
    """

    numbers: list[int]
    ids: list[int]
    groups: list[int]
    whole: list[bool]
    weights: list[int]


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
    holders: Mapping[Key, Sequence[tuple[int, int]]],
    writers: Mapping[Key, int],
    sizes: Mapping[Key, int],
    ranks: int,
) -> SharingPlan:
    """Find out which items are shared, and choose their weights.

    Args:
        holders: of each item, the ranks that hold it, each with its own number of it.
        writers: of each item, which rank writes it.
        sizes: of each item, in bytes.
        ranks: how many there are.
    """
    shared = {key: held for key, held in holders.items() if len(held) > 1}
    most = _whole_nbytes(shared, sizes, ranks)
    parts = [SharedItems(numbers=[], ids=[], groups=[], whole=[], weights=[]) for _ in range(ranks)]
    groups: dict[tuple[int, ...], list[int]] = {}  # ranks -> the number that each of them knows the group by
    for item, (key, held) in enumerate(shared.items()):
        group = tuple(rank for rank, _ in held)
        if group not in groups:
            others = [_scramble(rank, len(groups)) for rank in group[1:]]
            for rank, weight in zip(group, [-sum(others), *others], strict=True):  # together they make zero
                parts[rank].weights.append(weight % MODULUS)
            groups[group] = [len(parts[rank].weights) - 1 for rank in group]
        for (rank, number), known in zip(held, groups[group], strict=True):
            part = parts[rank]
            part.numbers.append(number)
            part.ids.append(item)
            part.groups.append(known)
            part.whole.append(sizes[key] <= most)
    return SharingPlan(fqns=[fqn for fqn, _ in shared], writers=[writers[key] for key in shared], parts=parts)


def _whole_nbytes(shared: Mapping[Key, Sequence[tuple[int, int]]], sizes: Mapping[Key, int], ranks: int) -> int:
    for most in WHOLE_NBYTES:
        compared = [0] * ranks
        for key, held in shared.items():
            if sizes[key] <= most:
                for rank, _ in held:
                    compared[rank] += sizes[key]
        if max(compared) <= MOST_NBYTES:
            break
    return most


def _scramble(number: int, salt: int) -> int:
    """Return an odd number that looks random. Source: https://prng.di.unimi.it/splitmix64.c."""
    mixed = (number * 0x9E3779B97F4A7C15 + salt * 0xD1342543DE82EF95 + 0x632BE59BD9B4E019) % MODULUS
    mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 % MODULUS
    mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB % MODULUS
    return (mixed ^ (mixed >> 31)) | 1


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
        for item, checksum in zip(part.ids, memoryview(data).cast("I"), strict=True):
            if first.setdefault(item, checksum) != checksum:
                found[plan.fqns[item]] = plan.writers[item]
    return dict(sorted(found.items()))


def nbytes_of(item: WriteItem) -> int:
    """Return how many bytes of a tensor an item writes; of another value 0, as it is compared whole in any case."""
    if item.tensor_data is None:
        return 0
    return item.tensor_data.chunk.sizes.numel() * item.tensor_data.properties.dtype.itemsize

"""Whether the ranks that hold one value hold the same one. Compared at every save, by one number a rank.

An item (a value, a tensor, a chunk of one) that several ranks hold is written by one of them, and what the others have
is lost. Each rank computes a CRC32 of each item that it shares, of all bytes of small ones and of a sample of large
ones, and sends one weighted sum of them. The weights are chosen so that over all ranks they cancel out where the CRC32s
agree: the coordinator adds up the numbers, and zero says that all is well, however many items and ranks there are and
whoever shares what with whom. Only when it is not zero the CRC32s themselves are collected, to find the names.
"""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch.distributed.checkpoint.planner import WriteItem

from ._arena import memory_of
from ._capture import Capture
from ._devices import Crossing, wait_for
from ._layout import ALIGNMENT, copyable, round_up
from .errors import CaptureError

OnDisagreement = Literal["warn", "raise", "ignore"]

WHOLE_NBYTES = (64 << 10, 16 << 10, 4 << 10, 1 << 10)
"""Bytes up to which an item is compared whole: the first of them with which no rank compares more than `MOST_NBYTES`.

Small values (RNG states, counters, positions) may differ in one bit.
"""
MOST_NBYTES = 16 << 20

SAMPLED = 128
"""Elements compared of a larger item, evenly spread, at each save others: what is as large are weights, and those
differ everywhere if they differ."""

WINDOW_NBYTES = 4 << 20  # of memory kept to compare in, unless one item is larger

_MODULUS = 1 << 64

Key = tuple[str, torch.Size | None]  # fqn and offset: what names an item


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedItems:
    """What one rank shares with others; all lists in step.

    Attributes:
        numbers: of its local plan's items.
        ids: by which all ranks know them.
        weights: by which their CRC32s are multiplied.
        whole: whether all of their bytes are compared.
    """

    numbers: list[int]
    ids: list[int]
    weights: list[int]
    whole: list[bool]


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
    plan = SharingPlan(
        fqns=[fqn for fqn, _ in shared],
        writers=[writers[key] for key in shared],
        parts=[SharedItems(numbers=[], ids=[], weights=[], whole=[]) for _ in range(ranks)],
    )
    groups: dict[tuple[int, ...], list[int]] = {}  # ranks -> a coefficient for each; together they make zero
    for item, (key, held) in enumerate(shared.items()):
        group = tuple(rank for rank, _ in held)
        if group not in groups:
            others = [_scramble(rank, len(groups)) for rank in group[1:]]
            groups[group] = [-sum(others), *others]
        factor = _scramble(item, -1)
        for (rank, number), coefficient in zip(held, groups[group], strict=True):
            part = plan.parts[rank]
            part.numbers.append(number)
            part.ids.append(item)
            part.weights.append(_signed(factor * coefficient))
            part.whole.append(sizes[key] <= most)
    return plan


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
    mixed = (number * 0x9E3779B97F4A7C15 + salt * 0xD1342543DE82EF95 + 0x632BE59BD9B4E019) % _MODULUS
    mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 % _MODULUS
    mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB % _MODULUS
    return (mixed ^ (mixed >> 31)) | 1


def _signed(number: int) -> int:
    number %= _MODULUS
    return number - _MODULUS if number >= _MODULUS // 2 else number


def agree(digests: Sequence[int]) -> bool:
    """Whether all ranks hold the same, given the digest of each."""
    return sum(digests) % _MODULUS == 0


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


@dataclass(frozen=True, slots=True)
class _Window:
    """Items that are compared together: which of them, where in memory each comes to lie, and those bytes."""

    numbers: list[int]
    targets: list[torch.Tensor]
    payloads: list[memoryview]


@dataclass(slots=True, kw_only=True)
class Comparison:
    """How one rank compares what it shares, for all saves of one plan; all lists in step.

    Attributes:
        fqns: names of the items.
        sources: which of the captured values they are.
        frozen: whether that is a frozen value.
        whole: whether all of its bytes are compared.
        weights: by which their CRC32s are multiplied; 0 where the ranks are known to disagree.
        checksums: of the last save.
    """

    fqns: list[str]
    sources: list[int]
    frozen: list[bool]
    whole: list[bool]
    weights: torch.Tensor
    checksums: list[int] = field(default_factory=list)
    _windows: list[_Window] | None = None

    def digest(self, taken: Capture, crossing: Crossing, seed: int) -> int:
        """Return this rank's number for a capture. Blocks. The caller must not change the tensors meanwhile.

        Args:
            taken: what was captured.
            crossing: brings tensors from devices; started.
            seed: moves the samples; the same on all ranks.

        Raises:
            CaptureError: a tensor's storage has been freed.
        """
        checksums = [
            zlib.crc32(taken.frozen[source].data) if is_frozen else 0
            for source, is_frozen in zip(self.sources, self.frozen, strict=True)
        ]
        if self._windows is None:
            self._windows = self._plan_windows(taken)
        for window in self._windows:
            pieces = [self._piece(number, taken, seed) for number in window.numbers]
            wait_for(crossing.copy(window.targets, pieces))
            for number, payload in zip(window.numbers, window.payloads, strict=True):
                checksums[number] = zlib.crc32(payload)
        self.checksums = checksums
        return int((torch.tensor(checksums, dtype=torch.int64) * self.weights).sum())

    def packed(self) -> bytes:
        """Return the checksums of the last digest, for `find_disagreements`."""
        return array("I", self.checksums).tobytes()

    def exclude(self, fqns: set[str]) -> None:
        """Compare the items of these names no longer."""
        for number, fqn in enumerate(self.fqns):
            if fqn in fqns:
                self.weights[number] = 0

    def _piece(self, number: int, taken: Capture, seed: int) -> torch.Tensor:
        value = taken.values[self.sources[number]]
        if value.data_ptr() == 0 and value.numel():  # to copy it would crash the process
            raise CaptureError(self.fqns[number], "its storage has been freed")
        return copyable(value.detach() if self.whole[number] else _sample(value.detach(), seed))

    def _plan_windows(self, taken: Capture) -> list[_Window]:
        """Lay the items out in memory, which all windows share."""
        cuts: list[list[tuple[int, int]]] = []
        used = largest = 0
        for number, is_frozen in enumerate(self.frozen):
            if is_frozen:
                continue
            value = taken.values[self.sources[number]]
            nbytes = value.nbytes if self.whole[number] else _sampled(value) * value.itemsize
            if not cuts or used + nbytes > WINDOW_NBYTES:
                cuts.append([])
                used = 0
            cuts[-1].append((number, used))
            used = round_up(used + nbytes, ALIGNMENT)
            largest = max(largest, used)
        memory = torch.empty(largest, dtype=torch.uint8)
        windows: list[_Window] = []
        for cut in cuts:
            window = _Window([], [], [])
            for number, start in cut:
                value = taken.values[self.sources[number]]
                shape = value.shape if self.whole[number] else (_sampled(value),)
                stop = start + value.itemsize * (value.numel() if self.whole[number] else _sampled(value))
                window.numbers.append(number)
                window.targets.append(copyable(memory[start:stop].view(value.dtype).view(shape)))
                window.payloads.append(memory_of(memory[start:stop]))
            windows.append(window)
        return windows


def _sampled(value: torch.Tensor) -> int:
    return min(SAMPLED, value.numel())


def _sample(value: torch.Tensor, seed: int) -> torch.Tensor:
    """Return some elements of a tensor, in its logical order, whatever its strides."""
    count = _sampled(value)
    step = max(1, value.numel() // max(1, count))
    first = seed % step
    if value.is_contiguous():
        return value.as_strided((count,), (step,), value.storage_offset() + first)
    return torch.take(value, torch.arange(first, first + step * count, step, device=value.device))


def nbytes_of(item: WriteItem) -> int:
    """Return how many bytes of a tensor an item writes; of another value 0, as it is compared whole in any case."""
    if item.tensor_data is None:
        return 0
    return item.tensor_data.chunk.sizes.numel() * item.tensor_data.properties.dtype.itemsize

"""Whether the ranks that hold one value hold the same one. Compared at every save, by one number a rank.

An item (a value, a tensor, a chunk of one) that several ranks hold is written by one of them, and what the others have
is lost. Each rank lays out what it shares, all bytes of small items and a sample of large ones, and for each group of
ranks with which it shares takes one CRC32. It sends one weighted sum of those. The weights are chosen so that over all
ranks they cancel out where the CRC32s agree: the coordinator adds up the numbers, and zero says that all is well,
however many items and ranks there are and whoever shares what with whom. Only when it is not zero each item's own CRC32
is collected, to find the names.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .._engine.device_copies import DeviceCopies
from .._engine.device_gather import picker
from .._engine.host_memory import memory_of
from .._format.alignment import ALIGNMENT, round_up
from .._format.checksum import default_checksum
from .._format.dtypes import NOT_COPIED, copyable
from .._state.capture import Capture
from ..errors import CaptureError
from .sharing import MODULUS

SAMPLED = 128
"""Elements compared of a larger item, evenly spread, at each save others: what is as large are weights, and those
differ everywhere if they differ."""

crc32 = default_checksum()


def _signed(number: int) -> int:
    number %= MODULUS
    return number - MODULUS if number >= MODULUS // 2 else number


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where in memory what is compared comes to lie.

    Attributes:
        pick: takes the tensors that are compared whole out of the captured values.
        sampled: which of them are sampled.
        targets: where both kinds go, in that order.
        odd: whether some can only be copied as bytes.
        payloads: the bytes of each item that is a tensor.
        blocks: the bytes of each group.
    """

    pick: Callable[[Sequence[Any]], tuple[torch.Tensor, ...]]
    sampled: list[int]
    targets: list[torch.Tensor]
    odd: bool
    payloads: dict[int, memoryview]
    blocks: list[memoryview]


@dataclass(slots=True, kw_only=True)
class Comparison:
    """How one rank compares what it shares, for all saves of one plan. All lists but the last go in step.

    Attributes:
        fqns: names of the items.
        sources: which of the captured values they are.
        frozen: whether that is a frozen value.
        groups: of ranks with which they are shared.
        whole: whether all of their bytes are compared.
        weights: of each group, by which its CRC32 is multiplied.
    """

    fqns: list[str]
    sources: list[int]
    frozen: list[bool]
    groups: list[int]
    whole: list[bool]
    weights: list[int]
    _excluded: set[int] = field(default_factory=set)
    _values: list[list[bytes]] = field(default_factory=list)  # frozen ones of the last save, by group
    _layout: _Layout | None = None

    def digest(self, captured: Capture, device_copies: DeviceCopies, seed: int) -> int:
        """Return this rank's number for a capture. Blocks. The caller must not change the tensors meanwhile.

        Args:
            captured: what was captured.
            device_copies: brings tensors from devices; started.
            seed: moves the samples; the same on all ranks.

        Raises:
            CaptureError: a tensor's storage has been freed.
        """
        if self._layout is None:
            self._layout = self._lay_out(captured)
        layout = self._layout
        if layout.targets:
            self._copy(layout, captured, device_copies, seed)
        self._values = [[] for _ in self.weights]
        for number, (source, group) in enumerate(zip(self.sources, self.groups, strict=True)):
            if self.frozen[number] and number not in self._excluded:
                self._values[group].append(_in_any_order(captured.frozen[source].data))
        total = 0
        for weight, values, block in zip(self.weights, self._values, layout.blocks, strict=True):
            total += weight * crc32(block, crc32(memoryview(b"".join(values)), 0))
        return _signed(total)

    def packed(self) -> bytes:
        """Return the CRC32 of each item at the last digest, for `find_disagreements`."""
        if self._layout is None:  # this rank shares nothing
            return b""
        values = [iter(each) for each in self._values]
        found = array("I")
        for number, group in enumerate(self.groups):
            if number in self._excluded:
                found.append(0)
            elif self.frozen[number]:
                found.append(crc32(memoryview(next(values[group])), 0))
            else:
                found.append(crc32(self._layout.payloads[number], 0))
        return found.tobytes()

    def exclude(self, fqns: set[str]) -> None:
        """Compare the items of these names no longer."""
        self._excluded.update(number for number, fqn in enumerate(self.fqns) if fqn in fqns)

    def _copy(self, layout: _Layout, captured: Capture, device_copies: DeviceCopies, seed: int) -> None:
        with torch.no_grad(), device_copies.queueing():  # samples may be captured by a kernel
            pieces = [*layout.pick(captured.values)]
            pieces += [_sample(captured.values[self.sources[number]], seed) for number in layout.sampled]
        if not all(map(torch.Tensor.data_ptr, pieces)):  # to copy from there would crash the process
            for number, source in enumerate(self.sources):
                value = captured.values[source]
                if not self.frozen[number] and value.numel() and value.data_ptr() == 0:
                    raise CaptureError(self.fqns[number], "its storage has been freed")
        if layout.odd:
            pieces = [copyable(each) for each in pieces]
        try:
            device_copies.wait_for(device_copies.copy(layout.targets, pieces))
        except BaseException:
            self._layout = None  # a device may still write into it
            device_copies.drain(layout)
            raise
        for number in self._excluded & layout.payloads.keys():
            layout.payloads[number][:] = bytes(layout.payloads[number].nbytes)

    def _lay_out(self, captured: Capture) -> _Layout:
        """Place the items group by group, in an order that is the same on all ranks of a group."""
        whole: list[int] = []
        sampled: list[int] = []
        extents: dict[int, tuple[int, int]] = {}
        bounds: list[tuple[int, int]] = []
        position = 0
        for group in range(len(self.weights)):
            start = position
            for number, each in enumerate(self.groups):
                if each == group and not self.frozen[number]:
                    value = captured.values[self.sources[number]]
                    (whole if self.whole[number] else sampled).append(number)
                    count = value.numel() if self.whole[number] else _sampled(value)
                    extents[number] = position, position + count * value.itemsize
                    position = round_up(position + count * value.itemsize, ALIGNMENT)
            bounds.append((start, position))
        memory = torch.zeros(position, dtype=torch.uint8)
        targets = []
        for number in (*whole, *sampled):
            value = captured.values[self.sources[number]]
            start, stop = extents[number]
            shape = value.shape if self.whole[number] else (_sampled(value),)
            targets.append(copyable(memory[start:stop].view(value.dtype).view(shape)))
        return _Layout(
            pick=picker([self.sources[number] for number in whole]),
            sampled=sampled,
            targets=targets,
            odd=any(captured.values[self.sources[number]].dtype in NOT_COPIED for number in (*whole, *sampled)),
            payloads={number: memory_of(memory[start:stop]) for number, (start, stop) in extents.items()},
            blocks=[memory_of(memory[start:stop]) for start, stop in bounds],
        )


def _in_any_order(pickled: bytes) -> bytes:
    """Return the same bytes for equal sets: the order of their elements is each process's own."""
    return bytes(sorted(pickled)) if b"set\n" in pickled else pickled


def _sampled(value: torch.Tensor) -> int:
    return min(SAMPLED, value.numel())


def _sample(value: torch.Tensor, seed: int) -> torch.Tensor:
    """Return some elements of a tensor, in its logical order, whatever its strides."""
    count = _sampled(value)
    step = max(1, value.numel() // max(1, count))
    first = seed % step
    value = value.detach()
    if value.is_contiguous():
        return value.as_strided((count,), (step,), value.storage_offset() + first)
    return torch.take(value, torch.arange(first, first + step * count, step, device=value.device))

"""Which reads go together. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch

from .._format.alignment import ALIGNMENT
from .._state.plain_tensors import PLAIN_TENSORS
from .plan import TensorRead

SPAN_NBYTES = 16 << 20  # bytes read in one go: as in saving, enough that the turn at the GIL after it does not count

GAP_NBYTES = 64 << 10  # bytes read for nothing rather than asked for apart: 30 us at 2 GB/s, the price of a request

WASTED = 0.1  # of a span at most, in gaps over `GAP_NBYTES`: links and stores are shared with others

DIRECT_NBYTES = 1 << 20  # bytes from which a tensor is read straight into its place


@dataclass(slots=True, kw_only=True)
class ReadSpan:
    """Neighbouring items of one file, read together: bytes `start` to `stop`."""

    file: str
    start: int
    stop: int
    items: list[Any]


def gap_within(nbytes: int, gap_nbytes: int) -> float:
    """Return how far apart two reads may lie that go together, when the span so far has `nbytes`."""
    return max(GAP_NBYTES, min(gap_nbytes, WASTED * nbytes))


def reads_direct(read: TensorRead) -> bool:
    return (
        read.frame is not None
        and read.nbytes >= DIRECT_NBYTES
        and (read.part is None or (read.bare and read.nbytes == read.into.nbytes))
        and read.frame.is_row_major
        and type(read.into) in PLAIN_TENSORS
        and read.into.dtype is read.dtype
        and read.into.is_cpu
        and read.into.is_contiguous()
        and not read.into.is_neg()
        and not read.into.is_conj()
    )


def overlapping(reads: Sequence[TensorRead]) -> set[int]:
    """Return the ids of those whose memory another one writes, too: tied tensors are copied whole, when checked."""
    ranges = sorted(
        (str(read.into.device), read.into.data_ptr(), number)
        for number, read in enumerate(reads)
        if type(read.into) in PLAIN_TENSORS and read.into.layout is torch.strided
    )
    tied: set[int] = set()
    where, stop, last = "", 0, -1
    for device, start, number in ranges:
        if device == where and start < stop:
            tied |= {number, last}
        into = reads[number].into
        steps = sum((size - 1) * stride for size, stride in zip(into.shape, into.stride(), strict=True))
        end = start + into.itemsize * (1 + steps)
        if device != where or end > stop:
            where, stop, last = device, end, number
    return {id(reads[number]) for number in tied}


def group_reads(reads: Sequence[TensorRead], gap_nbytes: int) -> list[list[TensorRead]]:
    """Group reads that go straight into their places and lie close together in one file: one request for each group."""
    groups: list[list[TensorRead]] = []
    for read in sorted(reads, key=attrgetter("file", "offset")):
        if groups:
            first, last = groups[-1][0], groups[-1][-1]
            stop = last.offset + last.nbytes
            if (
                read.file == last.file
                and 0 <= read.offset - stop <= gap_within(stop - first.offset, gap_nbytes)
                and read.offset + read.nbytes - first.offset <= SPAN_NBYTES + GAP_NBYTES  # and what frames add
            ):
                groups[-1].append(read)
                continue
        groups.append([read])
    return groups


def coalesce_reads(reads: Iterable[Any], gap_nbytes: int = GAP_NBYTES) -> list[ReadSpan]:
    """Group reads that lie close together in one file, at most `gap_nbytes` apart; see `WASTED`."""
    spans: list[ReadSpan] = []
    for read in sorted(reads, key=attrgetter("file", "offset", "nbytes")):
        start, stop = read.offset // ALIGNMENT * ALIGNMENT, read.offset + read.nbytes
        if spans:
            last = spans[-1]
            if (
                read.file == last.file
                and start - last.stop <= gap_within(last.stop - last.start, gap_nbytes)
                and max(stop, last.stop) - last.start <= SPAN_NBYTES
            ):
                last.stop = max(stop, last.stop)
                last.items.append(read)
                continue
        spans.append(ReadSpan(file=read.file, start=start, stop=stop, items=[read]))
    return spans

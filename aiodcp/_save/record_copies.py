"""How records are copied to their places in the staging buffer and checksummed there."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .._engine.device_gather import picker
from .._engine.gil_fairness import LongList
from .._engine.host_memory import Arena
from .._format.checksum import Checksum
from .._format.dtypes import NOT_COPIED, copyable
from .._format.layout import Layout

CRC = struct.Struct("<I")


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordCopies:
    """How some records are staged and checksummed.

    Attributes:
        pick: takes their tensors out of the leaves of a state dict.
        targets: where in the arena each of them goes.
        odd: whether some of them can only be copied as bytes.
        payloads: the bytes of every record.
        header_crcs, trailer_crcs: where in the arena each record's checksum goes.
    """

    pick: Callable[[Sequence[Any]], tuple[torch.Tensor, ...]]
    targets: list[torch.Tensor]
    odd: bool
    payloads: list[memoryview]
    header_crcs: list[int]
    trailer_crcs: list[int]

    def sources(self, values: Sequence[Any]) -> tuple[torch.Tensor, ...]:
        picked = self.pick(values)
        return tuple(copyable(source) for source in picked) if self.odd else picked

    def checksum(self, memory: memoryview, crc32: Checksum) -> list[int]:
        """Compute the CRC32 of each record, and write it into the two places of its frame; return them."""
        crcs = []
        for payload, header, trailer in zip(self.payloads, self.header_crcs, self.trailer_crcs, strict=True):
            crc = crc32(payload, 0)
            CRC.pack_into(memory, header, crc)
            CRC.pack_into(memory, trailer, crc)
            crcs.append(crc)
        return crcs


def plan_copies(
    arena: Arena, layout: Layout, records: Sequence[int], leaves: Sequence[int], shift: int = 0
) -> RecordCopies:
    """Plan the copies of `records`, whose bytes lie in the arena `shift` bytes after their place in the file."""
    indices: list[int] = []
    targets: LongList[torch.Tensor] = LongList()
    payloads: LongList[memoryview] = LongList()
    odd = False
    header_crcs: list[int] = []
    trailer_crcs: list[int] = []
    for record in records:
        frame, offset = layout.frames[record], layout.offsets[record] + shift
        start = offset + len(frame.header)
        stop = start + frame.nbytes
        payloads.append(arena.memory[start:stop])
        header_crcs.append(offset + frame.header_crc)
        trailer_crcs.append(stop + frame.trailer_crc)
        indices.append(leaves[record])
        typed = arena.typed(frame.dtype)
        targets.append(copyable(typed.as_strided(frame.shape, frame.strides, start // frame.dtype.itemsize)))
        odd = odd or frame.dtype in NOT_COPIED
    return RecordCopies(
        pick=picker(indices),
        targets=targets,
        odd=odd,
        payloads=payloads,
        header_crcs=header_crcs,
        trailer_crcs=trailer_crcs,
    )


def put_frames(memory: memoryview, layout: Layout, records: Sequence[int], shift: int = 0) -> None:
    """Write what is around the payloads of `records`, but for their checksums."""
    for record in records:
        frame, offset = layout.frames[record], layout.offsets[record] + shift
        start = offset + len(frame.header)
        memory[offset:start] = frame.header
        memory[start + frame.nbytes : offset + frame.item_nbytes] = frame.trailer

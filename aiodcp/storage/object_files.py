"""Objects as files: read by several ranges at once."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING

import anyio
from anyio import CancelScope

if TYPE_CHECKING:
    from obstore import ObjectMeta

RANGE_NBYTES = 16 << 20  # of one GET: larger reads are several at once, since one connection has its limits

RANGES_AT_ONCE = 4  # of one read

ReadRange = Callable[[int, Sequence[memoryview]], Awaitable[None]]
"""Fills buffers with the bytes of an object from an offset on, by one request."""


class Filling:
    """Buffers that are filled, one after the other, with what comes."""

    def __init__(self, buffers: Sequence[memoryview]) -> None:
        self._rest = [buffer for buffer in buffers if len(buffer)]

    @property
    def missing(self) -> int:
        """Bytes that have not come yet."""
        return sum(map(len, self._rest))

    def take(self, piece: memoryview) -> bool:
        """Copy what has come; return False if it is more than there is room for."""
        rest = self._rest
        while len(piece):
            if not rest:
                return False
            count = min(len(piece), len(rest[0]))
            rest[0][:count] = piece[:count]
            piece, rest[0] = piece[count:], rest[0][count:]
            if not len(rest[0]):
                rest.pop(0)
        return True


class ObjectReader:
    """An object, of which the last bytes are here already."""

    def __init__(self, read_range: ReadRange, meta: ObjectMeta, tail: bytes) -> None:
        self.nbytes: int = meta["size"]
        self.modified_at: float | None = meta["last_modified"].timestamp()
        self._read_range = read_range
        self._tail = memoryview(tail)

    async def read_into(self, offset: int, buffers: Sequence[memoryview]) -> None:
        views = [buffer.cast("B") for buffer in buffers]
        stop = offset + sum(map(len, views))
        if stop > self.nbytes:
            raise EOFError(f"{self.nbytes} bytes, {stop} wanted")
        have_from = self.nbytes - len(self._tail)
        if offset >= have_from:
            for view in views:
                view[:] = self._tail[offset - have_from : offset - have_from + len(view)]
                offset += len(view)
            return
        limit = anyio.Semaphore(RANGES_AT_ONCE)

        async def read(start: int, parts: Sequence[memoryview]) -> None:
            async with limit:
                await self._read_range(start, parts)

        ranges = list(_cut(offset, views))
        if len(ranges) == 1:
            await read(*ranges[0])
            return
        errors: list[Exception] = []

        async def read_or_stop(scope: CancelScope, start: int, parts: Sequence[memoryview]) -> None:
            try:
                await read(start, parts)
            except Exception as error:
                errors.append(error)
                scope.cancel()

        async with anyio.create_task_group() as group:
            for start, parts in ranges:
                group.start_soon(read_or_stop, group.cancel_scope, start, parts)
        if errors:
            raise errors[0]


def _cut(offset: int, views: Sequence[memoryview]) -> list[tuple[int, list[memoryview]]]:
    """Cut what is to be read into ranges; each with the pieces of the buffers that it fills."""
    ranges: list[tuple[int, list[memoryview]]] = [(offset, [])]
    nbytes = sum(map(len, views))
    room = each = -(-nbytes // max(1, round(nbytes / RANGE_NBYTES)))  # no small one is left over at the end
    for view in views:
        while len(view):
            if not room:
                ranges.append((offset, []))
                room = each
            piece = view[:room]
            ranges[-1][1].append(piece)
            offset, room, view = offset + len(piece), room - len(piece), view[len(piece) :]
    return ranges

"""Reading `.metadata`: all of it, or only what stands behind its pickle. No torch here."""

from __future__ import annotations

from collections.abc import Callable

from .._format.seal import FOOT_NBYTES, TAIL_NBYTES
from ..storage.base import Reader


async def read_end(reader: Reader, nbytes_of: Callable[[bytes], int]) -> bytes:
    """Return a file's last bytes: as many as `nbytes_of` says, given the last of them, or more."""
    end = bytearray(min(TAIL_NBYTES, reader.nbytes))
    await reader.read_into(reader.nbytes - len(end), [memoryview(end)])
    wanted = min(nbytes_of(bytes(end[-FOOT_NBYTES:])), reader.nbytes)
    if wanted > len(end):
        end = bytearray(wanted)
        await reader.read_into(reader.nbytes - wanted, [memoryview(end)])
    return bytes(end)


async def read_whole(reader: Reader) -> bytes:
    """Return all of a file."""
    content = bytearray(reader.nbytes)
    await reader.read_into(0, [memoryview(content)])
    return bytes(content)

"""Bytes of any length between ranks: gather, scatter and broadcast."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from .channel import Channel


async def gather_bytes(channel: Channel, data: bytes, longest: int | None = None) -> list[bytes]:
    """Collect each rank's bytes at the root; in one message if they have agreed on how long the longest are."""
    if longest is None:
        lengths = await channel.gather(torch.tensor([len(data)], dtype=torch.int64))
        agreed = lengths.max().reshape(1) if lengths is not None else torch.zeros(1, dtype=torch.int64)
        await channel.broadcast(agreed)
        longest = int(agreed)
    table = await channel.gather(_padded(data, longest))
    return [] if table is None else [_data_of(table[rank]) for rank in range(channel.size)]


async def scatter_bytes(channel: Channel, parts: Sequence[bytes], longest: int) -> bytes:
    """Give each rank its part of the root's `parts`, of which none is longer than `longest`."""
    table = torch.stack([_padded(part, longest) for part in parts]) if parts else None
    row = torch.zeros(_LENGTH_NBYTES + longest, dtype=torch.uint8)
    await channel.scatter(table, row)
    return _data_of(row)


async def broadcast_bytes(channel: Channel, data: bytes, length: int | None = None) -> bytes:
    """Give every rank the root's bytes: if their number is agreed, in one message."""
    if length is None:
        own = torch.tensor([len(data)], dtype=torch.int64)
        await channel.broadcast(own)
        length = int(own)
    row = _tensor_of(data) if channel.rank == channel.root else torch.zeros(length, dtype=torch.uint8)
    if length:
        await channel.broadcast(row)
    return _bytes_of(row)


_LENGTH_NBYTES = 8


def _padded(data: bytes, longest: int) -> torch.Tensor:
    """Return bytes as a row that says how many there are."""
    row = torch.zeros(_LENGTH_NBYTES + longest, dtype=torch.uint8)
    row[:_LENGTH_NBYTES] = _tensor_of(len(data).to_bytes(_LENGTH_NBYTES, "little"))
    row[_LENGTH_NBYTES : _LENGTH_NBYTES + len(data)] = _tensor_of(data)
    return row


def _data_of(row: torch.Tensor) -> bytes:
    nbytes = int.from_bytes(_bytes_of(row[:_LENGTH_NBYTES]), "little")
    return _bytes_of(row[_LENGTH_NBYTES : _LENGTH_NBYTES + nbytes])


def _tensor_of(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.zeros(0, dtype=torch.uint8)


def _bytes_of(row: torch.Tensor) -> bytes:
    return ctypes.string_at(row.data_ptr(), row.numel())

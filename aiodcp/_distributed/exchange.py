"""Bytes of any length between ranks: gather, scatter and broadcast."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from .channel import Channel


async def gather_bytes(channel: Channel, data: bytes) -> list[bytes]:
    lengths = await channel.gather(torch.tensor([len(data)], dtype=torch.int64))
    longest = lengths.max().reshape(1) if lengths is not None else torch.zeros(1, dtype=torch.int64)
    await channel.broadcast(longest)
    row = torch.zeros(max(int(longest), 1), dtype=torch.uint8)
    row[: len(data)] = _tensor_of(data)
    table = await channel.gather(row)
    if table is None or lengths is None:
        return []
    return [_bytes_of(table[rank, : int(lengths[rank])]) for rank in range(channel.size)]


async def scatter_bytes(channel: Channel, parts: Sequence[bytes], longest: int) -> bytes:
    """Give each rank its part of the root's `parts`, of which none is longer than `longest`."""
    lengths = torch.tensor([[len(part)] for part in parts], dtype=torch.int64) if parts else None
    length = torch.zeros(1, dtype=torch.int64)
    await channel.scatter(lengths, length)
    table = None
    if parts:
        table = torch.zeros(channel.size, longest, dtype=torch.uint8)
        for rank, part in enumerate(parts):
            table[rank, : len(part)] = _tensor_of(part)
    row = torch.zeros(longest, dtype=torch.uint8)
    await channel.scatter(table, row)
    return _bytes_of(row[: int(length)])


async def broadcast_bytes(channel: Channel, data: bytes) -> bytes:
    length = torch.tensor([len(data)], dtype=torch.int64)
    await channel.broadcast(length)
    row = _tensor_of(data) if channel.rank == channel.root else torch.zeros(int(length), dtype=torch.uint8)
    if length:
        await channel.broadcast(row)
    return _bytes_of(row)


def _tensor_of(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.zeros(0, dtype=torch.uint8)


def _bytes_of(row: torch.Tensor) -> bytes:
    return ctypes.string_at(row.data_ptr(), row.numel())

"""Bytes of any length between ranks: gather and broadcast."""

from __future__ import annotations

import ctypes

import torch

from .channel import Channel


async def gather_bytes(line: Channel, data: bytes) -> list[bytes]:
    lengths = await line.gather(torch.tensor([len(data)], dtype=torch.int64))
    longest = lengths.max().reshape(1) if lengths is not None else torch.zeros(1, dtype=torch.int64)
    await line.broadcast(longest)
    row = torch.zeros(max(int(longest), 1), dtype=torch.uint8)
    row[: len(data)] = tensor_of(data)
    table = await line.gather(row)
    if table is None or lengths is None:
        return []
    return [bytes_of(table[rank, : int(lengths[rank])]) for rank in range(line.size)]


async def broadcast_bytes(line: Channel, data: bytes) -> bytes:
    length = torch.tensor([len(data)], dtype=torch.int64)
    await line.broadcast(length)
    row = tensor_of(data) if line.rank == line.root else torch.zeros(int(length), dtype=torch.uint8)
    if length:
        await line.broadcast(row)
    return bytes_of(row)


def tensor_of(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.zeros(0, dtype=torch.uint8)


def bytes_of(row: torch.Tensor) -> bytes:
    return ctypes.string_at(row.data_ptr(), row.numel())

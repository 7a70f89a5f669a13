"""A large tensor comes to the same bytes in windows, whatever its strides and dtype, and whichever part is wanted."""

from __future__ import annotations

import io
import random
import zlib
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch

from aiodcp import Checkpointer
from aiodcp._engine.device_copies import DeviceCopies
from aiodcp._engine.host_memory import Arena
from aiodcp._format.archive_reader import find_tensor
from aiodcp._format.archive_writer import frame_tensor
from aiodcp._format.chunks import cut, extent
from aiodcp._load.decode import ItemDecoder
from aiodcp._load.large_reads import LargeRead, in_windows
from aiodcp._load.plan import TensorRead
from aiodcp.errors import CorruptError
from aiodcp.testing import FaultyStorage

WINDOW = 4096
CHECK = ItemDecoder(describe=str, crc32=zlib.crc32, weights_only=True)


def _file(tensor: torch.Tensor) -> bytearray:
    """Return a file with one framed tensor, which begins at byte 64."""
    frame = frame_tensor(tensor.dtype, tuple(tensor.shape))
    payload = bytes(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    item = bytearray(frame.header + payload + frame.trailer)
    item[frame.header_crc : frame.header_crc + 4] = zlib.crc32(payload).to_bytes(4, "little")
    return bytearray(64) + item


def _read(tensor: torch.Tensor, into: torch.Tensor, part: tuple[torch.Size, torch.Size] | None = None) -> TensorRead:
    frame = frame_tensor(tensor.dtype, tuple(tensor.shape))
    read = TensorRead("w", "file", 64, frame.item_nbytes, tensor.dtype, tensor.shape, frame, part, into, False)
    if part is not None:
        first, last = extent(frame, part)
        read.offset, read.nbytes, read.bare = 64 + len(frame.header) + first, last - first, True
    return read


def _fill(large: LargeRead, file: bytearray) -> None:
    arena = Arena(4 * WINDOW)
    for number, window in enumerate(large.windows):
        assert window.nbytes <= WINDOW
        arena.memory[: window.nbytes] = file[window.start : window.stop]
        large.fill(number, arena, CHECK, DeviceCopies())
    assert sum(piece.into.numel() for window in large.windows for piece in window.pieces) == large.read.into.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.complex128, torch.bfloat16, torch.int64])
def test_a_whole_tensor_comes_back_and_its_damage_is_found(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    for shape in ((9000,), (3, 70, 50), (1, 9001), (200, 51)):
        tensor = torch.randint(0, 100, shape, generator=generator).to(dtype)
        file = _file(tensor)
        for into in (
            torch.zeros(shape, dtype=dtype),
            torch.zeros(tuple(reversed(shape)), dtype=dtype).permute(*reversed(range(len(shape)))),
        ):
            large = in_windows(_read(tensor, into), nbytes=WINDOW)
            assert large is not None
            assert large.is_compared
            assert len(large.windows) > 2
            _fill(large, file)
            assert torch.equal(into, tensor)
        file[-500] ^= 1
        large = in_windows(_read(tensor, torch.zeros(shape, dtype=dtype)), nbytes=WINDOW)
        assert large is not None
        with pytest.raises(CorruptError, match="CRC32"):
            _fill(large, file)


def test_a_value_is_converted_on_the_way() -> None:
    tensor = torch.arange(9000, dtype=torch.int32)
    into = torch.zeros(9000, dtype=torch.float64)
    large = in_windows(_read(tensor, into), nbytes=WINDOW)
    assert large is not None
    _fill(large, _file(tensor))
    assert torch.equal(into, tensor.double())


def test_any_part_of_a_tensor_comes_back() -> None:
    rng = random.Random(2)
    tensor = torch.randint(0, 1 << 30, (40, 30, 20), generator=torch.Generator().manual_seed(3))
    file = _file(tensor)
    seen = 0
    for _ in range(100):
        offsets = [rng.randrange(size) for size in tensor.shape]
        lengths = [rng.randint(1, size - offset) for size, offset in zip(tensor.shape, offsets, strict=True)]
        part = torch.Size(offsets), torch.Size(lengths)
        into = torch.zeros(lengths, dtype=tensor.dtype)
        large = in_windows(_read(tensor, into, part), nbytes=WINDOW)
        if large is None:
            continue
        seen += 1
        assert not large.is_compared
        _fill(large, file)
        assert torch.equal(into, cut(tensor, part))
    assert seen > 20


def test_rows_that_are_larger_than_a_window_are_read_otherwise() -> None:
    tensor = torch.zeros(3, 9000)
    part = torch.Size((0, 0)), torch.Size((2, 8999))
    assert in_windows(_read(tensor, torch.zeros(2, 8999), part), nbytes=WINDOW) is None


def test_a_tensor_in_an_archive_of_torch_save_comes_back() -> None:
    tensor = torch.randn(100, 50)
    buffer = io.BytesIO()
    torch.save(tensor, buffer)
    file = bytearray(64) + buffer.getvalue()
    stored = find_tensor(memoryview(buffer.getvalue()), None)
    assert stored is not None
    for damaged in (False, True):
        if damaged:
            file[64 + stored.start + 9999] ^= 1
        into = torch.zeros(100, 50)
        read = TensorRead("w", "file", 64, len(buffer.getvalue()), tensor.dtype, tensor.shape, None, None, into, False)
        large = in_windows(read, stored, WINDOW)
        assert large is not None
        if damaged:
            with pytest.raises(CorruptError, match="CRC32"):
                _fill(large, file)
        else:
            _fill(large, file)
            assert torch.equal(into, tensor)
    turned = TensorRead("w", "file", 64, read.nbytes, tensor.dtype, torch.Size((50, 100)), None, None, into.t(), False)
    assert in_windows(turned, stored, WINDOW) is None


async def test_a_tensor_of_any_strides_is_loaded_in_windows(tmp_path: Path) -> None:
    tensor = torch.randn(3000, 2000)
    async with Checkpointer() as checkpointer:
        await (await checkpointer.save({"w": tensor}, tmp_path)).uploaded
        target = {"w": torch.zeros(2000, 3000).t()}
        await checkpointer.load(target, tmp_path)
        assert torch.equal(target["w"], tensor)


async def test_tied_large_tensors_come_back_as_one_of_the_stored_ones(faulty: FaultyStorage) -> None:
    count = 6 << 20
    async with Checkpointer(storage=faulty) as checkpointer:
        state = {"a": torch.zeros(count), "b": torch.ones(count)}
        await (await checkpointer.save(state, "a")).uploaded
        for late in range(6):
            reads = 0

            async def pause() -> None:
                await anyio.sleep(0.05)

            def gate(call: str) -> Any:
                nonlocal reads
                reads += call == "read"
                return pause() if call == "read" and reads == late + 1 else None  # noqa: B023

            faulty.gate = gate
            target = torch.full((count,), 5.0)
            await checkpointer.load({"a": target, "b": target}, "a")
            assert float(target.min()) == float(target.max()), late

"""Small tensors that are gathered on their device come to the same bytes as those that cross one by one."""

from __future__ import annotations

import pytest
import torch

from aiodcp._engine.device_copies import CopyStreams, DeviceCopies
from aiodcp._format.checksum import default_checksum
from aiodcp._format.layout import lay_out
from aiodcp._save.staging import Staging

from ..support.devices import Driver

SHAPES: list[tuple[torch.dtype, tuple[int, ...]]] = [
    (torch.float32, (300, 7)),
    (torch.bfloat16, (129,)),
    (torch.float32, ()),
    (torch.int64, (0, 3)),
    (torch.uint8, (4097,)),
    (torch.uint16, (5,)),
    (torch.complex64, (3, 2)),
    *[(torch.float32, (1000 + n,)) for n in range(200)],
]


def _values(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randint(0, 200, shape, generator=generator).to(dtype) for dtype, shape in SHAPES]
    values[0] = values[0].t().contiguous().t()
    values[6] = values[6].conj()
    return values


def _file(stage: Staging, values: list[torch.Tensor], copies: DeviceCopies) -> bytes:
    if copies:
        copies.start()
    for number in range(len(stage.layout.segments)):
        copies.wait_for(stage.copy(number, values, copies))
        stage.checksum(number, default_checksum())
    return bytes(stage.arena.memory[: stage.layout.tail])


def _put(devices: Driver, values: list[torch.Tensor]) -> list[torch.Tensor]:
    there = [devices.put(value.resolve_conj()) for value in values]
    there[0] = devices.put(values[0].t()).t()
    there[6] = devices.put(values[6].resolve_conj().conj_physical()).conj()
    there[8] = values[8]  # one stays where it is
    return there


def test_the_file_is_the_same_by_way_of_a_gather_buffer(devices: Driver) -> None:
    layout = lay_out(SHAPES)
    gathered, direct = (Staging(layout, range(len(SHAPES)), 0) for _ in range(2))
    streams = CopyStreams()
    for seed in range(3):  # the buffer is kept, and what is in it is of the save before
        values = _values(seed)
        there = _put(devices, values)
        devices.launches = 0
        copies = streams.begin({value.device for value in there}, str)
        assert _file(gathered, there, copies) == _file(direct, values, DeviceCopies())
        assert devices.launches < 12


def test_large_tensors_cross_one_by_one(devices: Driver) -> None:
    there = [devices.put(torch.full((1 << 20,), float(n))) for n in range(3)]
    copies = CopyStreams().begin({value.device for value in there}, str)
    before = devices.memories[0].peak_nbytes
    _file(Staging(lay_out([(torch.float32, (1 << 20,))] * 3), range(3), 0), there, copies)
    assert devices.launches == 3
    assert devices.memories[0].peak_nbytes == before


def test_a_device_without_memory_to_spare_sends_tensors_one_by_one(
    devices: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = lay_out(SHAPES)
    stage, direct = (Staging(layout, range(len(SHAPES)), 0) for _ in range(2))
    values = _values(1)
    there = _put(devices, values)

    def refuse(*args: object, **options: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "empty", refuse)
    devices.launches = 0
    copies = CopyStreams().begin({value.device for value in there}, str)
    assert _file(stage, there, copies) == _file(direct, values, DeviceCopies())
    assert devices.launches > 200

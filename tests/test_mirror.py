"""Small tensors that are gathered on their device come to the same bytes as those that cross one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from aiodcp._devices import Crossing
from aiodcp._layout import lay_out
from aiodcp._mirror import Mirror, copy_through
from aiodcp._stage import Stage, default_checksum

SHAPES: list[tuple[torch.dtype, tuple[int, ...]]] = [
    (torch.float32, (300, 7)),
    (torch.bfloat16, (129,)),
    (torch.float32, ()),
    (torch.int64, (0, 3)),
    (torch.uint8, (4097,)),
    *[(torch.float32, (1000 + n,)) for n in range(200)],
]


class Elsewhere(torch.Tensor):
    """Says that it lies on another device than host memory."""

    device = torch.device("cuda", 3)


class OneDevice(Crossing):
    """Of host memory it says that it is the one device: a mirror then is host memory, too."""

    nbytes = -1

    def __bool__(self) -> bool:
        return True

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def mirror(self, nbytes: int) -> Mirror:
        self.nbytes = nbytes
        return Mirror(self.device, nbytes)


def _values(seed: int) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randint(0, 200, shape, generator=generator).to(dtype) for dtype, shape in SHAPES]
    values[0] = values[0].t().contiguous().t()
    return values


def _file(stage: Stage, values: list[Any], crossing: Crossing) -> bytes:
    for number in range(len(stage.layout.segments)):
        assert stage.copy(number, values, crossing) == []
        stage.checksum(number, default_checksum())
    return bytes(stage.arena.memory[: stage.layout.tail])


def test_the_file_is_the_same_by_way_of_a_mirror() -> None:
    layout = lay_out(SHAPES)
    by_mirror, direct = (Stage(layout, range(len(SHAPES)), 0) for _ in range(2))
    crossing = OneDevice()
    for seed in range(3):  # the mirror is kept, and what is in it is of the save before
        assert _file(by_mirror, _values(seed), crossing) == _file(direct, _values(seed), Crossing())
    assert crossing.nbytes == layout.tail


def test_large_tensors_cross_one_by_one() -> None:
    shapes = [(torch.float32, (1 << 20,))] * 3
    crossing = OneDevice()
    values = [torch.full((1 << 20,), float(n)) for n in range(3)]
    _file(Stage(lay_out(shapes), range(3), 0), values, crossing)
    assert crossing.nbytes == -1


def test_what_lies_in_host_memory_is_not_lost_when_the_mirror_comes_back() -> None:
    stretch = torch.zeros(64, dtype=torch.uint8)
    targets = [stretch[8:12], stretch[20:30], stretch[40:41]]
    mirror = Mirror(torch.device("cpu"), 100)
    assert mirror.memory is not None
    places = mirror.places(stretch, targets)
    host = torch.full((10,), 2, dtype=torch.uint8).as_subclass(Elsewhere)
    sources = [torch.full((4,), 1, dtype=torch.uint8), host, torch.full((1,), 3, dtype=torch.uint8)]
    copy_through(mirror.memory, places, stretch, targets, sources)
    expected = torch.zeros(64, dtype=torch.uint8)
    expected[8:12], expected[20:30], expected[40:41] = 1, 2, 3
    assert torch.equal(stretch, expected)


def test_a_device_without_memory_to_spare_sends_tensors_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = lay_out(SHAPES)
    stage, direct = (Stage(layout, range(len(SHAPES)), 0) for _ in range(2))
    expected = _file(direct, _values(1), Crossing())

    def refuse(*args: Any, **kwargs: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "empty", refuse)
    crossing = OneDevice()
    assert _file(stage, _values(1), crossing) == expected
    assert crossing.nbytes > 0

"""What the hardware itself takes for the bytes of a save: a bare copy in memory, bare writes to the file system."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

import torch

from ..._engine.host_memory import Arena


@dataclass(slots=True, kw_only=True)
class HardwareLimits:
    """What the hardware takes for the same bytes, in seconds."""

    memcpy_s: list[float] = field(default_factory=list)
    write_buffered_s: list[float] = field(default_factory=list)
    write_direct_s: list[float] = field(default_factory=list)

    def measure(self, state: Mapping[str, torch.Tensor], arena: Arena, directory: Path) -> None:
        sources = list(state.values())
        flat = arena.tensor.view(torch.float32)
        targets = list(torch.split(flat[: sum(t.numel() for t in sources)], [t.numel() for t in sources]))
        began = time.perf_counter()
        torch._foreach_copy_(targets, sources)
        self.memcpy_s.append(time.perf_counter() - began)
        self.measure_writes(arena, directory)

    def measure_writes(self, arena: Arena, directory: Path) -> None:
        self.write_buffered_s.append(_raw_write(arena, directory, 0))
        with suppress(OSError):  # a file system without O_DIRECT has no such floor
            self.write_direct_s.append(_raw_write(arena, directory, os.O_DIRECT))

    def medians(self) -> dict[str, float]:
        return {name: median(values) for name, values in asdict(self).items() if values}


def _raw_write(arena: Arena, directory: Path, flags: int) -> float:
    path = directory / "floor"
    began = time.perf_counter()
    fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | flags)
    try:
        offset = 0
        while offset < arena.nbytes:
            offset += os.pwrite(fd, arena.memory[offset : offset + (64 << 20)], offset)
        os.fsync(fd)
        return time.perf_counter() - began
    finally:
        os.close(fd)
        path.unlink()

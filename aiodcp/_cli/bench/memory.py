"""How much memory saving takes, in a process of its own."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

from .systems import SYSTEMS
from .workload import Shape


def clear(directory: Path) -> None:
    for path in directory.iterdir():
        shutil.rmtree(path)
    os.sync()  # so that the next system does not pay for this one's removal


def extra_memory(name: str, shape: Shape, directory: Path) -> float:
    """Return MiB by which the process grew at most over five saves, in a fresh process."""
    arguments = [name, str(shape.tensors), str(shape.elements), str(directory)]
    command = [sys.executable, "-m", "aiodcp._cli.bench.memory", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return float(done.stdout)


async def measure_memory(name: str, shape: Shape, directory: Path) -> float:
    state = shape.make()
    small = Shape(name="warm", tensors=8, elements=1024).make()
    system = SYSTEMS[name]()
    for number in range(6):
        if number == 1:  # what the first save of anything imports is not counted
            before = begin_peak()
        _, uploaded = await system.save(small if number == 0 else state, str(directory / f"memory-{number}"))
        await uploaded()
        clear(directory)
    await system.close()
    return (peak_kib() - before) / 1024


def begin_peak() -> int:
    """Let the process's peak memory begin anew, and return what it has now, in KiB. Source: proc(5)."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status_kib("VmRSS")


def peak_kib() -> int:
    """Return the process's peak memory since then, in KiB."""
    return _status_kib("VmHWM")


def _status_kib(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    [line] = [line for line in lines if line.startswith(f"{name}:")]
    return int(line.split()[1])


if __name__ == "__main__":  # one system's memory: see extra_memory
    warnings.filterwarnings("ignore")
    system_name, count, size, folder = sys.argv[1:]
    shape_of_one = Shape(name="memory", tensors=int(count), elements=int(size))
    print(asyncio.run(measure_memory(system_name, shape_of_one, Path(folder))))

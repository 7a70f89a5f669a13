"""One save or load, measured: lag, busy and blocked callers, cold and warm loads."""

from __future__ import annotations

import asyncio
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from statistics import median

import torch

from .systems import Saving, System
from .workload import State, python_step

BUSY_LIMIT_S = 5.0

BLOCK_S = 0.2  # seconds for which the blocking caller keeps its loop from turning

LAG_PERIOD_S = 0.001


@dataclass(slots=True, kw_only=True)
class Measured:
    """What one system took: seconds, except `slowdown` (a ratio), `extra_mib`, and the parts (0 to 1) of staging and
    writing that lay under the steps of a blocking caller, which DCP does not report.
    """

    held_s: float = 0.0
    staged_s: float = 0.0
    durable_s: float = 0.0
    blocked_s: float = 0.0
    busy_s: float = 0.0
    cpu_s: float = 0.0
    lag_s: float = 0.0
    slowdown: float = 0.0
    extra_mib: float = 0.0
    load_cold_s: float = 0.0
    load_warm_s: float = 0.0
    load_lag_s: float = 0.0
    staged_under: float = 0.0
    written_under: float = 0.0


class Lag:
    """The longest time for which the event loop did not turn, while the block runs."""

    async def __aenter__(self) -> Lag:
        self.seconds = 0.0
        self._task = asyncio.create_task(self._watch())
        await asyncio.sleep(0)
        return self

    async def _watch(self) -> None:
        last = time.perf_counter()
        while True:
            await asyncio.sleep(LAG_PERIOD_S)
            now = time.perf_counter()
            self.seconds = max(self.seconds, now - last - LAG_PERIOD_S)
            last = now

    async def __aexit__(self, *_: object) -> None:
        await asyncio.sleep(2 * LAG_PERIOD_S)  # let a turn that is late be seen
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task


async def time_save(system: Saving, state: State, path: str) -> Measured:
    """Save while the caller's loop has nothing else to do."""
    cpu = time.process_time()
    async with Lag() as lag:
        began = time.perf_counter()
        staged, uploaded = await system.save(state, path)
        held = time.perf_counter()
        await staged()
        free = time.perf_counter()
        await uploaded()
        ended = time.perf_counter()
        cpu = time.process_time() - cpu
    return Measured(held_s=held - began, staged_s=free - began, durable_s=ended - began, cpu_s=cpu, lag_s=lag.seconds)


async def time_steps(system: System, state: State, path: str) -> tuple[float, float]:
    """Save while the caller computes in Python, turning its loop between steps.

    Returns:
        How much longer the steps take than alone, the time for which saving holds the caller counted; and the seconds
        to the end of the save, or `BUSY_LIMIT_S` if it has not come by then: such a caller can keep the threads of
        the save from running at all. Then the caller waits.
    """
    alone = median(python_step() for _ in range(20))
    began = time.perf_counter()
    _, uploaded = await system.save(state, path)
    done = asyncio.ensure_future(uploaded())
    steps = 0
    while not done.done() and time.perf_counter() - began < BUSY_LIMIT_S:
        python_step()
        steps += 1
        await asyncio.sleep(0)
    seconds = time.perf_counter() - began
    await done
    return seconds / max(steps, 1) / alone, seconds


async def time_blocked(system: System, state: State, path: str) -> tuple[float, list[tuple[float, float]]]:
    """Return the seconds to the end of a save whose caller blocks its loop, as a training step does, and its steps.

    The steps are matrix products on one core; the loop turns once between two. The end of the save is the time of its
    last file, `.metadata`: the caller sees it up to a step later.
    """
    a = torch.randn(512, 512)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    began = time.time_ns()
    _, uploaded = await system.save(state, path)
    done = asyncio.ensure_future(uploaded())
    steps: list[tuple[float, float]] = []
    while not done.done():
        start = time.perf_counter()
        while time.perf_counter() < start + BLOCK_S:
            torch.mm(a, a)
        steps.append((start, time.perf_counter()))
        await asyncio.sleep(0)
    torch.set_num_threads(threads)
    return (os.stat(os.path.join(path, ".metadata")).st_mtime_ns - began) / 1e9, steps


async def time_load(system: System, state: State, path: str) -> tuple[float, float, float]:
    """Return seconds to load with the files out of the page cache, with them in it, and the largest lag."""
    target = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    for file in os.scandir(path):
        fd = os.open(file.path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
    seconds = []
    async with Lag() as lag:
        for _ in ("cold", "warm"):
            began = time.perf_counter()
            await system.load(target, path)
            seconds.append(time.perf_counter() - began)
    if any(not torch.equal(tensor, target[name]) for name, tensor in state.items()):
        raise AssertionError("what was loaded is not what was saved")
    return seconds[0], seconds[1], lag.seconds

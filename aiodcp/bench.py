"""How fast this machine can save and load, with aiodcp and with DCP, and what the hardware itself would allow.

All rows of a table come from one run: in every round each system saves the same state once to a fresh directory of
the same file system, one after the other, and the medians over the rounds are shown. A first round is not counted.
Each system saves three times a round: while the caller's event loop idles (held, staged, durable, CPU, lag), while the
caller blocks its loop in steps of 0.2 s (blocked), and while it computes in pure Python (busy, slowdown). Memory is
measured in a process of its own for each system.
"""

from __future__ import annotations

import asyncio
import gc
import json
import mmap
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import torch
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse
from torch.distributed.checkpoint.state_dict_saver import async_save as dcp_async_save

from ._arena import Arena
from ._floors import Floors
from ._timeline import Timeline
from .checkpointer import Checkpointer

State = dict[str, torch.Tensor]
STEP_ROUNDS = 60_000  # of a loop in pure Python: a step of a few milliseconds that needs the GIL throughout
BUSY_LIMIT_S = 5.0
BLOCK_S = 0.2  # seconds for which the blocking caller keeps its loop from turning
LAG_PERIOD_S = 0.001


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A state to save: how many tensors, and how many float32 elements each."""

    name: str
    tensors: int
    elements: int

    def make(self, device: str | torch.device = "cpu") -> State:
        generator = torch.Generator(device).manual_seed(0)
        return {
            f"layers.{n}.weight": torch.randn(self.elements, generator=generator, device=device)
            for n in range(self.tensors)
        }

    @property
    def nbytes(self) -> int:
        return 4 * self.tensors * self.elements


@dataclass(slots=True, kw_only=True)
class Row:
    """What one system took: seconds, except `slowdown` (a ratio), `extra_mib`, and the parts (0 to 1) of staging and
    writing that lay under the steps of a blocking caller, which DCP does not tell.
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


Waiter = Callable[[], Awaitable[None]]


class Saving(Protocol):
    """Something that saves: `save` returns what waits for staging and what waits for the end."""

    async def save(self, state: State, path: str) -> tuple[Waiter, Waiter]: ...


class System(Saving, Protocol):
    """Something that saves and loads."""

    async def load(self, state: State, path: str) -> None: ...
    async def close(self) -> None: ...

    def under(self, compute: list[tuple[float, float]]) -> tuple[float, float]:
        """Return which parts of the last save's staging and writing lay within `compute`."""


class Aiodcp:
    """This library, as it comes."""

    def __init__(self) -> None:
        self._stack = AsyncExitStack()
        self._checkpointer: Checkpointer | None = None
        self._timeline = Timeline()

    async def _open(self) -> Checkpointer:
        if self._checkpointer is None:
            self._checkpointer = await self._stack.enter_async_context(Checkpointer())
        return self._checkpointer

    async def save(self, state: State, path: str) -> tuple[Waiter, Waiter]:
        checkpoint = await (await self._open()).save(state, path)
        self._timeline = checkpoint.timeline

        async def staged() -> None:
            await checkpoint.staged

        async def uploaded() -> None:
            await checkpoint.uploaded

        return staged, uploaded

    async def load(self, state: State, path: str) -> None:
        await (await self._open()).load(state, path)

    async def close(self) -> None:
        await self._stack.aclose()

    def under(self, compute: list[tuple[float, float]]) -> tuple[float, float]:
        return self._timeline.under("stage", compute), self._timeline.under("write", compute)


class Dcp:
    """`dcp.async_save` as it comes: staging is done when it returns."""

    async def save(self, state: State, path: str) -> tuple[Waiter, Waiter]:
        response = dcp_async_save(state, checkpoint_id=path)
        assert not isinstance(response, AsyncSaveResponse)

        async def staged() -> None:
            return

        async def uploaded() -> None:
            await asyncio.wrap_future(response)

        return staged, uploaded

    async def load(self, state: State, path: str) -> None:
        dcp_load(dict(state), checkpoint_id=path)

    async def close(self) -> None:
        return

    def under(self, compute: list[tuple[float, float]]) -> tuple[float, float]:
        return 0.0, 0.0


class DcpStager(Dcp):
    """`dcp.async_save` with a `DefaultStager` that is kept: staging in a thread, buffers reused.

    Its default options need an accelerator (pinned memory, copies that do not block); this is what is left on a CPU.
    """

    def __init__(self) -> None:
        self._stager = DefaultStager(StagingOptions(False, False, True, False))

    async def save(self, state: State, path: str) -> tuple[Waiter, Waiter]:
        response = dcp_async_save(state, checkpoint_id=path, async_stager=self._stager)
        assert isinstance(response, AsyncSaveResponse)

        async def staged() -> None:
            await asyncio.wrap_future(response.staging_completion)

        async def uploaded() -> None:
            await asyncio.wrap_future(response.upload_completion)

        return staged, uploaded

    async def close(self) -> None:
        self._stager.close()


SYSTEMS: Mapping[str, Callable[[], System]] = {
    "aiodcp": Aiodcp,
    "dcp.async_save": Dcp,
    "dcp + DefaultStager": DcpStager,
}


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


async def time_save(system: Saving, state: State, path: str) -> Row:
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
    return Row(held_s=held - began, staged_s=free - began, durable_s=ended - began, cpu_s=cpu, lag_s=lag.seconds)


def python_step() -> float:
    """Compute in pure Python, as data loaders and optimizers with many small tensors do; return the seconds."""
    began = time.perf_counter()
    total = 0
    for number in range(STEP_ROUNDS):
        total += number & 3
    return time.perf_counter() - began


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


# --- runs


async def run_shape(shape: Shape, directory: Path, repeat: int) -> dict[str, Any]:
    """Measure one shape: floors and rows."""
    state = shape.make()
    arena = Arena(-(-shape.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE)
    arena.populate()
    floors = Floors()
    rows: dict[str, list[Row]] = {name: [] for name in SYSTEMS}
    systems = {name: make() for name, make in SYSTEMS.items()}
    try:
        for number in range(repeat + 1):
            print(f"{shape.name}: round {number} of {repeat}", file=sys.stderr)  # each takes up to two minutes
            if number == 1:  # the round before was to warm up
                floors, rows = Floors(), {name: [] for name in SYSTEMS}
            floors.measure(state, arena, directory)
            for name, system in systems.items():
                rows[name].append(await _run_once(system, state, directory))
    finally:
        for system in systems.values():
            await system.close()
    table = {name: _middle(rows[name]) for name in SYSTEMS}
    for name, row in table.items():
        row.extra_mib = _extra_memory(name, shape, directory)
    return {
        "shape": asdict(shape) | {"nbytes": shape.nbytes},
        "floors": floors.medians(),
        "rows": {name: asdict(row) for name, row in table.items()},
    }


async def _run_once(system: System, state: State, directory: Path) -> Row:
    path = str(directory / "idle")
    gc.collect()  # no system pays for the cycles that another has left
    row = await time_save(system, state, path)
    gc.collect()
    row.load_cold_s, row.load_warm_s, row.load_lag_s = await time_load(system, state, path)
    _clear(directory)
    row.slowdown, row.busy_s = await time_steps(system, state, str(directory / "busy"))
    _clear(directory)
    row.blocked_s, steps = await time_blocked(system, state, str(directory / "blocked"))
    row.staged_under, row.written_under = system.under(steps)
    _clear(directory)
    return row


def _clear(directory: Path) -> None:
    for path in directory.iterdir():
        shutil.rmtree(path)
    os.sync()  # so that the next system does not pay for this one's removal


def _middle(rows: list[Row]) -> Row:
    return Row(**{each.name: median(getattr(row, each.name) for row in rows) for each in fields(Row)})


def _extra_memory(name: str, shape: Shape, directory: Path) -> float:
    """Return MiB by which the process grew at most over five saves, in a fresh process."""
    arguments = [name, str(shape.tensors), str(shape.elements), str(directory)]
    command = [sys.executable, "-m", "aiodcp.bench", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return float(done.stdout)


async def _measure_memory(name: str, shape: Shape, directory: Path) -> float:
    state = shape.make()
    small = Shape(name="warm", tensors=8, elements=1024).make()
    system = SYSTEMS[name]()
    for number in range(6):
        if number == 1:  # what the first save of anything imports is not counted
            before = _begin_peak()
        _, uploaded = await system.save(small if number == 0 else state, str(directory / f"memory-{number}"))
        await uploaded()
        _clear(directory)
    await system.close()
    return (_status_kib("VmHWM") - before) / 1024


def _begin_peak() -> int:
    """Let the process's peak memory begin anew, and return what it has now, in KiB. Source: proc(5)."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status_kib("VmRSS")


def _status_kib(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    [line] = [line for line in lines if line.startswith(f"{name}:")]
    return int(line.split()[1])


def run(directory: str, *, gib: float, tensors: int, repeat: int, as_json: bool) -> None:
    """Run the benchmark in a fresh folder of `directory` and print what it found.

    Args:
        directory: on the file system that is to be measured; made if it is not there.
        gib: size of the state with few large tensors, in GiB: 64 of them.
        tensors: how many tensors of 4 KiB the other state has.
        repeat: rounds that count.
        as_json: print JSON instead of tables.
    """
    warnings.filterwarnings("ignore")  # DCP warns of having no process group, on every save
    large = Shape(name=f"{gib:g} GiB in 64 tensors", tensors=64, elements=int(gib * (1 << 30)) // 256)
    small = Shape(name=f"{tensors} tensors of 4 KiB", tensors=tensors, elements=1024)
    Path(directory).mkdir(parents=True, exist_ok=True)
    results = []
    with tempfile.TemporaryDirectory(prefix="aiodcp-bench-", dir=directory) as folder:
        for shape in (large, small):
            results.append(asyncio.run(run_shape(shape, Path(folder), repeat)))
    if as_json:
        print(json.dumps({"torch": torch.__version__, "cores": os.cpu_count(), "shapes": results}, indent=2))
        return
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, medians of {repeat} rounds, in {directory}")
    for result in results:
        print(format_result(result))


def format_result(result: Mapping[str, Any]) -> str:
    """Return one shape's table as text, and the ratios that a promise is made of."""
    floors, rows = result["floors"], result["rows"]
    lines = ["", result["shape"]["name"], "-" * len(result["shape"]["name"])]
    lines += [f"floor  {name.removesuffix('_s').replace('_', ' '):<16}{ms(s):>10}" for name, s in floors.items()]
    header = (
        "held",
        "staged",
        "durable",
        "blocked",
        "busy",
        "slowdown",
        "CPU",
        "lag",
        "memory",
        "load cold",
        "warm",
        "lag",
    )
    lines += ["", f"{'':<20}" + "".join(f"{title:>10}" for title in header)]
    for name, row in rows.items():
        cells = [ms(row[key]) for key in ("held_s", "staged_s", "durable_s", "blocked_s")]
        cells.append(ms(row["busy_s"]) if row["busy_s"] < BUSY_LIMIT_S else f">{BUSY_LIMIT_S:g} s")
        cells += [f"{row['slowdown']:.2f}x", ms(row["cpu_s"]), ms(row["lag_s"]), f"{row['extra_mib']:.0f} MiB"]
        cells += [ms(row[key]) for key in ("load_cold_s", "load_warm_s", "load_lag_s")]
        lines.append(f"{name:<20}" + "".join(f"{cell:>10}" for cell in cells))
    ours, theirs = rows["aiodcp"], rows["dcp.async_save"]
    raw = min(seconds for name, seconds in floors.items() if name.startswith("write"))
    ratios = {
        "staged / memcpy": ours["staged_s"] / floors["memcpy_s"],
        "durable / raw write": ours["durable_s"] / raw,
        "blocked / durable": ours["blocked_s"] / ours["durable_s"],
        "dcp held / ours": theirs["held_s"] / ours["held_s"],
        "dcp staged / ours": theirs["staged_s"] / ours["staged_s"],
        "dcp durable / ours": theirs["durable_s"] / ours["durable_s"],
        "dcp CPU / ours": theirs["cpu_s"] / ours["cpu_s"],
        "dcp load / ours": theirs["load_warm_s"] / ours["load_warm_s"],
        "memory / bytes": ours["extra_mib"] * (1 << 20) / result["shape"]["nbytes"],
    }
    covered = f"{ours['staged_under']:.0%} of staging and {ours['written_under']:.0%} of writing"
    lines += ["", f"blocked: {covered} lay under the caller's steps"]
    lines += ["", *(f"{name:<20}{ratio:>9.2f}x" for name, ratio in ratios.items())]
    return "\n".join(lines)


def ms(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms"


if __name__ == "__main__":  # one system's memory: see _extra_memory
    warnings.filterwarnings("ignore")
    system_name, count, size, place = sys.argv[1:]
    shape_of_one = Shape(name="memory", tensors=int(count), elements=int(size))
    print(asyncio.run(_measure_memory(system_name, shape_of_one, Path(place))))

"""How fast an object store can be saved to and loaded from, with aiodcp and with DCP, and what its client alone takes.

The floor is the bare client: obstore sending the same bytes from one buffer, in objects of the same size, as many at
once; and reading them by ranges. All rows of a table come from one run, one system after the other in every round, and
medians are shown; a first round is not counted. Memory is measured in a process of its own for each system.
"""

from __future__ import annotations

import asyncio
import gc
import json
import mmap
import os
import subprocess
import sys
import time
import uuid
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse
from torch.distributed.checkpoint.state_dict_saver import async_save as dcp_async_save
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter

from ..._engine.host_memory import Arena, memory_of
from ...errors import ArgumentError
from ...storage.auto import AutoStorage
from ...storage.object_files import RANGE_NBYTES
from ...storage.object_store import OBJECT_NBYTES, ObjectStorage
from ...storage.object_urls import make_store
from .measure import Lag, Measured, time_save
from .memory import begin_peak, peak_kib
from .systems import Aiodcp, Dcp, System
from .tables import median_row, ms
from .workload import Shape, State

CONCURRENCY = 16  # as `ObjectStorage` by default


class DcpByWriter(Dcp):
    """`dcp.async_save` through a storage writer and reader of others."""

    def __init__(self, writer: Callable[[str], StorageWriter], reader: Callable[[str], StorageReader]) -> None:
        self._writer = writer
        self._reader = reader

    def begin(self, state: State, path: str) -> Future[Any] | AsyncSaveResponse:
        return dcp_async_save(state, storage_writer=self._writer(path))

    async def load(self, state: State, path: str) -> None:
        dcp_load(dict(state), storage_reader=self._reader(path))


def _with_fsspec() -> System:
    from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter

    return DcpByWriter(FsspecWriter, FsspecReader)


def _with_s3torchconnector() -> System:
    from s3torchconnector import S3ClientConfig
    from s3torchconnector.dcp import S3StorageReader, S3StorageWriter

    region = os.environ.get("AWS_REGION", "us-east-1")
    config = S3ClientConfig(force_path_style=True)
    return DcpByWriter(
        lambda path: S3StorageWriter(region, path, s3client_config=config),
        lambda path: S3StorageReader(region, path, s3client_config=config),
    )


SYSTEMS: Mapping[str, Callable[[], System]] = {
    "aiodcp": Aiodcp,
    "dcp + fsspec": _with_fsspec,
    "s3torchconnector": _with_s3torchconnector,
}


@dataclass(slots=True, kw_only=True)
class ClientLimits:
    """What the bare client takes for the same bytes, in seconds."""

    put_s: list[float] = field(default_factory=list)
    get_s: list[float] = field(default_factory=list)
    put_lag_s: list[float] = field(default_factory=list)
    get_lag_s: list[float] = field(default_factory=list)

    async def measure(self, arena: Arena, url: str) -> None:
        """Let the client work on a loop in another thread, as that of a `Checkpointer`, and measure this one's lag."""
        storage = ObjectStorage.from_url(url)
        store, bucket = make_store(url)
        prefix = url[len(bucket) + 1 :]
        starts = range(0, arena.nbytes, OBJECT_NBYTES)

        async def put(start: int, limit: asyncio.Semaphore) -> None:
            async with limit:
                data = arena.memory[start : start + OBJECT_NBYTES]
                await store.put_async(f"{prefix}/floor-{start}", data, use_multipart=False)

        async def get(start: int, offset: int, limit: asyncio.Semaphore) -> None:
            async with limit:
                stop = min(offset + RANGE_NBYTES, OBJECT_NBYTES, arena.nbytes - start)
                await store.get_range_async(f"{prefix}/floor-{start}", start=offset, end=stop)

        async def put_all() -> None:
            limit = asyncio.Semaphore(CONCURRENCY)
            await asyncio.gather(*(put(start, limit) for start in starts))

        async def get_all() -> None:
            ranges = [
                (start, offset)
                for start in starts
                for offset in range(0, min(OBJECT_NBYTES, arena.nbytes - start), RANGE_NBYTES)
            ]
            limit = asyncio.Semaphore(CONCURRENCY)
            await asyncio.gather(*(get(*each, limit) for each in ranges))

        for work, seconds, lags in ((put_all, self.put_s, self.put_lag_s), (get_all, self.get_s, self.get_lag_s)):
            async with Lag() as lag:
                began = time.perf_counter()
                await asyncio.to_thread(asyncio.run, work())
                seconds.append(time.perf_counter() - began)
            lags.append(lag.seconds)
        await storage.remove_tree(storage.resolve(url))

    def medians(self) -> dict[str, float]:
        return {name: median(values) for name, values in asdict(self).items() if values}


async def run_shape(shape: Shape, url: str, repeat: int) -> dict[str, Any]:
    """Measure one shape: floors and rows."""
    state = shape.make()
    arena = Arena(-(-shape.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE)
    arena.populate()
    arena.memory[: shape.nbytes] = b"".join(memory_of(tensor) for tensor in state.values())
    systems, absent = _available()
    rows: dict[str, list[Measured]] = {}
    floors = ClientLimits()
    try:
        for number in range(repeat + 1):
            print(f"{shape.name}: round {number} of {repeat}", file=sys.stderr)
            if number <= 1:  # the round before was to warm up
                floors, rows = ClientLimits(), {name: [] for name in systems}
            await floors.measure(arena, f"{url}/floor")
            for name, system in systems.items():
                rows[name].append(await _run_once(system, state, f"{url}/{uuid.uuid4().hex}"))
    finally:
        for system in systems.values():
            await system.close()
    table = {name: median_row(each) for name, each in rows.items()}
    for name, row in table.items():
        row.extra_mib = extra_memory(name, shape, f"{url}/memory")
    return {
        "shape": asdict(shape) | {"nbytes": shape.nbytes},
        "floors": floors.medians(),
        "rows": {name: asdict(row) for name, row in table.items()},
        "absent": absent,
    }


def _available() -> tuple[dict[str, System], dict[str, str]]:
    """Return what can be measured here, and what cannot, with the reason."""
    systems: dict[str, System] = {}
    absent: dict[str, str] = {}
    for name, make in SYSTEMS.items():
        try:
            systems[name] = make()
        except ImportError as error:
            absent[name] = str(error)
    return systems, absent


async def _run_once(system: System, state: State, url: str) -> Measured:
    gc.collect()  # no system pays for the cycles that another has left
    row = await time_save(system, state, url)
    gc.collect()
    target = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    async with Lag() as lag:
        began = time.perf_counter()
        await system.load(target, url)
        row.load_warm_s = time.perf_counter() - began
    row.load_lag_s = lag.seconds
    if any(not torch.equal(tensor, target[name]) for name, tensor in state.items()):
        raise AssertionError("what was loaded is not what was saved")
    await _clear(url)
    return row


async def _clear(url: str) -> None:
    storage = AutoStorage()
    await storage.remove_tree(storage.resolve(url))


def extra_memory(name: str, shape: Shape, url: str) -> float:
    """Return MiB by which the process grew at most over three saves, in a fresh process."""
    command = [sys.executable, "-m", "aiodcp._cli.bench.store", name, str(shape.tensors), str(shape.elements), url]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return float(done.stdout)


async def _measure_memory(name: str, shape: Shape, url: str) -> float:
    state = shape.make()
    small = Shape(name="warm", tensors=8, elements=1024).make()
    system = SYSTEMS[name]()
    before = 0
    for number in range(4):
        if number == 1:  # what the first save of anything imports is not counted
            before = begin_peak()
        _, uploaded = await system.save(small if number == 0 else state, f"{url}/{number}")
        await uploaded()
        await _clear(f"{url}/{number}")
    await system.close()
    return (peak_kib() - before) / 1024


def run(url: str, *, gib: float, tensors: int, repeat: int, as_json: bool) -> None:
    """Run the benchmark below a fresh prefix of `url` and print what it found.

    Args:
        url: of a bucket, and a prefix in it.
        gib: size of the state with few large tensors, in GiB: 64 of them.
        tensors: how many tensors of 4 KiB the other state has.
        repeat: rounds that count.
        as_json: print JSON instead of tables.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ArgumentError("directory", f"{url} is measured by one process: run it without torchrun")
    warnings.filterwarnings("ignore")  # DCP warns of having no process group, on every save
    shapes = [
        Shape(name=f"{gib:g} GiB in 64 tensors", tensors=64, elements=int(gib * (1 << 30)) // 256),
        Shape(name=f"{tensors} tensors of 4 KiB", tensors=tensors, elements=1024),
    ]
    place = f"{url.rstrip('/')}/aiodcp-bench-{uuid.uuid4().hex}"
    try:
        results = [asyncio.run(run_shape(shape, place, repeat)) for shape in shapes]
    finally:
        asyncio.run(_clear(place))
    if as_json:
        print(json.dumps({"torch": torch.__version__, "cores": os.cpu_count(), "shapes": results}, indent=2))
        return
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, medians of {repeat} rounds, in {url}")
    for result in results:
        print(format_result(result))


def format_result(result: Mapping[str, Any]) -> str:
    """Return one shape's table as text, and the ratios that a promise is made of."""
    floors, rows = result["floors"], result["rows"]
    lines = ["", result["shape"]["name"], "-" * len(result["shape"]["name"])]
    for verb in ("put", "get"):
        lag = ms(floors[f"{verb}_lag_s"])
        lines.append(f"floor  bare client, {verb}{ms(floors[f'{verb}_s']):>12}   lag {lag}")
    header: Sequence[str] = ("held", "staged", "durable", "CPU", "lag", "memory", "load", "lag")
    lines += ["", f"{'':<20}" + "".join(f"{title:>12}" for title in header)]
    for name, row in rows.items():
        cells = [ms(row[key]) for key in ("held_s", "staged_s", "durable_s", "cpu_s", "lag_s")]
        cells += [f"{row['extra_mib']:.0f} MiB", ms(row["load_warm_s"]), ms(row["load_lag_s"])]
        lines.append(f"{name:<20}" + "".join(f"{cell:>12}" for cell in cells))
    lines += [f"{name:<20} not measured: {why}" for name, why in result["absent"].items()]
    ours = rows["aiodcp"]
    ratios = {
        "durable / bare PUTs": ours["durable_s"] / floors["put_s"],
        "load / bare GETs": ours["load_warm_s"] / floors["get_s"],
    }
    for name, row in rows.items():
        if name != "aiodcp":
            ratios[f"{name}, durable"] = row["durable_s"] / ours["durable_s"]
            ratios[f"{name}, load"] = row["load_warm_s"] / ours["load_warm_s"]
    extra = ours["extra_mib"] - result["shape"]["nbytes"] / (1 << 20)
    lines += ["", *(f"{name:<26}{ratio:>9.2f}x" for name, ratio in ratios.items())]
    return "\n".join([*lines, f"{'memory beyond the state':<26}{extra:>6.0f} MiB"])


if __name__ == "__main__":  # one system's memory: see extra_memory
    warnings.filterwarnings("ignore")
    system_name, count, size, place = sys.argv[1:]
    shape_of_one = Shape(name="memory", tensors=int(count), elements=int(size))
    print(asyncio.run(_measure_memory(system_name, shape_of_one, place)))

"""The benchmark for a state on an accelerator: what a save holds up, on the host and on the device.

Every system saves the same state once a round, right after a step of a small transformer that trains in bfloat16 on
the same device, and the training goes on until the save is durable. The rounds are interleaved; medians are shown, the
first round is not counted. As soon as a system says so the tensors count as free to change.

    held       the host's time in calls, from `save` until the tensors may change
    stall      by how much the longest step of the save is longer than a step alone, on the device's clock
    copied     from `save` until all bytes are in host memory; GB/s of that
    durable    from `save` until all is committed
    slowdown   of the steps during the save, on the device's clock, against steps alone
"""

from __future__ import annotations

import asyncio
import gc
import json
import shutil
import tempfile
import time
import warnings
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import torch
from torch import nn
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse
from torch.distributed.checkpoint.state_dict_saver import async_save as dcp_async_save

from ..._engine.host_memory import Arena
from ..._format.alignment import BLOCK, round_up
from ...errors import ArgumentError
from .hardware import HardwareLimits
from .systems import Aiodcp
from .tables import median_row, ms
from .workload import Shape, State

WIDTH, LAYERS, CONTEXT, BATCH = 1024, 8, 512, 8  # of the transformer: a step takes tens of milliseconds on an H100

STEPS_ALONE = 20


def make_shapes(gib: float, tensors: int) -> list[Shape]:
    """Return the two states that are saved: of so many GiB in 64 tensors, and of so many tensors of 16 KiB."""
    return [
        Shape(name=f"{gib:g} GiB in 64 tensors", tensors=64, elements=int(gib * (1 << 30)) // 64 // 4096 * 1024),
        Shape(name=f"{tensors} tensors of 16 KiB", tensors=tensors, elements=4 << 10),
    ]


@dataclass(slots=True, kw_only=True)
class DeviceCost:
    """Of one save: seconds, except `slowdown`, a ratio."""

    held_s: float
    stall_s: float
    copied_s: float
    durable_s: float
    slowdown: float


@dataclass(slots=True, kw_only=True)
class SaveUnderWay:
    """A save under way, whose tensors may change from now on: and its times."""

    copied: Callable[[], Awaitable[float]]  # when all was in host memory
    durable: Callable[[], Awaitable[float]]  # when all was committed


class DeviceSystem(Protocol):
    """Something that saves."""

    async def save(self, state: State, path: str) -> SaveUnderWay: ...
    async def close(self) -> None: ...


class DeviceAiodcp:
    """This library: the host awaits `staged`, or the device waits in a fence."""

    def __init__(self, *, fence: bool) -> None:
        self._fence = fence
        self._aiodcp = Aiodcp()

    async def save(self, state: State, path: str) -> SaveUnderWay:
        checkpointer = await self._aiodcp.open()
        if self._aiodcp.last is None:
            await checkpointer.prepare(state)
        await self._aiodcp.save(state, path)
        checkpoint = self._aiodcp.last
        assert checkpoint is not None
        if self._fence:
            checkpoint.fence()
        else:
            await checkpoint.staged

        async def ended(phase: str) -> float:
            await checkpoint.uploaded
            span = checkpoint.timeline.between(phase)
            assert span is not None
            return span[1]

        return SaveUnderWay(copied=lambda: ended("stage"), durable=lambda: ended("commit"))

    async def close(self) -> None:
        await self._aiodcp.close()


class DcpCached:
    """`dcp.async_save` with the writer's cache of pinned memory: staging is done when it returns."""

    def __init__(self, device: torch.device) -> None:
        self._writer: FileSystemWriter | None = None
        self._cache = device.type != "cpu"  # it is pinned memory

    async def save(self, state: State, path: str) -> SaveUnderWay:
        if self._writer is None:
            self._writer = FileSystemWriter(path, cache_staged_state_dict=self._cache)
        response = dcp_async_save(state, checkpoint_id=path, storage_writer=self._writer)
        assert not isinstance(response, AsyncSaveResponse)
        returned = time.perf_counter()

        async def copied() -> float:
            return returned

        return SaveUnderWay(copied=copied, durable=_ended_at(response))

    async def close(self) -> None:
        return


class PinnedStager:
    """`dcp.async_save` with a `DefaultStager` in its default options, that is kept: staged in a thread."""

    def __init__(self, device: torch.device) -> None:
        # The defaults need an accelerator: pinned memory, copies that do not block.
        options = StagingOptions() if device.type != "cpu" else StagingOptions(False, False, True, False)
        self._stager = DefaultStager(options)

    async def save(self, state: State, path: str) -> SaveUnderWay:
        response = dcp_async_save(state, checkpoint_id=path, async_stager=self._stager)
        assert isinstance(response, AsyncSaveResponse)
        copied, durable = _ended_at(response.staging_completion), _ended_at(response.upload_completion)
        response.staging_completion.result()
        return SaveUnderWay(copied=copied, durable=durable)

    async def close(self) -> None:
        self._stager.close()


def _ended_at(future: Any) -> Callable[[], Awaitable[float]]:
    ended: list[float] = []
    future.add_done_callback(lambda _: ended.append(time.perf_counter()))

    async def ended_at() -> float:
        await asyncio.wrap_future(future)
        return ended[0]

    return ended_at


def _systems(device: torch.device) -> dict[str, DeviceSystem]:
    return {
        "aiodcp, staged": DeviceAiodcp(fence=False),
        "aiodcp, fence": DeviceAiodcp(fence=True),
        "dcp, cached": DcpCached(device),
        "dcp + DefaultStager": PinnedStager(device),
    }


class Training:
    """Steps of a transformer, each timed by the device's clock."""

    def __init__(self, device: torch.device, *, width: int = WIDTH, layers: int = LAYERS) -> None:
        layer = nn.TransformerEncoderLayer(width, max(1, width // 64), 4 * width, dropout=0.0, batch_first=True)
        self._model = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False).to(device, torch.bfloat16)
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=1e-4)
        self._batch = torch.randn(BATCH, CONTEXT, width, device=device, dtype=torch.bfloat16)
        self._on_device = device.type != "cpu"

    def mark(self) -> Any:
        """How far the device has come: compare two with `seconds`."""
        if not self._on_device:
            return time.perf_counter()
        event = torch.Event(self._batch.device, enable_timing=True)
        event.record(torch.accelerator.current_stream(self._batch.device))
        return event

    def seconds(self, one: Any, other: Any) -> float:
        if not self._on_device:
            return float(other - one)
        other.synchronize()
        return float(one.elapsed_time(other)) / 1000

    def step(self) -> Any:
        """Train for one step; return the mark at its end."""
        self._model(self._batch).float().square().mean().backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return self.mark()

    def wait(self) -> None:
        if self._on_device:
            torch.accelerator.synchronize()

    def alone_s(self) -> float:
        marks = [self.step() for _ in range(STEPS_ALONE + 1)]
        return median(self.seconds(one, other) for one, other in pairwise(marks))


async def time_save(system: DeviceSystem, state: State, path: str, training: Training) -> DeviceCost:
    """Save once in the middle of training."""
    gc.collect()
    alone_s = training.alone_s()
    training.wait()
    marks = [training.step()]
    began = time.perf_counter()
    saving = await system.save(state, path)
    held_s = time.perf_counter() - began
    done = asyncio.ensure_future(saving.durable())
    while not done.done() or len(marks) < 3:
        marks.append(training.step())
        if len(marks) > 4:
            training.seconds(marks[-4], marks[-3])  # the host is not further ahead than a training loop gets
        await asyncio.sleep(0)
    steps = [training.seconds(one, other) for one, other in pairwise(marks)]
    return DeviceCost(
        held_s=held_s,
        stall_s=max(steps) - alone_s,
        copied_s=await saving.copied() - began,
        durable_s=await done - began,
        slowdown=sum(steps) / len(steps) / alone_s,
    )


def _copy_floor(state: State, arena: Arena, training: Training) -> float:
    """Seconds to bring as many bytes from the device to pinned memory, in one piece."""
    nbytes = sum(tensor.nbytes for tensor in state.values())
    source = torch.empty(nbytes, dtype=torch.uint8, device=next(iter(state.values())).device)
    training.wait()
    began = training.mark()
    arena.tensor[:nbytes].copy_(source, non_blocking=True)
    return training.seconds(began, training.mark())


async def run_shape(
    shape: Shape, device: torch.device, directory: Path, repeat: int, training: Training
) -> dict[str, Any]:
    """Measure one shape: floors and rows."""
    state = shape.make(device)
    arena = Arena(round_up(shape.nbytes, BLOCK))
    arena.populate()
    arena.pin(device)
    systems = _systems(device)
    costs: dict[str, list[DeviceCost]] = {name: [] for name in systems}
    failed: dict[str, str] = {}
    copies: list[float] = []
    floors = HardwareLimits()
    try:
        for _ in range(repeat + 1):
            copies.append(_copy_floor(state, arena, training))
            floors.measure_writes(arena, directory)
            for name, system in systems.items():
                if name in failed:
                    continue
                try:
                    costs[name].append(await time_save(system, state, str(directory / "save"), training))
                except Exception as error:
                    if isinstance(system, DeviceAiodcp):
                        raise
                    failed[name] = repr(error)  # torch 2.11 closes a stager after one save, say
                shutil.rmtree(directory / "save", ignore_errors=True)
    finally:
        for system in systems.values():
            await system.close()
    return {
        "shape": asdict(shape) | {"nbytes": shape.nbytes},
        "floors": {"copy_s": median(copies[1:])} | floors.medians(),
        "rows": {name: asdict(median_row(row[1:])) for name, row in costs.items() if name not in failed},
        "failed": failed,
    }


def run(device: str, directory: str, shapes: Sequence[Shape], *, repeat: int, as_json: bool) -> None:
    """Run the benchmark in a fresh folder of `directory` and print what it found."""
    warnings.filterwarnings("ignore")  # DCP warns of having no process group, on every save
    where = torch.device(device)
    if where.type != "cpu" and torch.accelerator.current_accelerator(check_available=True) is None:
        raise ArgumentError("device", f"torch finds no accelerator here: there is no {where}")
    if where.type != "cpu" and where.index is None:
        where = torch.device(where.type, torch.accelerator.current_device_index())
    training = Training(where) if where.type != "cpu" else Training(where, width=64, layers=1)
    results = []
    with tempfile.TemporaryDirectory(prefix="aiodcp-bench-", dir=directory) as folder:
        for shape in shapes:
            results.append(asyncio.run(run_shape(shape, where, Path(folder), repeat, training)))
    if as_json:
        print(json.dumps({"torch": torch.__version__, "device": _name(where), "shapes": results}, indent=2))
        return
    print(f"torch {torch.__version__}, {_name(where)}, medians of {repeat} rounds, in {directory}")
    for result in results:
        print(format_result(result))


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def format_result(result: Mapping[str, Any]) -> str:
    """Return one shape's table as text, and the ratios that a promise is made of."""
    nbytes = result["shape"]["nbytes"]
    floors, rows = result["floors"], result["rows"]
    lines = ["", result["shape"]["name"], "-" * len(result["shape"]["name"])]
    lines += [f"floor  {name.removesuffix('_s').replace('_', ' '):<16}{ms(s):>10}" for name, s in floors.items()]
    lines += [
        "",
        f"{'':<20}" + "".join(f"{title:>11}" for title in ("held", "stall", "copied", "GB/s", "durable", "slowdown")),
    ]
    for name, row in rows.items():
        cells = [ms(row["held_s"]), ms(row["stall_s"]), ms(row["copied_s"]), f"{nbytes / 1e9 / row['copied_s']:.1f}"]
        cells += [ms(row["durable_s"]), f"{row['slowdown']:.2f}x"]
        lines.append(f"{name:<20}" + "".join(f"{cell:>11}" for cell in cells))
    lines += [f"{name:<20}  failed: {error}" for name, error in result["failed"].items()]
    ours, theirs = rows["aiodcp, fence"], [row for name, row in rows.items() if not name.startswith("aiodcp")]
    raw = min(seconds for name, seconds in floors.items() if name.startswith("write"))
    ratios = {
        "copied / floor": ours["copied_s"] / floors["copy_s"],
        "durable / raw write": ours["durable_s"] / raw,
    }
    for what in ("held", "copied", "durable") if theirs else ():
        ratios[f"best dcp {what} / ours"] = min(row[f"{what}_s"] for row in theirs) / ours[f"{what}_s"]
    lines += ["", *(f"{name:<24}{ratio:>9.2f}x" for name, ratio in ratios.items())]
    return "\n".join(lines)

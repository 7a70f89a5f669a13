"""What many small tensors cost: processor time, and for how long the caller's event loop does not turn meanwhile.

Everything runs in one process: this library, then DCP, then safetensors, whose files are read as a whole and copied
into the tensors. Of this library's later saves and its loads the medians are shown, of lags the longest.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import tempfile
import time
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from .measure import Lag
from .systems import Aiodcp, Dcp, System
from .tables import ms
from .workload import Shape, State

ELEMENTS = 256  # float32: 1 KiB

IDLE_S = 0.5  # for which the lag of a loop is taken that does nothing else


@dataclass(slots=True, kw_only=True)
class Cost:
    """Seconds until the end, and of saves until `staged`; of all threads' processor time; that the loop stood still."""

    total_s: float = 0.0
    staged_s: float = 0.0
    cpu_s: float = 0.0
    lag_s: float = 0.0


@asynccontextmanager
async def _counted() -> AsyncIterator[Cost]:
    cost = Cost()
    gc.collect()  # nothing pays for the cycles that another has left
    async with Lag() as lag:
        began, cpu = time.perf_counter(), time.process_time()
        yield cost
        cost.total_s, cost.cpu_s = time.perf_counter() - began, time.process_time() - cpu
    cost.lag_s = lag.seconds


async def _save(system: System, state: State, path: Path) -> Cost:
    async with _counted() as cost:
        began = time.perf_counter()
        staged, uploaded = await system.save(state, str(path))
        await staged()
        cost.staged_s = time.perf_counter() - began
        await uploaded()
    return cost


async def _cost_of(call: Callable[[], Awaitable[object]]) -> Cost:
    async with _counted() as cost:
        await call()
    return cost


def _typical(costs: list[Cost]) -> Cost:
    row = Cost(**{name: median(getattr(each, name) for each in costs) for name in asdict(Cost())})
    row.lag_s = max(each.lag_s for each in costs)
    return row


async def measure(tensors: int, directory: Path, repeat: int) -> dict[str, Cost]:
    """Return what each kind of call costs, by its name, and what the hardware takes for the least of it."""
    state = Shape(name="many", tensors=tensors, elements=ELEMENTS).make()
    target = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    rows = {"an idle loop": await _cost_of(lambda: asyncio.sleep(IDLE_S))}
    copies = [await _cost_of(lambda: _copy(state, target)) for _ in range(repeat + 1)]
    rows["a bare copy"] = _typical(copies[1:])
    ours, theirs = Aiodcp(), Dcp()
    rows["aiodcp, entering"] = await _cost_of(ours.open)
    rows["aiodcp, first save"] = await _save(ours, state, directory / "first")
    later = [await _save(ours, state, directory / str(number)) for number in range(repeat)]
    rows["aiodcp, later saves"] = _typical(later)
    loads = [await _load(ours, state, target, directory / "first") for _ in range(repeat)]
    rows["aiodcp, loads"] = _typical(loads)
    rows["aiodcp, leaving"] = await _cost_of(ours.close)
    rows |= await _measure_preparing(state, directory / "prepared")
    rows["dcp.async_save"] = await _save(theirs, state, directory / "dcp")
    rows["dcp.load"] = await _load(theirs, state, target, directory / "dcp")
    rows |= await _measure_safetensors(state, target, directory / "safetensors", repeat)
    return rows


async def _measure_preparing(state: State, path: Path) -> dict[str, Cost]:
    """Measure what a first save is spared that was prepared for."""
    prepared = Aiodcp()
    checkpointer = await prepared.open()
    rows = {"aiodcp, preparing": await _cost_of(lambda: checkpointer.prepare(state, str(path)))}
    rows["aiodcp, save after that"] = await _save(prepared, state, path)
    await prepared.close()
    return rows


async def _load(system: System, state: State, target: State, path: Path) -> Cost:
    for tensor in target.values():
        tensor.zero_()
    cost = await _cost_of(lambda: system.load(target, str(path)))
    if any(not torch.equal(tensor, target[name]) for name, tensor in state.items()):
        raise AssertionError("what was loaded is not what was saved")
    return cost


async def _copy(state: State, target: State) -> None:
    torch._foreach_copy_(list(target.values()), list(state.values()))


async def _measure_safetensors(state: State, target: State, path: Path, repeat: int) -> dict[str, Cost]:
    try:
        from safetensors.torch import load_file, save_file
    except ImportError:
        return {}
    save_file(state, path)

    async def load() -> None:
        stored = load_file(path)
        for name, tensor in target.items():
            tensor.copy_(stored[name])

    return {"safetensors, and copies": _typical([await _cost_of(load) for _ in range(repeat)])}


def run(tensors: int, directory: str, *, repeat: int, as_json: bool) -> None:
    """Measure in a fresh folder of `directory`, and print what was found."""
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory(prefix="aiodcp-bench-", dir=directory) as folder:
        rows = asyncio.run(measure(tensors, Path(folder), repeat))
    if as_json:
        found = {"torch": torch.__version__, "cores": os.cpu_count(), "tensors": tensors}
        print(json.dumps(found | {"rows": {name: asdict(row) for name, row in rows.items()}}, indent=2))
    else:
        print(format_rows(tensors, {name: asdict(row) for name, row in rows.items()}))


def format_rows(tensors: int, rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the table as text."""
    lines = [
        f"{tensors} tensors of 1 KiB, torch {torch.__version__}, {os.cpu_count()} cores",
        f"{'':<24}{'time':>14}{'staged':>14}{'CPU':>14}{'longest lag':>14}",
    ]
    for name, row in rows.items():
        staged = ms(row["staged_s"]) if row["staged_s"] else ""
        cells = ms(row["total_s"]), staged, ms(row["cpu_s"]), ms(row["lag_s"])
        lines.append(f"{name:<24}" + "".join(f"{cell:>14}" for cell in cells))
    first, later, loads = (rows[f"aiodcp, {which}"] for which in ("first save", "later saves", "loads"))
    dcp_save, dcp_load = rows["dcp.async_save"], rows["dcp.load"]
    lines += [
        f"CPU of DCP's save / of the first, of later ones: {dcp_save['cpu_s'] / first['cpu_s']:.0f}x, "
        f"{dcp_save['cpu_s'] / later['cpu_s']:.0f}x; dcp.load / a load: {dcp_load['total_s'] / loads['total_s']:.0f}x",
        f"staged / a bare copy: {later['staged_s'] / rows['a bare copy']['total_s']:.2f}x",
    ]
    return "\n".join(lines)

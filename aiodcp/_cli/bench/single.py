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
import sys
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..._engine.host_memory import Arena
from .hardware import HardwareLimits
from .measure import BUSY_LIMIT_S, Measured, time_blocked, time_load, time_save, time_steps
from .memory import clear, extra_memory
from .systems import SYSTEMS, System
from .tables import median_row, ms
from .workload import Shape, State


async def run_shape(shape: Shape, directory: Path, repeat: int) -> dict[str, Any]:
    """Measure one shape: floors and rows."""
    state = shape.make()
    arena = Arena(-(-shape.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE)
    arena.populate()
    floors = HardwareLimits()
    rows: dict[str, list[Measured]] = {name: [] for name in SYSTEMS}
    systems = {name: make() for name, make in SYSTEMS.items()}
    try:
        for number in range(repeat + 1):
            print(f"{shape.name}: round {number} of {repeat}", file=sys.stderr)  # each takes up to two minutes
            if number == 1:  # the round before was to warm up
                floors, rows = HardwareLimits(), {name: [] for name in SYSTEMS}
            floors.measure(state, arena, directory)
            for name, system in systems.items():
                rows[name].append(await _run_once(system, state, directory))
    finally:
        for system in systems.values():
            await system.close()
    table = {name: median_row(rows[name]) for name in SYSTEMS}
    for name, row in table.items():
        row.extra_mib = extra_memory(name, shape, directory)
    return {
        "shape": asdict(shape) | {"nbytes": shape.nbytes},
        "floors": floors.medians(),
        "rows": {name: asdict(row) for name, row in table.items()},
    }


async def _run_once(system: System, state: State, directory: Path) -> Measured:
    path = str(directory / "idle")
    gc.collect()  # no system pays for the cycles that another has left
    row = await time_save(system, state, path)
    gc.collect()
    row.load_cold_s, row.load_warm_s, row.load_lag_s = await time_load(system, state, path)
    clear(directory)
    row.slowdown, row.busy_s = await time_steps(system, state, str(directory / "busy"))
    clear(directory)
    row.blocked_s, steps = await time_blocked(system, state, str(directory / "blocked"))
    row.staged_under, row.written_under = system.under(steps)
    clear(directory)
    return row


def run(directory: str, *, gib: float, tensors: int, repeat: int, as_json: bool) -> None:
    """Run the benchmark in a fresh folder of `directory` and print what it found.

    Args:
        directory: on the file system that is to be measured.
        gib: size of the state with few large tensors, in GiB: 64 of them.
        tensors: how many tensors of 4 KiB the other state has.
        repeat: rounds that count.
        as_json: print JSON instead of tables.
    """
    warnings.filterwarnings("ignore")  # DCP warns of having no process group, on every save
    large = Shape(name=f"{gib:g} GiB in 64 tensors", tensors=64, elements=int(gib * (1 << 30)) // 256)
    small = Shape(name=f"{tensors} tensors of 4 KiB", tensors=tensors, elements=1024)
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
    lines += ["", f"blocked: {covered} overlapped with the caller's steps"]
    lines += ["", *(f"{name:<20}{ratio:>9.2f}x" for name, ratio in ratios.items())]
    return "\n".join(lines)

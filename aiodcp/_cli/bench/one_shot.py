"""A tiny state on all ranks, saved once and loaded once: what connecting, planning and meeting take."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from ...checkpointer.checkpointer import Checkpointer
from .tables import median_row, ms
from .workload import State


@dataclass(slots=True, kw_only=True)
class OneShot:
    """Seconds, of the slowest rank each."""

    entering_s: float = 0.0
    saving_s: float = 0.0
    loading_s: float = 0.0
    leaving_s: float = 0.0


class _Clock:
    """Laps that begin on all ranks together."""

    def __init__(self) -> None:
        self._began = 0.0

    def begin(self) -> None:
        dist.barrier()
        self._began = time.perf_counter()

    def lap(self) -> float:
        took = torch.tensor([time.perf_counter() - self._began], dtype=torch.float64)
        dist.all_reduce(took, dist.ReduceOp.MAX)
        self.begin()
        return float(took)


def _aiodcp(state: State, target: State, path: Path) -> OneShot:
    async def measure() -> OneShot:
        clock = _Clock()
        clock.begin()
        async with Checkpointer() as checkpointer:
            entering_s = clock.lap()
            await (await checkpointer.save(state, path)).uploaded
            saving_s = clock.lap()
            await checkpointer.load(target, path)
            loading_s = clock.lap()
        return OneShot(entering_s=entering_s, saving_s=saving_s, loading_s=loading_s, leaving_s=clock.lap())

    return asyncio.run(measure())


def _dcp(state: State, target: State, path: Path) -> OneShot:
    clock = _Clock()
    clock.begin()
    dcp.save(state, checkpoint_id=path)
    saving_s = clock.lap()
    dcp.load(target, checkpoint_id=path)
    return OneShot(saving_s=saving_s, loading_s=clock.lap())


SYSTEMS: Mapping[str, Callable[[State, State, Path], OneShot]] = {"aiodcp": _aiodcp, "dcp.save": _dcp}


def measure(folder: Path, repeat: int) -> dict[str, dict[str, float]]:
    """Return the medians of some rounds, by system; the first round, which does not count, imports."""
    state = {f"w{number}": torch.full((16,), float(number)) for number in range(8)}
    found: dict[str, list[OneShot]] = {system: [] for system in SYSTEMS}
    for number in range(repeat + 1):
        for system, run in SYSTEMS.items():
            target = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
            found[system].append(run(state, target, folder / f"{system}-once-{number}"))
            if any(not torch.equal(tensor, target[name]) for name, tensor in state.items()):
                raise AssertionError("what was loaded is not what was saved")
    return {system: asdict(median_row(rows[1:])) for system, rows in found.items()}


def format_once(found: Mapping[str, Mapping[str, float]]) -> str:
    """Return the table as text."""
    title = "once, from entering to leaving: 8 tensors of 64 bytes"
    heads = ("entering", "saving", "loading", "leaving", "in all")
    lines = ["", title, "-" * len(title), f"{'':<24}" + "".join(f"{head:>18}" for head in heads)]
    for name, row in found.items():
        cells = [ms(seconds) if seconds else "" for seconds in row.values()]
        lines.append(f"{name:<24}" + "".join(f"{cell:>18}" for cell in (*cells, ms(sum(row.values())))))
    return "\n".join(lines)

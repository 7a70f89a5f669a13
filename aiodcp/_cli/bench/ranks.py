"""The benchmark under torchrun: what a save costs each rank, for sharded and for replicated state; and a tiny one.

All ranks save the same state with each system in turn, to a fresh directory each time; medians over the rounds.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse
from torch.distributed.checkpoint.state_dict_saver import async_save as dcp_async_save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from ...checkpointer.checkpointer import session_of
from . import one_shot
from .measure import time_save
from .systems import Aiodcp, Dcp, Waiter
from .tables import median_row, ms
from .workload import State

TENSORS = 64


@dataclass(slots=True, kw_only=True)
class RankCost:
    """Of one save on one rank: seconds, bytes, and messages between ranks (of DCP they are not known)."""

    held_s: float
    staged_s: float
    durable_s: float
    cpu_s: float
    staged_nbytes: int
    written_nbytes: int
    messages: int


class RankAiodcp(Aiodcp):
    """This library, which says what this rank has staged, and how many messages it has exchanged."""

    def messages(self) -> int:
        channel = session_of(self.opened).flows.channel if self.opened is not None else None
        return channel.messages if channel is not None else 0

    def staged_nbytes(self) -> int:
        assert self.last is not None
        return self.last.progress.bytes_staged


class _CountingStager(DefaultStager):
    """DCP's own stager, which counts the bytes of what it returns."""

    nbytes = 0

    def stage(self, state_dict: Any, **options: Any) -> Any:
        staged = super().stage(state_dict, **options)
        values = staged.values() if isinstance(staged, dict) else staged.result().values()
        self.nbytes = sum(_local(value).nbytes for value in values)
        return staged


class RankDcp(Dcp):
    """`dcp.async_save` as it comes, on a gloo group of its own."""

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo")
        self._stager = _CountingStager(StagingOptions(False, False, False, False))

    async def save(self, state: State, path: str) -> tuple[Waiter, Waiter]:
        response = dcp_async_save(dict(state), checkpoint_id=path, process_group=self._group, async_stager=self._stager)

        async def staged() -> None:
            return

        async def uploaded() -> None:
            future = response.upload_completion if isinstance(response, AsyncSaveResponse) else response
            await asyncio.wrap_future(future)

        return staged, uploaded

    def staged_nbytes(self) -> int:
        return self._stager.nbytes

    def messages(self) -> int:
        return 0

    async def close(self) -> None:
        self._stager.close()


def _local(value: Any) -> torch.Tensor:
    local: torch.Tensor = value.to_local() if hasattr(value, "to_local") else value
    return local


def make_state(kind: str, gib: float) -> dict[str, torch.Tensor]:
    """Make `gib` GiB of float32 in 64 tensors, replicated on all ranks or sharded over them."""
    size = dist.get_world_size()
    rows = max(size, int(gib * (1 << 30)) // (4 * TENSORS * 256))
    torch.manual_seed(0)
    whole = torch.randn(rows, 256)
    if kind == "replicated":
        return {f"w{number}": whole.clone() for number in range(TENSORS)}
    mesh = init_device_mesh("cpu", (size,))
    return {f"w{number}": distribute_tensor(whole, mesh, [Shard(0)]) for number in range(TENSORS)}


async def _measure(state: Mapping[str, Any], folder: Path, repeat: int) -> dict[str, list[RankCost]]:
    systems: dict[str, RankAiodcp | RankDcp] = {"aiodcp": RankAiodcp(), "dcp.async_save": RankDcp()}
    costs: dict[str, list[RankCost]] = {name: [] for name in systems}
    for round_ in range(repeat + 1):
        for name, system in systems.items():
            path = folder / f"{name}-{round_}"
            gc.collect()
            dist.barrier()
            before = system.messages()
            row = await time_save(system, dict(state), str(path))
            messages = system.messages() - before
            written = sum(file.stat().st_size for file in path.glob(f"__{dist.get_rank()}_*.distcp"))
            dist.barrier()
            if dist.get_rank() == 0:
                shutil.rmtree(path)
                os.sync()
            if round_ > 0:
                costs[name].append(
                    RankCost(
                        held_s=row.held_s,
                        staged_s=row.staged_s,
                        durable_s=row.durable_s,
                        cpu_s=row.cpu_s,
                        staged_nbytes=system.staged_nbytes(),
                        written_nbytes=written,
                        messages=messages,
                    )
                )
    for system in systems.values():
        await system.close()
    return costs


def run(directory: str, *, gib: float, repeat: int, as_json: bool) -> None:
    """Run the benchmark on every rank that torchrun has started; rank 0 prints.

    Args:
        directory: on the file system that is to be measured; the same for all ranks.
        gib: size of the state in all, in GiB.
        repeat: rounds that count.
        as_json: print JSON instead of tables.
    """
    warnings.filterwarnings("ignore")
    dist.init_process_group("gloo")
    folder = None
    try:
        rank, size = dist.get_rank(), dist.get_world_size()
        names: list[str | None] = [None]
        if rank == 0:
            names = [folder := tempfile.mkdtemp(prefix="aiodcp-bench-", dir=directory)]
        dist.broadcast_object_list(names)
        results = []
        for kind in ("sharded", "replicated"):
            state = make_state(kind, gib)
            costs = asyncio.run(_measure(state, Path(str(names[0])), repeat))
            mine = {name: asdict(median_row(rows)) for name, rows in costs.items()}
            gathered: list[Any] = [None] * size
            dist.all_gather_object(gathered, mine)
            nbytes = sum(_whole_nbytes(value) for value in state.values())
            results.append({"state": kind, "nbytes": nbytes, "ranks": gathered})
        once = one_shot.measure(Path(str(names[0])), repeat)
        if rank == 0:
            if as_json:
                found = {"torch": torch.__version__, "cores": os.cpu_count(), "states": results, "once": once}
                print(json.dumps(found, indent=2))
            else:
                print(f"torch {torch.__version__}, {size} ranks on {os.cpu_count()} cores, medians of {repeat} rounds")
                print("\n".join([*(format_result(result) for result in results), one_shot.format_once(once)]))
    finally:
        if folder is not None:
            shutil.rmtree(folder)
        dist.destroy_process_group()


def _whole_nbytes(value: torch.Tensor) -> int:
    return value.numel() * value.element_size()


def format_result(result: Mapping[str, Any]) -> str:
    """Return the table of one state as text: a line a rank, and for all the slowest rank's seconds and summed bytes."""
    title = f"{result['state']}: {result['nbytes'] / (1 << 20):.0f} MiB in {TENSORS} tensors"
    heads = ("held", "staged", "durable", "CPU", "bytes staged", "written", "messages", "staged / one copy")
    lines = ["", title, "-" * len(title), f"{'':<24}" + "".join(f"{head:>18}" for head in heads)]
    for name in result["ranks"][0]:
        rows = [rank[name] for rank in result["ranks"]]
        times = ("held_s", "staged_s", "durable_s", "cpu_s")
        total = {key: max(row[key] for row in rows) for key in (*times, "messages")}
        total |= {key: sum(row[key] for row in rows) for key in ("staged_nbytes", "written_nbytes")}
        for label, row in (*((f"rank {rank}", row) for rank, row in enumerate(rows)), ("all", total)):
            cells = [ms(row[key]) for key in times]
            cells += [f"{row[key] / (1 << 20):.1f} MiB" for key in ("staged_nbytes", "written_nbytes")]
            cells.append(f"{row['messages']:.0f}" if row["messages"] else "")
            cells.append(f"{row['staged_nbytes'] / result['nbytes']:.2f}x")
            lines.append(f"{name + ' ' + label:<24}" + "".join(f"{cell:>18}" for cell in cells))
    return "\n".join(lines)

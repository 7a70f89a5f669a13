"""What planning costs the coordinator of many ranks, simulated in one process: no bytes of tensors, only plans.

Each rank has 500 tensors, of which 400 are sharded over all ranks and 100 replicated. What ranks send is pickled
beforehand; what the coordinator does with it is timed, with this library and with DCP's planner on the same plans:

    first save   read all plans, plan globally, make what each rank gets and what `.metadata` will be made of
    later saves  aiodcp: the three agreements of a save, on rows of integers. DCP: the same again

Filling in `.metadata`, which in DCP comes with the writing, has a line of its own.
"""

from __future__ import annotations

import json
import pickle
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed.checkpoint.planner as dcp
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from ..._distributed.votes import PhaseVote, RankState, Row, padded
from ..._format.dcp import KeyPath
from ..._save.plan import LocalPlan
from ..._save.plan_cache import LocalMessage, message_of, plan_for_all
from ..._save.start_agreement import SaveProposal, agree_on_save
from ..._save.write_agreement import WriteProposal, agree_on_write
from .tables import ms

SHARDED, REPLICATED = 400, 100

ROWS, COLUMNS = 8, 64  # of each rank's shard


def local_items(rank: int, ranks: int) -> list[WriteItem]:
    """Return what DCP's planner makes of one rank's 500 tensors."""
    items = []
    for number in range(SHARDED + REPLICATED):
        sharded = number < SHARDED
        offsets = torch.Size([rank * ROWS if sharded else 0, 0])
        size = torch.Size([ranks * ROWS if sharded else ROWS, COLUMNS])
        fqn = f"model.layers.{number}.weight"
        data = TensorWriteData(
            chunk=ChunkStorageMetadata(offsets=offsets, sizes=torch.Size([ROWS, COLUMNS])),
            properties=TensorProperties(dtype=torch.float32),
            size=size,
        )
        kind = WriteItemType.SHARD if sharded else WriteItemType.TENSOR
        items.append(WriteItem(index=MetadataIndex(fqn, offsets), type=kind, tensor_data=data))
    return items


def measure(ranks: int) -> dict[str, dict[str, float]]:
    """Return seconds and bytes of the coordinator, for each system and each kind of save."""
    ours, theirs = [], []
    mine: LocalMessage = None  # type: ignore[assignment]
    for rank in range(ranks):
        items = local_items(rank, ranks)
        paths: dict[str, KeyPath] = {item.index.fqn: tuple(item.index.fqn.split(".")) for item in items}
        sources = list(range(len(items)))
        local = LocalPlan(items=items, sources=sources, frozen=set(), paths=paths)
        message = message_of(local, is_table=True)
        mine = message if rank == 0 else mine
        ours.append(message.pack(rank == 0 or message.digest != mine.digest))
        theirs.append(pickle.dumps(dcp.SavePlan(items, planner_data=paths)))

    def dcp_plan() -> int:
        planner = DefaultSavePlanner()
        planner.set_up_planner({}, is_coordinator=True)
        plans, metadata = planner.create_global_plan([pickle.loads(each) for each in theirs])
        return sum(len(pickle.dumps(plan)) for plan in plans) + len(pickle.dumps(metadata)) * (ranks - 1)

    dcp_s, dcp_sent = _timed(dcp_plan)
    first_s, (_, manifest, parts) = _timed(lambda: plan_for_all(ours, mine, None, 0))
    assert manifest is not None
    proposals: tuple[Row, ...] = (
        SaveProposal(plans=[1], id_digest=7, save_id="0" * 32, has_planner=False, on_disagreement="warn").to_row(),
        WriteProposal(is_moved=False, digest=0, table_crc=7).to_row(),
        [],
    )
    heartbeats = [_heartbeats(proposal, ranks) for proposal in proposals]
    row_nbytes = heartbeats[0].element_size() * heartbeats[0].shape[1]

    def agree() -> int:
        answered = 0
        for table, decide in zip(heartbeats, (agree_on_save, _settle, None), strict=True):
            answered += len(PhaseVote(60.0, decide).decide(table.tolist())) + 1
        return answered

    later_s, answered = min(_timed(agree) for _ in range(5))
    no_ranges: list[list[Any]] = [[] for _ in range(ranks)]
    render_s, metadata = _timed(lambda: manifest.render("checkpoint", "0" * 32, [no_ranges]))
    return {
        "aiodcp, first save": {
            "seconds": first_s,
            "received": sum(map(len, ours)) / ranks,
            "sent": sum(map(len, parts)) / ranks,
        },
        "dcp, every save": {
            "seconds": dcp_s,
            "received": sum(map(len, theirs)) / ranks,
            "sent": dcp_sent / ranks,
        },
        "aiodcp, later saves": {
            "seconds": later_s,
            "received": float(len(heartbeats) * row_nbytes),
            "sent": 8.0 * answered,
        },
        "aiodcp, .metadata": {"seconds": render_s, "received": 0.0, "sent": len(metadata) / ranks},
    }


def _heartbeats(proposal: Row, ranks: int) -> torch.Tensor:
    """Return a row for each rank, which is done: call, kind, step and name of the phase, state, proposal."""
    row = [0, 0, 0, 0, RankState.DONE, *padded(proposal)]
    return torch.tensor([row] * ranks, dtype=torch.int64)


def _settle(table: list[Row]) -> Row:
    return agree_on_write(table)[0].to_row()


def _timed(function: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = function()
    return time.perf_counter() - began, result


def run(ranks: int, *, as_json: bool) -> None:
    """Print what the coordinator of so many simulated ranks does for a save."""
    warnings.filterwarnings("ignore")
    rows = measure(ranks)
    if as_json:
        print(json.dumps({"ranks": ranks, "tensors": SHARDED + REPLICATED, "rows": rows}, indent=2))
    else:
        print(format_rows(ranks, rows))


def format_rows(ranks: int, rows: Mapping[str, Mapping[str, float]]) -> str:
    """Return the table as text."""
    lines = [
        f"the coordinator of {ranks} ranks with {SHARDED + REPLICATED} tensors each",
        f"{'':<24}{'time':>14}{'bytes received':>18}{'sent, a rank':>18}",
    ]
    for name, row in rows.items():
        lines.append(f"{name:<24}{ms(row['seconds']):>14}{row['received']:>18.0f}{row['sent']:>18.0f}")
    ratio = rows["dcp, every save"]["seconds"] / rows["aiodcp, later saves"]["seconds"]
    first = rows["aiodcp, first save"]["seconds"] / rows["dcp, every save"]["seconds"]
    return "\n".join([*lines, f"later saves take 1/{ratio:.0f} of DCP's time, the first takes {first:.2f} of it"])

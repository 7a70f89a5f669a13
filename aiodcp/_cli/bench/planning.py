"""What planning costs the coordinator of many ranks, simulated in one process: no bytes of tensors, only plans.

Each rank has 500 tensors, of which 400 are sharded over all ranks and 100 replicated. What ranks send is pickled
beforehand; what the coordinator does with it is timed, with this library and with DCP's planner on the same plans:

    first save   read all plans, plan globally, make what each rank gets and what `.metadata` will be made of
    later saves  aiodcp: the three agreements of a save, on rows of integers. DCP: the same again
    .metadata    fill it in, which in DCP comes with the writing
    a load       one rank, from the bytes that it is sent until it knows where its own pieces lie; with DCP it
                 unpickles all of `.metadata`, and has not begun to plan
"""

from __future__ import annotations

import json
import pickle
import resource
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed.checkpoint.planner as dcp
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from ..._distributed.votes import PhaseVote, RankState, Row, padded
from ..._format.dcp import KeyPath, TensorStorageMetadata
from ..._format.index_reader import read_index, without_pickle
from ..._format.indexed_metadata import chunks_over
from ..._format.item_tables import ItemTables
from ..._format.seal import open_seal, seal
from ..._save.manifest import ManifestTemplate
from ..._save.plan import LocalPlan
from ..._save.plan_cache import LocalMessage, message_of, plan_for_all
from ..._save.start_agreement import PlanProposal, SaveProposal, agree_on_save
from ..._save.write_agreement import WriteProposal, agree_on_write
from ..text_tables import size
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
    """Return what the coordinator of so many ranks does for a save, and one rank for a load, by system and kind.

    DCP's rows are there up to `MOST_FOR_DCP` ranks.
    """
    ours, theirs = [], []
    mine: LocalMessage = None  # type: ignore[assignment]
    for rank in range(ranks):
        items = local_items(rank, ranks)
        paths: dict[str, KeyPath] = {item.index.fqn: tuple(item.index.fqn.split(".")) for item in items}
        sources = list(range(len(items)))
        local = LocalPlan(items=items, sources=sources, frozen=set(), paths=paths)
        message = message_of(local, "table", rank)
        mine = message if rank == 0 else mine
        ours.append(message.without_table if message.digest == mine.digest else message.whole)
        if ranks <= MOST_FOR_DCP:
            theirs.append(pickle.dumps(dcp.SavePlan(items, planner_data=paths)))
    before = _peak_nbytes()
    first_s, (_, manifest, parts) = _timed(lambda: plan_for_all(ours, mine, None, 0))
    peak = _peak_nbytes() - before
    assert manifest is not None
    proposals: tuple[Row, ...] = (
        SaveProposal(
            plan=PlanProposal(kept=[1]), id_digest=7, has_planner=False, overwrites=True, on_disagreement="warn"
        ).to_row(),
        WriteProposal(is_moved=False, digest=0, table_crc=7, ranges_nbytes=0).to_row(),
        [],
    )
    heartbeats = [_heartbeats(proposal, ranks) for proposal in proposals]
    row_nbytes = heartbeats[0].element_size() * heartbeats[0].shape[1]

    agree = partial(agree_on_save, coordinator=0, save_id=SAVE_ID)

    def decide_all() -> int:
        answered = 0
        for table, decide in zip(heartbeats, (agree, _settle, None), strict=True):
            answered += len(PhaseVote(60.0, decide).decide(table.tolist())) + 1
        return answered

    later_s, answered = min(_timed(decide_all) for _ in range(5))
    no_ranges: list[list[Any]] = [[] for _ in range(ranks)]
    render_s, metadata = _timed(lambda: _render(manifest, no_ranges))
    sent = without_pickle(metadata)
    wanted = local_items(ranks // 2, ranks)
    load_s, found = _timed(lambda: _find_pieces(sent, wanted))
    assert found == SHARDED + REPLICATED
    rows = {
        "aiodcp, first save": _row(first_s, sum(map(len, ours)) / ranks, max(map(len, parts)), peak),
        "aiodcp, later saves": _row(later_s, float(len(heartbeats) * row_nbytes), 8.0 * answered),
        "aiodcp, .metadata": _row(render_s, 0.0, len(metadata)),
        "aiodcp, a load": _row(load_s, len(sent), 0.0),
    }
    if theirs:
        rows |= _measure_dcp(theirs, metadata)
    return rows


MOST_FOR_DCP = 1024
"""Ranks up to which DCP's planner is measured, too: there it takes half a minute, and twice that for twice as many."""

SAVE_ID = "0" * 32


def _row(seconds: float, received: float, sent: float, peak: float = 0.0) -> dict[str, float]:
    return {"seconds": seconds, "received": received, "sent": sent, "peak": peak}


def _measure_dcp(plans: list[bytes], metadata: bytes) -> dict[str, dict[str, float]]:
    ranks = len(plans)

    def plan() -> int:
        planner = DefaultSavePlanner()
        planner.set_up_planner({}, is_coordinator=True)
        planned, metadata = planner.create_global_plan([pickle.loads(each) for each in plans])
        return max(len(pickle.dumps(plan)) for plan in planned) + len(pickle.dumps(metadata))

    before = _peak_nbytes()
    save_s, sent = _timed(plan)
    peak = _peak_nbytes() - before
    pickled = bytes(open_seal(metadata)[0])
    load_s, _ = _timed(lambda: pickle.loads(pickled))
    return {
        "dcp, every save": _row(save_s, sum(map(len, plans)) / ranks, sent, peak),
        "dcp, a load": _row(load_s, len(pickled), 0.0),
    }


def _render(manifest: ManifestTemplate, ranges: list[list[Any]]) -> bytes:
    """Return `.metadata`, as the coordinator commits it."""
    pickled, index = manifest.render("checkpoint", SAVE_ID, [ranges]), manifest.index(SAVE_ID, [ranges])
    return seal(pickled, b"", [0] * len(ranges), index)


def _find_pieces(sent: bytes, wanted: Sequence[WriteItem]) -> int:
    """Find, on one rank, what it reads of the tensors that it wants, given what the coordinator has sent it."""
    metadata, found = read_index(sent, "")
    tables, files = ItemTables(metadata, found.tables), set()
    count = 0
    for item in wanted:
        entry = metadata.state_dict_metadata[item.index.fqn]
        assert isinstance(entry, TensorStorageMetadata)
        assert item.tensor_data is not None
        for chunk in chunks_over(entry, item.tensor_data.chunk):
            place = metadata.find(item.index.fqn, chunk.offsets)
            assert place is not None
            files.add(place.relative_path)
            count += 1
    assert all(map(tables.nbytes, files))
    return count


def _peak_nbytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


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
        f"the coordinator of {ranks} ranks with {SHARDED + REPLICATED} tensors each; of a load, one rank",
        f"{'':<24}{'time':>14}{'bytes received':>18}{'sent, at most':>18}{'peak of memory':>18}",
    ]
    for name, row in rows.items():
        peak = size(row["peak"]) if row["peak"] else ""
        lines.append(f"{name:<24}{ms(row['seconds']):>14}{row['received']:>18.0f}{row['sent']:>18.0f}{peak:>18}")
    if "dcp, every save" in rows:
        theirs = rows["dcp, every save"]["seconds"]
        later, first = (theirs / rows[f"aiodcp, {which}"]["seconds"] for which in ("later saves", "first save"))
        lines.append(f"later saves take 1/{later:.0f} of DCP's time, the first 1/{first:.0f}")
    else:
        lines.append(f"DCP's planner is measured up to {MOST_FOR_DCP} ranks")
    return "\n".join(lines)

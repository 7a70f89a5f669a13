"""Who writes what. Pure: no files, no clock.

It follows DCP's own planner, `DefaultSavePlanner`, once for each structure of state dict, but for the question who
writes what several ranks hold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any

import torch
import torch.distributed.checkpoint.planner as dcp
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner, create_default_global_save_plan
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType
from torch.distributed.tensor import DTensor

from .._format.chunks import is_whole
from .._format.dcp import KeyPath, TensorStorageMetadata
from .._format.dtypes import NOT_COPIED
from .._format.extension import Containers
from .._format.layout import lay_out
from .._state.capture import Capture, nothing_to_save
from .._state.plain_tensors import PLAIN_TENSORS
from .._state.sharding import ShardedTensor, holds_shards, local_tensor
from ..errors import CaptureError
from .comparison import Comparison
from .cutting import Cut, cut_item
from .plan import FROZEN_NBYTES, GlobalPlan, LocalPlan, Share, WritePlan, sharded_kind, tensor_kind
from .sharing import Key, SharedItems, SharingPlan, nbytes_of, plan_sharing


def plan_local(captured: Capture, piece_nbytes: int | None = None) -> LocalPlan:
    """Plan this rank's part with DCP's planner.

    Args:
        captured: the state.
        piece_nbytes: of tensors in one file, at most; larger ones are cut. None where each rank has one file.

    Raises:
        CaptureError: two leaves have one name, or a leaf is of a kind that cannot be saved.
    """
    if captured.planned is not None:
        items = captured.planned.items
        return LocalPlan(
            items=items,
            sources=list(range(len(items))),
            frozen=set(captured.frozen),
            paths={},
            planner_data=captured.planned.planner_data,
            piece_nbytes=piece_nbytes,
        )
    leaves: dict[str, Any] = {}
    for index, fqn in enumerate(captured.fqns):
        if fqn in leaves:
            raise CaptureError(fqn, "two values of the state dict have this name")
        leaves[fqn] = _plannable(captured.leaf(index))
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(leaves, is_coordinator=True)
    try:
        items = planner.create_local_plan().items
    except Exception as error:
        raise _name_unplannable(leaves, error) from error
    index_of = {fqn: index for index, fqn in enumerate(captured.fqns)}
    kept: list[WriteItem] = []
    sources: list[int] = []
    cuts: list[Cut] = []
    frozen: set[int] = set()
    seen: dict[int, int] = {}
    for item in items:
        index = source = index_of[item.index.fqn]
        if index in captured.frozen:
            frozen.add(len(kept))
        elif index in captured.parts:  # the items of a ShardedTensor are in the order of its local shards
            source = captured.parts[index] + seen.get(index, 0)
            seen[index] = seen.get(index, 0) + 1
        if item.tensor_data is not None:
            held, sizes = captured.values[source], item.tensor_data.chunk.sizes
            if held.shape != sizes:
                problem = f"this rank's shard has shape {tuple(held.shape)}, but its placements imply {tuple(sizes)}"
                raise CaptureError(item.index.fqn, problem)
            item.tensor_data.properties.dtype = held.dtype
        parts = [] if piece_nbytes is None else cut_item(item, captured.values[source], piece_nbytes)
        for smaller, part in parts:
            kept.append(smaller)
            sources.append(len(captured.values) + len(cuts))
            cuts.append(Cut(source, part))
        if not parts:
            kept.append(item)
            sources.append(source)
    return LocalPlan(
        items=kept,
        sources=sources,
        frozen=frozen,
        paths=dict(zip(captured.fqns, captured.paths, strict=True)),
        containers=captured.containers,
        cuts=cuts,
        piece_nbytes=piece_nbytes,
    )


def _name_unplannable(leaves: Mapping[str, Any], error: Exception) -> CaptureError:
    """Find out which value the planner cannot plan."""
    for fqn, value in leaves.items():
        planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner({fqn: value}, is_coordinator=True)
        try:
            planner.create_local_plan()
        except Exception as cause:
            return CaptureError(fqn, f"a {type(value).__name__} cannot be planned: {cause!r}")
    return CaptureError("", f"cannot be planned: {error!r}")


def plan_global(locals_: Sequence[LocalPlan], planner: dcp.SavePlanner | None = None) -> GlobalPlan:
    """Share the work out among all ranks. Every item is written by one of those that hold it.

    Args:
        locals_: all ranks' plans.
        planner: the caller's own, which then decides.

    Raises:
        CaptureError: the ranks hold different tensors under one name, or parts that do not make up a whole.
    """
    if len({local.piece_nbytes for local in locals_}) > 1:
        problem = "the ranks cut files at different sizes: max_host_bytes and storage must be the same on all of them"
        raise CaptureError("", problem)
    if planner is not None:
        return _plan_global_with(planner, locals_)
    holders = _find_holders(locals_)
    if not holders and not any(local.containers.empty for local in locals_):
        raise nothing_to_save()
    kept = _share_out(locals_, holders)
    finished, metadata = create_default_global_save_plan(
        [dcp.SavePlan([plan.items[number] for number in numbers]) for plan, numbers in zip(locals_, kept, strict=True)]
    )
    for fqn, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata) and not is_whole(entry):
            chunks = ", ".join(f"{tuple(each.sizes)} at {tuple(each.offsets)}" for each in entry.chunks[:8])
            raise CaptureError(fqn, f"the ranks' shards do not cover its shape exactly: {tuple(entry.size)}: {chunks}")
    paths: dict[str, KeyPath] = {}
    shares: list[Share] = []
    for local, numbers, plan in zip(locals_, kept, finished, strict=True):
        paths.update(local.paths)
        shares.append(_make_share(local, numbers, plan.items))
    return GlobalPlan(
        shares=shares,
        kept=kept,
        plans=[],
        metadata=metadata,
        paths=paths,
        containers=_join_containers(locals_, paths),
        sharing=_plan_sharing(locals_, holders, kept),
    )


def _find_holders(locals_: Sequence[LocalPlan]) -> dict[Key, list[tuple[int, int]]]:
    """Return of each item which ranks hold it, each with its own number of it."""
    holders: dict[Key, list[tuple[int, int]]] = {}
    for rank, plan in enumerate(locals_):
        for number, item in enumerate(plan.items):
            holders.setdefault((item.index.fqn, item.index.offset), []).append((rank, number))
    return holders


def _join_containers(locals_: Sequence[LocalPlan], paths: Mapping[str, KeyPath]) -> Containers:
    """Join what all ranks say; what is empty on one rank need not be so on another."""
    filled = {path[:length] for path in paths.values() for length in range(1, len(path))}
    empty = {path: None for local in locals_ for path in local.containers.empty if path not in filled}
    int_keys = {path: None for local in locals_ for path in local.containers.int_keys}
    return Containers(list(empty), list(int_keys))


def _plan_sharing(
    locals_: Sequence[LocalPlan], holders: Mapping[Key, Sequence[tuple[int, int]]], kept: Sequence[Sequence[int]]
) -> SharingPlan:
    writers: dict[Key, int] = {}
    sizes: dict[Key, int] = {}
    for rank, numbers in enumerate(kept):
        for number in numbers:
            item = locals_[rank].items[number]
            writers[item.index.fqn, item.index.offset] = rank
            sizes[item.index.fqn, item.index.offset] = nbytes_of(item)
    written = {key: held for key, held in holders.items() if key in writers}  # a planner may leave something out
    return plan_sharing(written, writers, sizes, len(locals_))


def _plan_global_with(planner: dcp.SavePlanner, locals_: Sequence[LocalPlan]) -> GlobalPlan:
    plans, metadata = planner.create_global_plan(
        [dcp.SavePlan(plan.items, planner_data=plan.planner_data) for plan in locals_]
    )
    kept: list[list[int]] = []
    for rank, (local, plan) in enumerate(zip(locals_, plans, strict=True)):
        numbers = {(item.index.fqn, item.index.offset): number for number, item in enumerate(local.items)}
        for item in plan.items:
            if (item.index.fqn, item.index.offset) not in numbers:
                raise CaptureError(
                    item.index.fqn, f"the global plan gives rank {rank} an item that is not in its local plan"
                )
        kept.append([numbers[item.index.fqn, item.index.offset] for item in plan.items])
    shares = [
        _make_share(local, numbers, plan.items) for local, numbers, plan in zip(locals_, kept, plans, strict=True)
    ]
    return GlobalPlan(
        shares=shares,
        kept=kept,
        plans=plans,
        metadata=metadata,
        paths=metadata.planner_data,
        containers=Containers(),
        sharing=_plan_sharing(locals_, _find_holders(locals_), kept),
    )


def _share_out(locals_: Sequence[LocalPlan], holders: Mapping[Key, Sequence[tuple[int, int]]]) -> list[list[int]]:
    """Decide for every rank which of its items it writes: each rank about as many bytes.

    `dedup_save_plans` of DCP counts every chunk with the bytes of its whole tensor, and the items in their order.
    Here what only one rank holds is counted first, then the rest from the largest on goes to who has least.
    """
    kept: list[list[int]] = [[] for _ in locals_]
    load = [0] * len(locals_)
    shared: list[tuple[int, Sequence[tuple[int, int]]]] = []
    described: dict[str, tuple[int, Any]] = {}
    for (fqn, _), held in holders.items():
        rank, number = held[0]
        item = locals_[rank].items[number]
        nbytes = nbytes_of(item) if item.tensor_data is not None else FROZEN_NBYTES
        _refuse_different(fqn, locals_, held, described)
        if len(held) == 1:
            kept[rank].append(number)
            load[rank] += nbytes
        else:
            shared.append((nbytes, held))
    shared.sort(key=itemgetter(0), reverse=True)
    for nbytes, held in shared:
        rank, number = min(held, key=lambda holder: load[holder[0]])
        kept[rank].append(number)
        load[rank] += nbytes
    for numbers in kept:
        numbers.sort()
    return kept


def _refuse_different(
    fqn: str, locals_: Sequence[LocalPlan], held: Sequence[tuple[int, int]], described: dict[str, tuple[int, Any]]
) -> None:
    """Refuse a name under which the ranks hold tensors of different dtypes or shapes, or other values."""
    for rank, number in held:
        data = locals_[rank].items[number].tensor_data
        what = (data.properties.dtype, tuple(data.size)) if data is not None else "no tensor"
        first, known = described.setdefault(fqn, (rank, what))
        if known != what:
            raise CaptureError(fqn, f"rank {first} has {known}, rank {rank} has {what}")
        if data is not None and data.chunk.sizes != locals_[held[0][0]].items[held[0][1]].tensor_data.chunk.sizes:  # type: ignore[union-attr]
            raise CaptureError(fqn, f"ranks {held[0][0]} and {rank} hold parts of different sizes at {data.chunk}")


def _make_share(local: LocalPlan, numbers: Sequence[int], items: Sequence[WriteItem]) -> Share:
    staged = [item for number, item in zip(numbers, items, strict=True) if number not in local.frozen]
    frozen = [item for number, item in zip(numbers, items, strict=True) if number in local.frozen]
    layout = lay_out([chunk_of(item) for item in staged], local.piece_nbytes)
    return Share(staged=staged, frozen=frozen, layout=layout)


def finish_plan(
    captured: Capture, local: LocalPlan, kept: Sequence[int], shared: SharedItems, share: Share | None = None
) -> WritePlan:
    """Return what this rank writes, given which items of its local plan are its own, and which others hold too."""
    if share is None:
        share = _make_share(local, kept, [local.items[number] for number in kept])
    count = len(captured.fqns)
    return WritePlan(
        fqns=captured.fqns,
        kinds=[
            sharded_kind(captured, index) if index in captured.sharded else tensor_kind(value)
            for index, value in enumerate(captured.values[:count])
        ],
        paths=captured.paths,
        share=share,
        staged=[local.sources[number] for number in kept if number not in local.frozen],
        frozen=[local.sources[number] for number in kept if number in local.frozen],
        frozen_indices=set(captured.frozen),
        items=None if captured.planned is None else captured.planned.items,
        containers=captured.containers,
        comparison=Comparison(
            fqns=[local.items[number].index.fqn for number in shared.numbers],
            sources=[local.sources[number] for number in shared.numbers],
            frozen=[number in local.frozen for number in shared.numbers],
            groups=shared.groups,
            whole=shared.whole,
            weights=shared.weights,
        ),
        cuts=local.cuts,
        piece_nbytes=local.piece_nbytes,
    )


def _plannable(value: Any) -> Any:
    """Return what the planner may see of a value: it asks for what not every kind of tensor and dtype can answer."""
    if isinstance(value, ShardedTensor) or not isinstance(value, torch.Tensor):
        return value
    if isinstance(value, DTensor):
        if holds_shards(value) or type(local_tensor(value)) in PLAIN_TENSORS:
            return value
        stand_in = torch.empty(local_tensor(value).shape, dtype=value.dtype, device="meta")
        return DTensor.from_local(
            stand_in, value.device_mesh, value.placements, run_check=False, shape=value.shape, stride=value.stride()
        )
    if value.dtype in NOT_COPIED or str(value.dtype).startswith("torch.bits"):
        return torch.empty(value.shape, dtype=torch.uint8, device="meta")
    if type(value) not in PLAIN_TENSORS and value.layout is torch.strided:
        return torch.empty(value.shape, dtype=value.dtype, device="meta")
    return value


def chunk_of(item: WriteItem) -> tuple[torch.dtype, tuple[int, ...]]:
    """Return dtype and shape of the tensor that an item writes."""
    assert item.type is not WriteItemType.BYTE_IO
    assert item.tensor_data is not None
    return item.tensor_data.properties.dtype, tuple(item.tensor_data.chunk.sizes)

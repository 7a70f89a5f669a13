"""Who writes what. Pure: no files, no clock.

A rank's own part follows DCP's planner, `DefaultSavePlanner`, once for each structure of state dict; `table_plan` makes
one plan of all parts, unless the caller has a planner that does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint.planner as dcp
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor

from .._engine.gc_pause import gc_paused
from .._engine.gil_fairness import LongList, let_go, to_dict
from .._format.dcp import ChunkStorageMetadata, MetadataIndex, TensorProperties
from .._format.dtypes import NOT_COPIED
from .._format.extension import Containers
from .._format.layout import lay_out
from .._state.capture import Capture
from .._state.plain_tensors import PLAIN_TENSORS
from .._state.sharding import ShardedTensor, holds_shards, local_tensor
from ..errors import CaptureError
from .comparison import Comparison
from .cutting import Cut, cut_item
from .plan import GlobalPlan, LocalPlan, Share, WritePlan
from .sharing import SharedItems, SharingPlan, nbytes_of, plan_sharing


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
    kept: list[WriteItem] = []
    sources: list[int] = []
    cuts: list[Cut] = []
    frozen: set[int] = set()
    seen: dict[int, int] = {}
    for index, item in _items_of(captured):
        source = index
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
        paths=to_dict(captured.fqns, captured.paths),
        containers=captured.containers,
        cuts=cuts,
        piece_nbytes=piece_nbytes,
    )


def _items_of(captured: Capture) -> Iterator[tuple[int, WriteItem]]:
    """Yield what the planner makes of each leaf, with the number of the leaf.

    Of plain tensors, which may be many, it is made here, and equal parts are shared.

    Raises:
        CaptureError: two leaves have one name, or one cannot be planned.
    """
    leaves: dict[str, Any] = {}  # those that the planner is asked for
    known: dict[tuple[Any, ...], TensorWriteData] = {}
    made: list[list[WriteItem]] = []
    index_of = to_dict(captured.fqns, range(len(captured.fqns)))
    if len(index_of) < len(captured.fqns):
        [(twice, _)] = Counter(captured.fqns).most_common(1)
        raise CaptureError(twice, "two values of the state dict have this name")
    for index, fqn in enumerate(captured.fqns):
        value = captured.leaf(index)
        if type(value) in PLAIN_TENSORS and value.layout is torch.strided:
            made.append([_plain_item(fqn, value, known)])
        else:
            leaves[fqn] = _plannable(value)
            made.append([])
    if leaves:
        planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner(leaves, is_coordinator=True)
        try:
            for item in planner.create_local_plan().items:
                made[index_of[item.index.fqn]].append(item)
        except Exception as error:
            raise _name_unplannable(leaves, error) from error
    for index, items in enumerate(made):
        for item in items:
            yield index, item
    let_go(made)


def _plain_item(fqn: str, value: torch.Tensor, known: dict[tuple[Any, ...], TensorWriteData]) -> WriteItem:
    """Return what DCP's planner makes of a plain tensor, but for whether its memory is pinned."""
    key = value.dtype, value.shape, value.requires_grad
    data = known.get(key)
    if data is None:
        properties = TensorProperties(dtype=value.dtype, requires_grad=value.requires_grad)
        chunk = ChunkStorageMetadata(offsets=torch.Size([0] * value.dim()), sizes=value.shape)
        same = (each.properties for each in known.values() if each.properties == properties)
        known[key] = data = TensorWriteData(chunk=chunk, properties=next(same, properties), size=value.shape)
    index = MetadataIndex(fqn, data.chunk.offsets)
    return WriteItem(index=index, type=WriteItemType.TENSOR, tensor_data=data)


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


def plan_global(locals_: Sequence[LocalPlan], planner: dcp.SavePlanner) -> GlobalPlan:
    """Have the caller's own planner decide who writes what.

    Raises:
        CaptureError: the ranks cut files at different sizes, or the planner gives a rank what it does not hold.
    """
    if len({local.piece_nbytes for local in locals_}) > 1:
        problem = "the ranks cut files at different sizes: max_host_bytes and storage must be the same on all of them"
        raise CaptureError("", problem)
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
        sharing=_plan_sharing(locals_, kept),
    )


def _plan_sharing(locals_: Sequence[LocalPlan], kept: Sequence[Sequence[int]]) -> SharingPlan:
    writers: dict[Key, int] = {}
    sizes: dict[Key, int] = {}
    for rank, numbers in enumerate(kept):
        for number in numbers:
            item = locals_[rank].items[number]
            writers[item.index.fqn, item.index.offset] = rank
            sizes[item.index.fqn, item.index.offset] = nbytes_of(item)
    held: dict[Key, list[tuple[int, int]]] = {key: [] for key in writers}
    for rank, plan in enumerate(locals_):
        for number, item in enumerate(plan.items):
            key = item.index.fqn, item.index.offset
            if key in held:  # a planner may leave something out
                held[key].append((rank, number))
    flat = np.array([each for holders in held.values() for each in holders], dtype=np.int64).reshape(-1, 2)
    return plan_sharing(
        fqns=[fqn for fqn, _ in held],
        starts=np.cumsum([0, *map(len, held.values())]),
        ranks=flat[:, 0],
        numbers=flat[:, 1],
        writers=np.array(list(writers.values()), dtype=np.int64),
        nbytes=np.array([sizes[key] for key in held], dtype=np.int64),
        size=len(locals_),
    )


Key = tuple[str, torch.Size | None]  # fqn and offset: what names an item


def _make_share(local: LocalPlan, numbers: Sequence[int], items: Sequence[WriteItem]) -> Share:
    staged = [item for number, item in zip(numbers, items, strict=True) if number not in local.frozen]
    frozen = [item for number, item in zip(numbers, items, strict=True) if number in local.frozen]
    layout = lay_out([chunk_of(item) for item in staged], local.piece_nbytes)
    return Share(staged=LongList(staged), frozen=frozen, layout=layout)


@gc_paused()
def finish_plan(
    captured: Capture, local: LocalPlan, kept: Sequence[int], shared: SharedItems, share: Share | None = None
) -> WritePlan:
    """Return what this rank writes, given which items of its local plan are its own, and which others hold too."""
    if share is None:
        share = _make_share(local, kept, [local.items[number] for number in kept])
    return WritePlan(
        fqns=captured.fqns,
        kinds=LongList(captured.kinds),
        paths=captured.paths,
        share=share,
        staged=[local.sources[number] for number in kept if number not in local.frozen],
        frozen=[local.sources[number] for number in kept if number in local.frozen],
        frozen_indices=set(captured.frozen),
        items=None if captured.planned is None else captured.planned.items,
        containers=captured.containers,
        comparison=Comparison(
            fqns=[local.items[number].index.fqn for number in shared.numbers.tolist()],
            sources=[local.sources[number] for number in shared.numbers.tolist()],
            frozen=[number in local.frozen for number in shared.numbers.tolist()],
            groups=shared.groups.tolist(),
            whole=shared.whole.tolist(),
            weights=shared.weights.tolist(),
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

"""Who writes what, and which stored pieces a load reads. Pure: no files, no clock.

Saving follows DCP's own planner, `DefaultSavePlanner`, once for each structure of state dict, but for the question who
writes what several ranks hold; loading follows `create_read_items_for_chunk_list`, which cuts stored chunks to the
places that want them.
"""

from __future__ import annotations

import ctypes
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from operator import itemgetter
from typing import Any

import torch
import torch.distributed.checkpoint.planner as dcp
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner, create_default_global_save_plan
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.tensor import DTensor, Partial

from ._capture import PLAIN_TENSORS, Capture, Path, per_rank_key
from ._layout import NOT_COPIED, Frame, Layout, copyable, frame_tensor, lay_out
from .errors import CaptureError, CorruptError, MismatchError
from .metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    StorageInfo,
    TensorStorageMetadata,
    framed_by_us,
)

BARE_BELOW = 0.9  # the part of a stored item below which only that is read, and its checksum cannot be compared
_PER_RANK = re.compile(re.escape(per_rank_key(0)).replace("0", r"\d+"))
DIGESTED_NBYTES = 64 << 10  # of plain tensors up to this size the ranks' values are compared: RNG states, counters

# --- saving

Kind = tuple[Any, ...] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalPlan:
    """What one rank could write: all that it holds, also what others hold too.

    Attributes:
        items: as a save planner made them.
        sources: of each item, which of the captured values it writes.
        frozen: which items were frozen at capture.
        paths: fqn -> keys.
        digests: fqn -> CRC32 of values that are small and not sharded, to find out whether the ranks agree on them.
        planner_data: what the caller's own planner adds for its global plan.
    """

    items: list[WriteItem]
    sources: list[int]
    frozen: set[int]
    paths: dict[str, Path]
    digests: dict[str, int]
    planner_data: Any = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What one rank writes: `staged` items in the layout's order, then `frozen` ones."""

    staged: list[WriteItem]
    frozen: list[WriteItem]
    layout: Layout


@dataclass(frozen=True, slots=True, kw_only=True)
class GlobalPlan:
    """Who writes what.

    Attributes:
        shares: by rank.
        kept: by rank, which of its local plan's items it writes.
        plans: by rank, the caller's own planner's, for its `finish_plan`; else none.
        metadata: names, shapes and chunks, as the planner made them.
        paths: fqn -> keys.
        disagreed: fqns that several ranks hold, with different values; one rank's is saved.
    """

    shares: list[Share]
    kept: list[list[int]]
    plans: list[dcp.SavePlan]
    metadata: Metadata
    paths: dict[str, Path] | None
    disagreed: list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class SavePlan:
    """What this rank writes for every state dict of one structure.

    Attributes:
        fqns: of all leaves, in the order of the state dict.
        kinds: of each leaf, type, dtype and shape if it is a tensor, and more if it is sharded; else None.
        paths: of each leaf, its keys.
        share: the items, and the file that they make.
        staged: of each staged item, which of the captured values it writes.
        frozen: of each frozen item, the place of its leaf.
        frozen_places: of all leaves that were frozen, this rank's to write or not.
        items: of the caller's own planner's local plan.
    """

    fqns: list[str]
    kinds: list[Kind]
    paths: list[Path]
    share: Share
    staged: list[int]
    frozen: list[int]
    frozen_places: set[int]
    items: list[WriteItem] | None

    def fits(self, taken: Capture) -> bool:
        """Whether a state dict has the structure that this plan was made for: names, kinds, dtypes, shapes."""
        if self.fqns != taken.fqns or self.paths != taken.paths:
            return False
        if self.items != (None if taken.planned is None else taken.planned.items):
            return False
        for place, (kind, value) in enumerate(zip(self.kinds, taken.values, strict=False)):
            if not isinstance(value, torch.Tensor):
                if kind is not None and place not in taken.parts:
                    return False
            elif kind is None or kind[0] is not type(value) or kind[1] is not value.dtype or kind[2] != value.shape:
                return False
        if {place for place, kind in enumerate(self.kinds) if kind and len(kind) > 3} != taken.sharded.keys():
            return False
        if any(self.kinds[place] != _sharded_kind(taken, place) for place in taken.sharded):
            return False
        return taken.frozen.keys() == self.frozen_places


def plan_local(taken: Capture, *, alone: bool) -> LocalPlan:
    """Plan this rank's part with DCP's planner; with digests, unless there is nobody to compare them with.

    Raises:
        CaptureError: two leaves have one name, or a leaf is of a kind that cannot be saved.
    """
    if taken.planned is not None:
        items = taken.planned.items
        return LocalPlan(
            items=items,
            sources=list(range(len(items))),
            frozen=set(taken.frozen),
            paths={},
            digests={},
            planner_data=taken.planned.planner_data,
        )
    leaves: dict[str, Any] = {}
    for place, fqn in enumerate(taken.fqns):
        if fqn in leaves:
            raise CaptureError(fqn, "two values of the state dict have this name")
        leaves[fqn] = _plannable(taken.leaf(place))
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(leaves, is_coordinator=True)
    items = planner.create_local_plan().items
    places = {fqn: place for place, fqn in enumerate(taken.fqns)}
    sources: list[int] = []
    frozen: set[int] = set()
    seen: dict[int, int] = {}
    for number, item in enumerate(items):
        place = source = places[item.index.fqn]
        if place in taken.frozen:
            frozen.add(number)
        elif place in taken.parts:  # the items of a ShardedTensor are in the order of its local shards
            source = taken.parts[place] + seen.get(place, 0)
            seen[place] = seen.get(place, 0) + 1
        if item.tensor_data is not None:
            held, sizes = taken.values[source], item.tensor_data.chunk.sizes
            if held.shape != sizes:
                problem = f"this rank holds {tuple(held.shape)} of it, its placements say {tuple(sizes)}"
                raise CaptureError(item.index.fqn, problem)
            item.tensor_data.properties.dtype = held.dtype
        sources.append(source)
    return LocalPlan(
        items=items,
        sources=sources,
        frozen=frozen,
        paths=dict(zip(taken.fqns, taken.paths, strict=True)),
        digests={} if alone else _digests(taken),
    )


def _digests(taken: Capture) -> dict[str, int]:
    digests: dict[str, int] = {}
    for place, fqn in enumerate(taken.fqns):
        value = taken.values[place]
        if place in taken.frozen:
            digests[fqn] = zlib.crc32(taken.frozen[place].data)
        elif (
            place not in taken.sharded
            and value.is_cpu
            and 0 < value.nbytes <= DIGESTED_NBYTES
            and value.data_ptr() != 0
        ):
            data = copyable(value.detach().resolve_conj().resolve_neg()).contiguous().view(-1).view(torch.uint8)
            digests[fqn] = zlib.crc32(ctypes.string_at(data.data_ptr(), data.numel()))
    return digests


def plan_global(locals_: Sequence[LocalPlan], planner: dcp.SavePlanner | None = None) -> GlobalPlan:
    """Share the work out among all ranks. Every item is written by one of those that hold it.

    Args:
        locals_: all ranks' plans.
        planner: the caller's own, which then decides.

    Raises:
        CaptureError: the ranks hold different tensors under one name, or parts that do not make up a whole.
    """
    if planner is not None:
        return _plan_global_with(planner, locals_)
    kept = _share_out(locals_)
    finished, metadata = create_default_global_save_plan(
        [dcp.SavePlan([plan.items[number] for number in numbers]) for plan, numbers in zip(locals_, kept, strict=True)]
    )
    for fqn, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata) and not _is_whole(entry):
            chunks = ", ".join(f"{tuple(each.sizes)} at {tuple(each.offsets)}" for each in entry.chunks[:8])
            raise CaptureError(fqn, f"the ranks' parts do not make up its shape {tuple(entry.size)}: {chunks}")
    paths: dict[str, Path] = {}
    shares: list[Share] = []
    for local, numbers, plan in zip(locals_, kept, finished, strict=True):
        paths.update(local.paths)
        shares.append(_make_share(local, numbers, plan.items))
    disagreed = _disagreed(locals_)
    return GlobalPlan(shares=shares, kept=kept, plans=[], metadata=metadata, paths=paths, disagreed=disagreed)


def _plan_global_with(planner: dcp.SavePlanner, locals_: Sequence[LocalPlan]) -> GlobalPlan:
    plans, metadata = planner.create_global_plan(
        [dcp.SavePlan(plan.items, planner_data=plan.planner_data) for plan in locals_]
    )
    kept: list[list[int]] = []
    for rank, (local, plan) in enumerate(zip(locals_, plans, strict=True)):
        numbers = {(item.index.fqn, item.index.offset): number for number, item in enumerate(local.items)}
        for item in plan.items:
            if (item.index.fqn, item.index.offset) not in numbers:
                raise CaptureError(item.index.fqn, f"the planner gives rank {rank} an item that it did not plan itself")
        kept.append([numbers[item.index.fqn, item.index.offset] for item in plan.items])
    shares = [
        _make_share(local, numbers, plan.items) for local, numbers, plan in zip(locals_, kept, plans, strict=True)
    ]
    paths = metadata.planner_data
    return GlobalPlan(shares=shares, kept=kept, plans=plans, metadata=metadata, paths=paths, disagreed=[])


def _share_out(locals_: Sequence[LocalPlan]) -> list[list[int]]:
    """Decide for every rank which of its items it writes: each rank about as many bytes.

    `dedup_save_plans` of DCP counts every chunk with the bytes of its whole tensor, and the items in their order.
    Here what only one rank holds is counted first, then the rest from the largest on goes to who has least.
    """
    holders: dict[tuple[str, Any], list[tuple[int, int]]] = {}
    for rank, plan in enumerate(locals_):
        for number, item in enumerate(plan.items):
            holders.setdefault((item.index.fqn, item.index.offset), []).append((rank, number))
    kept: list[list[int]] = [[] for _ in locals_]
    load = [0] * len(locals_)
    shared: list[tuple[int, list[tuple[int, int]]]] = []
    described: dict[str, tuple[int, Any]] = {}
    for (fqn, _), held in holders.items():
        rank, number = held[0]
        item = locals_[rank].items[number]
        nbytes = _nbytes(item)
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


def _nbytes(item: WriteItem) -> int:
    if item.tensor_data is None:
        return 1024  # about what a number takes with its framing
    return prod(item.tensor_data.chunk.sizes) * item.tensor_data.properties.dtype.itemsize


def _disagreed(locals_: Sequence[LocalPlan]) -> list[str]:
    first: dict[str, int] = {}
    found: set[str] = set()
    for plan in locals_:
        for fqn, digest in plan.digests.items():
            if first.setdefault(fqn, digest) != digest:
                found.add(fqn)
    return sorted(found)


def _make_share(local: LocalPlan, numbers: Sequence[int], items: Sequence[WriteItem]) -> Share:
    staged = [item for number, item in zip(numbers, items, strict=True) if number not in local.frozen]
    frozen = [item for number, item in zip(numbers, items, strict=True) if number in local.frozen]
    return Share(staged=staged, frozen=frozen, layout=lay_out([chunk_of(item) for item in staged]))


def finish_plan(taken: Capture, local: LocalPlan, kept: Sequence[int], share: Share | None = None) -> SavePlan:
    """Return what this rank writes, given which items of its local plan are its own."""
    if share is None:
        share = _make_share(local, kept, [local.items[number] for number in kept])
    count = len(taken.fqns)
    return SavePlan(
        fqns=taken.fqns,
        kinds=[
            _sharded_kind(taken, place) if place in taken.sharded else _kind(value)
            for place, value in enumerate(taken.values[:count])
        ],
        paths=taken.paths,
        share=share,
        staged=[local.sources[number] for number in kept if number not in local.frozen],
        frozen=[local.sources[number] for number in kept if number in local.frozen],
        frozen_places=set(taken.frozen),
        items=None if taken.planned is None else taken.planned.items,
    )


def _sharded_kind(taken: Capture, place: int) -> Kind:
    """What makes two captures of a sharded tensor alike: all that its plan depends on."""
    value = taken.sharded[place]
    if isinstance(value, DTensor):
        local = taken.values[place]
        return type(local), local.dtype, local.shape, value.shape, value.placements, value.device_mesh
    shards = [(tuple(each.shard_offsets), tuple(each.shard_sizes)) for each in value.metadata().shards_metadata]
    held = [tuple(shard.metadata.shard_offsets) for shard in value.local_shards()]
    shape, dtype = shape_and_dtype(value)
    return type(value), dtype, shape, tuple(shards), tuple(held)


def _plannable(value: Any) -> Any:
    """Return what the planner may see of a value: it fails on dtypes whose size `torch.iinfo` does not know."""
    if isinstance(value, ShardedTensor) or not isinstance(value, torch.Tensor):
        return value
    if value.dtype in NOT_COPIED or str(value.dtype).startswith("torch.bits"):
        return torch.empty(value.shape, dtype=torch.uint8, device="meta")
    return value


def _kind(value: object) -> tuple[type, torch.dtype, torch.Size] | None:
    return (type(value), value.dtype, value.shape) if isinstance(value, torch.Tensor) else None


def chunk_of(item: WriteItem) -> tuple[torch.dtype, tuple[int, ...]]:
    """Return dtype and shape of the tensor that an item writes."""
    assert item.type is not WriteItemType.BYTE_IO
    assert item.tensor_data is not None
    return item.tensor_data.properties.dtype, tuple(item.tensor_data.chunk.sizes)


# --- loading


# The records of a load are not frozen, which would cost 1 us for each of 10,000, and hold no objects of their own:
# what stays alive while a load runs, the cycle collector goes through.


@dataclass(slots=True)
class ValueRead:
    """A stored value that is no tensor.

    Attributes:
        fqn: the value.
        place: which leaf of the caller's it is.
        file: where it lies.
        offset: bytes, where in the file.
        nbytes: its length.
    """

    fqn: str
    place: int
    file: str
    offset: int
    nbytes: int


@dataclass(slots=True)
class TensorRead:
    """A stored chunk of a tensor, and the place that wants it or a part of it.

    Attributes:
        fqn: the tensor.
        file: where the chunk lies.
        offset: bytes, where in the file begins what is read: the item, or a part of its payload.
        nbytes: length of that.
        dtype: as stored.
        sizes: the chunk's shape as stored.
        frame: this library's framing around it; None if the item is an archive of `torch.save`.
        part: (offsets, lengths) of what is wanted of the chunk; None for all of it.
        into: where that goes: the caller's tensor, or a view of a part of it.
        bare: whether only the rows of the payload that hold the part are read, too few to compare a checksum.
    """

    fqn: str
    file: str
    offset: int
    nbytes: int
    dtype: torch.dtype
    sizes: torch.Size
    frame: Frame | None
    part: tuple[torch.Size, torch.Size] | None
    into: torch.Tensor
    bare: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadPlan:
    """What a load reads.

    Attributes:
        tensors: parts of tensors.
        values: other values.
        items: of the caller's own planner, to which the values' places refer.
        resolved: of those the tensors', with what they are read into.
    """

    tensors: list[TensorRead]
    values: list[ValueRead]
    items: list[dcp.ReadItem] = field(default_factory=list)
    resolved: list[tuple[dcp.ReadItem, torch.Tensor]] = field(default_factory=list)


def plan_load(
    metadata: Metadata,
    fqns: Sequence[str],
    paths: Sequence[Path],
    values: Sequence[Any],
    *,
    rank: int,
    checkpoint_id: str,
    strict: bool,
    cast: bool,
) -> LoadPlan:
    """Find every piece that the leaves want, and check all that can be checked without reading one.

    Raises:
        MismatchError: names every fqn that is missing, unexpected, or of another kind, shape or dtype.
        CorruptError: the metadata does not say where a piece is, or its chunks do not make up the tensor.
    """
    stored = metadata.state_dict_metadata
    missing = sorted(fqn for fqn in fqns if fqn not in stored) if strict else []
    unexpected = _unexpected(metadata, fqns, paths, rank) if strict else []
    pieces = PieceFinder(metadata, checkpoint_id)
    plan = LoadPlan(tensors=[], values=[])
    problems: list[str] = []
    for place, (fqn, value) in enumerate(zip(fqns, values, strict=True)):
        entry = stored.get(fqn)
        if entry is None:
            continue
        problem = _misfit(value, entry, cast=cast)
        if problem:
            problems.append(f"{fqn} {problem}")
        elif isinstance(entry, BytesStorageMetadata):
            info = pieces.find(fqn, None)
            plan.values.append(ValueRead(fqn, place, info.relative_path, info.offset, info.length))
        else:
            plan.tensors.extend(_read_tensor(pieces, fqn, value, entry))
    if fqns and not strict and not any(fqn in stored for fqn in fqns):
        missing = sorted(fqns)  # nothing in common is no partial load, but the wrong checkpoint or the wrong names
        unexpected = sorted(stored)
    if missing or unexpected or problems:
        raise MismatchError(checkpoint_id, missing, unexpected, problems)
    return plan


def _unexpected(metadata: Metadata, fqns: Sequence[str], paths: Sequence[Path], rank: int) -> list[str]:
    """Return what the checkpoint has besides `fqns`, without the values that `PerRank` kept for other ranks."""
    unexpected = set(metadata.state_dict_metadata).difference(fqns)
    mine = per_rank_key(rank)
    own = {path[: path.index(mine)] for path in paths if mine in path}
    if own and unexpected:
        for fqn, path in (metadata.planner_data or {}).items():
            for place, step in enumerate(path):
                if isinstance(step, str) and _PER_RANK.fullmatch(step) and tuple(path[:place]) in own:
                    unexpected.discard(fqn)
    return sorted(unexpected)


def _misfit(value: object, entry: TensorStorageMetadata | BytesStorageMetadata, *, cast: bool) -> str:
    """Say why a stored value cannot go into this leaf; empty when it can."""
    if not isinstance(value, torch.Tensor):
        if isinstance(entry, TensorStorageMetadata):
            return f"is a tensor in the checkpoint, {type(value).__name__} in the state dict"
        return ""
    if isinstance(entry, BytesStorageMetadata):
        return "is a tensor in the state dict, another kind of value in the checkpoint"
    shape, wanted = shape_and_dtype(value)
    if shape != entry.size:
        return f"has shape {tuple(entry.size)} in the checkpoint, {tuple(shape)} in the state dict"
    dtype = entry.properties.dtype
    if not cast and loses(dtype, wanted):
        return f"is {dtype} in the checkpoint, {wanted} in the state dict, which loses: cast=True allows it"
    if isinstance(value, DTensor) and any(isinstance(placement, Partial) for placement in value.placements):
        return f"has {value.placements}: a sum that is not made yet cannot be loaded into"
    for part in _parts(value):
        problem = _cannot_fill(part)
        if problem:
            return problem
    return ""


def shape_and_dtype(value: torch.Tensor) -> tuple[torch.Size, torch.dtype]:
    """Return those of the whole tensor; without the warning that a `ShardedTensor` gives for its attributes."""
    if isinstance(value, ShardedTensor):
        metadata = value.metadata()
        return metadata.size, metadata.tensor_properties.dtype
    return value.shape, value.dtype


def _parts(value: torch.Tensor) -> list[torch.Tensor]:
    """What this rank holds of a tensor."""
    if isinstance(value, ShardedTensor):
        return [shard.tensor for shard in value.local_shards()]
    if isinstance(value, DTensor):
        if value.device_mesh.get_coordinate() is None:
            return []
        with torch.no_grad():
            return [value.to_local()]
    return [value]


def _wanted(value: torch.Tensor) -> list[tuple[torch.Tensor, ChunkStorageMetadata]]:
    """What this rank holds of a tensor, and where in the whole that is."""
    parts = _parts(value)
    if isinstance(value, ShardedTensor):
        chunks = [
            ChunkStorageMetadata(
                offsets=torch.Size(shard.metadata.shard_offsets), sizes=torch.Size(shard.metadata.shard_sizes)
            )
            for shard in value.local_shards()
        ]
    elif isinstance(value, DTensor):
        chunks = value.__create_chunk_list__() if parts else []  # type: ignore[no-untyped-call]
    else:
        chunks = [ChunkStorageMetadata(offsets=torch.Size([0] * value.dim()), sizes=value.shape)]
    return list(zip(parts, chunks, strict=True))


def _cannot_fill(value: torch.Tensor) -> str:
    """Say why nothing can be copied into a tensor; empty when it can."""
    if value.is_meta:
        return "is on the meta device, which has no memory to load into"
    if value.is_inference():
        return "was made in inference mode, and cannot be changed"
    if value.layout is not torch.strided:
        return ""
    if not value.is_contiguous() and _overlaps_itself(value):
        return "is expanded in the state dict: its elements share memory"
    if value.data_ptr() == 0 and value.numel():
        return "has no memory in the state dict: its storage has been freed"
    return ""


def _overlaps_itself(tensor: torch.Tensor) -> bool:
    """Whether two elements may lie at one address: a step does not lead beyond what the smaller steps reach."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False


def loses(stored: torch.dtype, wanted: torch.dtype) -> bool:
    """Whether some value of `stored` is no value of `wanted`."""
    if stored is wanted:
        return False
    kinds = [(d.is_floating_point, d.is_complex, d is torch.bool) for d in (stored, wanted)]
    if kinds[0] != kinds[1]:
        return True
    try:
        return torch.promote_types(stored, wanted) is not wanted
    except RuntimeError:  # torch has no promotion for the float8 and the wider unsigned types
        return True


class PieceFinder:
    """Where the pieces of one checkpoint lie."""

    def __init__(self, metadata: Metadata, checkpoint_id: str) -> None:
        self.checkpoint_id = checkpoint_id
        self._is_framed = framed_by_us(metadata)
        # A `MetadataIndex` made and hashed for each look-up costs 3 us.
        self._stored_at: dict[str, dict[torch.Size | None, StorageInfo]] = {}
        for index, info in metadata.storage_data.items():
            if index.fqn in self._stored_at:
                self._stored_at[index.fqn][index.offset] = info
            else:
                self._stored_at[index.fqn] = {index.offset: info}

    def find(self, fqn: str, offsets: torch.Size | None) -> StorageInfo:
        """Return where a value, or the chunk of a tensor at `offsets`, lies."""
        info = self._stored_at.get(fqn, {}).get(offsets)
        if info is None:
            raise CorruptError(self.checkpoint_id, fqn, "the metadata does not say where it is stored")
        if getattr(info, "transform_descriptors", None):
            problem = f"is stored through the extensions {info.transform_descriptors}, which this reader has not"
            raise CorruptError(self.checkpoint_id, fqn, problem)
        return info

    def read(
        self,
        fqn: str,
        entry: TensorStorageMetadata,
        chunk: ChunkStorageMetadata,
        part: tuple[torch.Size, torch.Size] | None,
        into: torch.Tensor,
    ) -> TensorRead:
        """Read a chunk of a tensor, or a part of it: only its rows, where they are much less than the whole."""
        dtype, sizes = entry.properties.dtype, chunk.sizes
        info = self.find(fqn, chunk.offsets)
        frame = frame_tensor(dtype, tuple(sizes)) if self._is_framed(fqn) else None
        start, nbytes = info.offset, info.length
        bare = False
        if part is not None and frame is not None:
            first, last = _extent(frame, part)
            if last - first < BARE_BELOW * nbytes:
                if frame.item_nbytes != nbytes:
                    raise CorruptError(self.checkpoint_id, fqn, f"{nbytes} bytes are not {dtype} of {tuple(sizes)}")
                start, nbytes, bare = start + len(frame.head) + first, last - first, True
        return TensorRead(fqn, info.relative_path, start, nbytes, dtype, sizes, frame, part, into, bare)


def _read_tensor(pieces: PieceFinder, fqn: str, tensor: torch.Tensor, entry: TensorStorageMetadata) -> list[TensorRead]:
    if prod(entry.size) == 0:
        return []
    if (  # the usual case, spelt out: it is that of 10,000 tensors
        type(tensor) in PLAIN_TENSORS
        and len(entry.chunks) == 1
        and entry.chunks[0].sizes == entry.size
        and not any(entry.chunks[0].offsets)
    ):
        return [pieces.read(fqn, entry, entry.chunks[0], None, tensor)]
    if not _is_whole(entry):
        problem = f"its {len(entry.chunks)} chunks do not make up its shape {tuple(entry.size)}"
        raise CorruptError(pieces.checkpoint_id, fqn, problem)
    reads = []
    for held, wanted in _wanted(tensor):
        for item in create_read_items_for_chunk_list(fqn, entry, [wanted]):
            assert item.storage_index.index is not None
            chunk = entry.chunks[item.storage_index.index]
            if not prod(item.lengths):
                continue
            into = cut(held.detach(), (item.dest_offsets, item.lengths))
            part = None if item.lengths == chunk.sizes else (item.storage_offsets, item.lengths)
            reads.append(pieces.read(fqn, entry, chunk, part, into))
    return reads


def read_rows(
    read: TensorRead,
    dtype: torch.dtype,
    sizes: tuple[int, ...],
    strides: tuple[int, ...],
    start: int,
    offset: int,
) -> None:
    """Change `read`, of an archive of `torch.save`, to read only the rows that hold the part, if that is much less.

    Args:
        read: wants a part.
        dtype, sizes, strides: of the tensor in the archive.
        start: bytes, where in the archive its storage begins.
        offset: elements, where in the storage it begins.
    """
    frame = frame_tensor(read.dtype, tuple(read.sizes))
    if (dtype, sizes, strides) != (read.dtype, tuple(read.sizes), frame.strides) or read.part is None:
        return
    first, last = _extent(frame, read.part)
    if last - first < BARE_BELOW * read.nbytes:
        read.offset += start + offset * dtype.itemsize + first
        read.nbytes, read.frame, read.bare = last - first, frame, True


def _extent(frame: Frame, part: tuple[torch.Size, torch.Size]) -> tuple[int, int]:
    """Return from which byte of the payload to which the elements of a part lie."""
    offsets, lengths = part
    first = sum(offset * stride for offset, stride in zip(offsets, frame.strides, strict=True))
    steps = sum((length - 1) * stride for length, stride in zip(lengths, frame.strides, strict=True))
    return first * frame.dtype.itemsize, (first + steps + 1) * frame.dtype.itemsize


def cut(tensor: torch.Tensor, part: tuple[torch.Size, torch.Size] | None) -> torch.Tensor:
    """Return a view of a part, (offsets, lengths), of a tensor; all of it for None."""
    if part is not None:
        for dimension, (offset, length) in enumerate(zip(*part, strict=True)):
            if length != tensor.shape[dimension]:
                tensor = tensor.narrow(dimension, offset, length)
    return tensor


def _is_whole(entry: TensorStorageMetadata) -> bool:
    """Whether the chunks make up the tensor: as many elements, all within it, none twice."""
    size, chunks = entry.size, entry.chunks
    if len(chunks) == 1:
        return chunks[0].sizes == size and not any(chunks[0].offsets)
    return (
        sum(prod(chunk.sizes) for chunk in chunks) == prod(size)
        and all(
            0 <= first <= first + length <= stop
            for chunk in chunks
            for first, length, stop in zip(chunk.offsets, chunk.sizes, size, strict=True)
        )
        and not _overlap(chunks)
    )


def _overlap(chunks: Sequence[ChunkStorageMetadata]) -> bool:
    """Whether two chunks share an element: a sweep along the dimension in which most of them differ."""
    chunks = [chunk for chunk in chunks if prod(chunk.sizes)]
    dimensions = range(len(chunks[0].offsets) if chunks else 0)
    sweep = max(dimensions, key=lambda each: len({chunk.offsets[each] for chunk in chunks}), default=0)
    active: list[ChunkStorageMetadata] = []
    for chunk in sorted(chunks, key=lambda each: each.offsets[sweep]):
        active = [other for other in active if other.offsets[sweep] + other.sizes[sweep] > chunk.offsets[sweep]]
        if any(_share(chunk, other) for other in active):
            return True
        active.append(chunk)
    return False


def _share(one: ChunkStorageMetadata, other: ChunkStorageMetadata) -> bool:
    return all(
        a < b + n and b < a + m for a, m, b, n in zip(one.offsets, one.sizes, other.offsets, other.sizes, strict=True)
    )

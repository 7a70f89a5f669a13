"""Who writes what, and which stored pieces a load reads. Pure: no files, no clock.

Saving follows DCP's own planner, `DefaultSavePlanner`, once for each structure of state dict; loading follows
`create_read_items_for_chunk_list`, which cuts stored chunks to the places that want them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from ._capture import PLAIN_TENSORS, Capture, Path, is_sharded
from ._layout import NOT_COPIED, Frame, frame_tensor
from .errors import CaptureError, CorruptError, MismatchError
from .metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    StorageInfo,
    TensorStorageMetadata,
    framed_by_us,
)

# --- saving


@dataclass(frozen=True, slots=True, kw_only=True)
class SavePlan:
    """What this process writes for every state dict of one structure.

    Attributes:
        fqns: of all leaves, in the order of the state dict.
        kinds: of each leaf, its type, dtype and shape if it is a tensor, else None.
        paths: fqn -> keys.
        metadata: names, shapes and chunks, as the planner made them.
        staged: the items whose elements are staged, and the place of each one's leaf.
        frozen: the items that were frozen at capture, and the place of each one's leaf.
    """

    fqns: list[str]
    kinds: list[tuple[type, torch.dtype, torch.Size] | None]
    paths: dict[str, Path]
    metadata: Metadata
    staged: list[tuple[WriteItem, int]]
    frozen: list[tuple[WriteItem, int]]

    def fits(self, taken: Capture) -> bool:
        """Whether a state dict has the structure that this plan was made for: names, kinds, dtypes, shapes."""
        if self.fqns != taken.fqns or list(self.paths.values()) != taken.paths:
            return False
        for kind, value in zip(self.kinds, taken.values, strict=True):
            if not isinstance(value, torch.Tensor):
                if kind is not None:
                    return False
            elif kind is None or kind[0] is not type(value) or kind[1] is not value.dtype or kind[2] != value.shape:
                return False
        return taken.frozen.keys() == {place for _, place in self.frozen}


def plan_save(taken: Capture) -> SavePlan:
    """Plan with DCP's planner, alone.

    Raises:
        CaptureError: two leaves have one name, or a leaf is of a kind that cannot be saved.
    """
    leaves: dict[str, Any] = {}
    for fqn, value in zip(taken.fqns, taken.values, strict=True):
        if fqn in leaves:
            raise CaptureError(fqn, "two values of the state dict have this name")
        leaves[fqn] = _plannable(value)
    planner = DefaultSavePlanner(flatten_state_dict=False)
    planner.set_up_planner(leaves, is_coordinator=True)
    [plan], metadata = planner.create_global_plan([planner.create_local_plan()])
    plan = planner.finish_plan(plan)
    places = {fqn: place for place, fqn in enumerate(taken.fqns)}
    staged: list[tuple[WriteItem, int]] = []
    frozen: list[tuple[WriteItem, int]] = []
    for item in plan.items:
        place = places[item.index.fqn]
        if item.tensor_data is not None:
            item.tensor_data.properties.dtype = taken.values[place].dtype
        (frozen if place in taken.frozen else staged).append((item, place))
    return SavePlan(
        fqns=taken.fqns,
        kinds=[_kind(value) for value in taken.values],
        paths=dict(zip(taken.fqns, taken.paths, strict=True)),
        metadata=metadata,
        staged=staged,
        frozen=frozen,
    )


def _plannable(value: Any) -> Any:
    """Return what the planner may see of a value: it fails on dtypes whose size `torch.iinfo` does not know."""
    if isinstance(value, torch.Tensor) and (value.dtype in NOT_COPIED or str(value.dtype).startswith("torch.bits")):
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
        offset: bytes, where in the file its item begins.
        nbytes: length of the item.
        dtype: as stored.
        sizes: the chunk's shape as stored.
        frame: this library's framing around it; None if the item is an archive of `torch.save`.
        part: (offsets, lengths) of what is wanted of the chunk; None for all of it.
        into: where that goes: the caller's tensor, or a view of a part of it.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadPlan:
    """What a load reads: tensors, and other values."""

    tensors: list[TensorRead]
    values: list[ValueRead]


def plan_load(
    metadata: Metadata,
    fqns: Sequence[str],
    values: Sequence[Any],
    *,
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
    unexpected = sorted(set(stored).difference(fqns)) if strict else []
    framed = framed_by_us(metadata)
    stored_at = _by_fqn(metadata)
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
            info = _find(stored_at, fqn, None, checkpoint_id)
            plan.values.append(ValueRead(fqn, place, info.relative_path, info.offset, info.length))
        else:
            plan.tensors.extend(_read_tensor(stored_at, fqn, value, entry, framed(fqn), checkpoint_id))
    if fqns and not strict and not plan.tensors and not plan.values and not problems:
        missing = sorted(fqns)  # nothing in common is no partial load, but the wrong checkpoint or the wrong names
        unexpected = sorted(stored)
    if missing or unexpected or problems:
        raise MismatchError(checkpoint_id, missing, unexpected, problems)
    return plan


def _misfit(value: object, entry: TensorStorageMetadata | BytesStorageMetadata, *, cast: bool) -> str:
    """Say why a stored value cannot go into this leaf; empty when it can."""
    if not isinstance(value, torch.Tensor):
        if isinstance(entry, TensorStorageMetadata):
            return f"is a tensor in the checkpoint, {type(value).__name__} in the state dict"
        return ""
    if isinstance(entry, BytesStorageMetadata):
        return "is a tensor in the state dict, another kind of value in the checkpoint"
    if type(value) not in PLAIN_TENSORS and is_sharded(value):
        return f"is a {type(value).__name__}: this version does not load into sharded tensors"
    if value.shape != entry.size:
        return f"has shape {tuple(entry.size)} in the checkpoint, {tuple(value.shape)} in the state dict"
    dtype = entry.properties.dtype
    if dtype is not value.dtype and not cast and not casts_without_loss(dtype, value.dtype):
        return f"is {dtype} in the checkpoint, {value.dtype} in the state dict, which loses: cast=True allows it"
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


def casts_without_loss(stored: torch.dtype, wanted: torch.dtype) -> bool:
    """Whether every value of `stored` is a value of `wanted`."""
    if stored is wanted:
        return True
    kinds = [(d.is_floating_point, d.is_complex, d is torch.bool) for d in (stored, wanted)]
    if kinds[0] != kinds[1]:
        return False
    try:
        return torch.promote_types(stored, wanted) is wanted
    except RuntimeError:  # torch has no promotion for the float8 and the wider unsigned types
        return False


def _by_fqn(metadata: Metadata) -> dict[str, dict[torch.Size | None, StorageInfo]]:
    """fqn -> offsets of a chunk -> where it lies. A `MetadataIndex` made and hashed for each look-up costs 3 us."""
    stored_at: dict[str, dict[torch.Size | None, StorageInfo]] = {}
    for index, info in metadata.storage_data.items():
        if index.fqn in stored_at:
            stored_at[index.fqn][index.offset] = info
        else:
            stored_at[index.fqn] = {index.offset: info}
    return stored_at


def _find(
    stored_at: dict[str, dict[torch.Size | None, StorageInfo]],
    fqn: str,
    offsets: torch.Size | None,
    checkpoint_id: str,
) -> StorageInfo:
    info = stored_at.get(fqn, {}).get(offsets)
    if info is None:
        raise CorruptError(checkpoint_id, fqn, "the metadata does not say where it is stored")
    if getattr(info, "transform_descriptors", None):
        problem = f"is stored through the extensions {info.transform_descriptors}, which this reader has not"
        raise CorruptError(checkpoint_id, fqn, problem)
    return info


def _read_tensor(
    stored_at: dict[str, dict[torch.Size | None, StorageInfo]],
    fqn: str,
    tensor: torch.Tensor,
    entry: TensorStorageMetadata,
    framed: bool,
    checkpoint_id: str,
) -> list[TensorRead]:
    if prod(entry.size) == 0:
        return []

    def read(chunk: ChunkStorageMetadata, part: tuple[torch.Size, torch.Size] | None, into: torch.Tensor) -> TensorRead:
        dtype, sizes = entry.properties.dtype, chunk.sizes
        info = _find(stored_at, fqn, chunk.offsets, checkpoint_id)
        frame = frame_tensor(dtype, tuple(sizes)) if framed else None
        return TensorRead(fqn, info.relative_path, info.offset, info.length, dtype, sizes, frame, part, into)

    if len(entry.chunks) == 1 and entry.chunks[0].sizes == entry.size and not any(entry.chunks[0].offsets):
        return [read(entry.chunks[0], None, tensor)]
    whole = ChunkStorageMetadata(offsets=torch.Size([0] * len(entry.size)), sizes=entry.size)
    items = create_read_items_for_chunk_list(fqn, entry, [whole])
    covered = sum(prod(item.lengths) for item in items)
    if covered != prod(entry.size) or _overlap(entry.chunks):
        problem = f"its {len(entry.chunks)} chunks do not make up its shape {tuple(entry.size)}"
        raise CorruptError(checkpoint_id, fqn, problem)
    reads = []
    for item in items:
        assert item.storage_index.index is not None
        chunk = entry.chunks[item.storage_index.index]
        into = cut(tensor.detach(), (item.dest_offsets, item.lengths))
        reads.append(read(chunk, (item.storage_offsets, item.lengths), into))
    return reads


def cut(tensor: torch.Tensor, part: tuple[torch.Size, torch.Size] | None) -> torch.Tensor:
    """Return a view of a part, (offsets, lengths), of a tensor; all of it for None."""
    if part is not None:
        for dimension, (offset, length) in enumerate(zip(*part, strict=True)):
            if length != tensor.shape[dimension]:
                tensor = tensor.narrow(dimension, offset, length)
    return tensor


def _overlap(chunks: Sequence[ChunkStorageMetadata]) -> bool:
    """Whether two chunks share an element: a sweep along the first dimension."""
    chunks = sorted((chunk for chunk in chunks if prod(chunk.sizes)), key=lambda chunk: tuple(chunk.offsets))
    active: list[ChunkStorageMetadata] = []
    for chunk in chunks:
        active = [other for other in active if other.offsets[0] + other.sizes[0] > chunk.offsets[0]]
        if any(_share(chunk, other) for other in active):
            return True
        active.append(chunk)
    return False


def _share(one: ChunkStorageMetadata, other: ChunkStorageMetadata) -> bool:
    return all(
        a < b + n and b < a + m for a, m, b, n in zip(one.offsets, one.sizes, other.offsets, other.sizes, strict=True)
    )

"""Which stored pieces a load reads, and where they go. Pure: no files, no clock.

It follows `create_read_items_for_chunk_list` of DCP, which cuts stored chunks to the places that want them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
import torch.distributed.checkpoint.planner as dcp
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.tensor import DTensor, Partial

from ._capture import PLAIN_TENSORS, Path, per_rank_key, shape_and_dtype
from ._chunks import cut, extent, is_whole
from ._layout import Frame, frame_tensor
from .errors import CorruptError, MismatchError
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
            first, last = extent(frame, part)
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
    if not is_whole(entry):
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
    first, last = extent(frame, read.part)
    if last - first < BARE_BELOW * read.nbytes:
        read.offset += start + offset * dtype.itemsize + first
        read.nbytes, read.frame, read.bare = last - first, frame, True

"""Which stored pieces a load reads, and where they go. Pure: no files, no clock.

It follows `create_read_items_for_chunk_list` of DCP, which cuts stored chunks to the places that want them.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
import torch.distributed.checkpoint.planner as dcp
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.tensor import DTensor, Partial

from ._capture import PLAIN_TENSORS, QUANTIZED, PerRank, held_parts, is_sharded, shape_and_dtype
from ._chunks import cut, extent, is_whole
from ._dtypes import as_number, holds_number, loses
from ._layout import Frame, frame_tensor
from ._log import log
from ._structure import Finder
from ._targets import LoadTargets
from .errors import ArgumentError, CorruptError
from .metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    StorageInfo,
    TensorStorageMetadata,
    framed_by_us,
    opaque_names,
)

BARE_BELOW = 0.9  # the part of a stored item below which only that is read, and its checksum cannot be compared


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
        crc: what its file's table says of it; None if there is none.
    """

    fqn: str
    place: int
    file: str
    offset: int
    nbytes: int
    crc: int | None = None


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
        crc: what its file's table says of it; None if there is none.
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
    crc: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadPlan:
    """What a load reads.

    Attributes:
        tensors: parts of tensors.
        values: other values, and tensors that are not filled part by part.
        numbers: places of numbers that are stored as tensors.
        fills: places of tensors that are stored as numbers.
        opaque: places of tensors that are filled as a whole, by themselves, or replaced.
        items: of the caller's own planner, to which the values' places refer.
        resolved: of those the tensors', with what they are read into.
    """

    tensors: list[TensorRead]
    values: list[ValueRead]
    numbers: list[int] = field(default_factory=list)
    fills: list[int] = field(default_factory=list)
    opaque: list[int] = field(default_factory=list)
    items: list[dcp.ReadItem] = field(default_factory=list)
    resolved: list[tuple[dcp.ReadItem, torch.Tensor]] = field(default_factory=list)


def plan_load(
    metadata: Metadata, targets: LoadTargets, *, checkpoint_id: str, cast: bool
) -> tuple[LoadPlan, list[str]]:
    """Find every piece that the targets want, and check all that can be checked without reading one.

    Targets that have no memory, or may be replaced and do not fit, are replaced by new tensors.

    Returns:
        The plan, and one sentence for every value that does not fit.

    Raises:
        CorruptError: the metadata does not say where a piece is, or its chunks do not make up the tensor.
        ArgumentError: a container takes no new value.
    """
    return _Planner(metadata, targets, checkpoint_id, cast).plan()


class _Planner:
    def __init__(self, metadata: Metadata, targets: LoadTargets, checkpoint_id: str, cast: bool) -> None:
        self._entries = metadata.state_dict_metadata
        self._pieces = PieceFinder(metadata, checkpoint_id)
        self._targets = targets
        self._cast = cast
        self._plan = LoadPlan(tensors=[], values=[])
        self._problems: list[str] = []
        self._assigned: list[int] = []

    def plan(self) -> tuple[LoadPlan, list[str]]:
        targets, entries = self._targets, self._entries
        converted = targets.report.converted
        for place, (fqn, value, source) in enumerate(zip(targets.fqns, targets.values, targets.sources, strict=True)):
            if source is None:
                continue
            entry = entries[source]
            # The usual case, spelt out as it is that of 10,000 tensors: contiguous, with memory, stored in one piece.
            if (
                type(value) in PLAIN_TENSORS
                and isinstance(entry, TensorStorageMetadata)
                and value.dtype is entry.properties.dtype
                and value.shape == entry.size
                and value.layout is torch.strided is entry.properties.layout
                and value.is_contiguous()
                and value.data_ptr()
                and not value.is_inference()
                and value.dtype not in QUANTIZED
                and len(entry.chunks) == 1
                and entry.chunks[0].sizes == entry.size
                and not any(entry.chunks[0].offsets)
            ):
                self._plan.tensors.append(self._pieces.read(fqn, source, entry, entry.chunks[0], None, value))
                continue
            if isinstance(entry, BytesStorageMetadata):
                self._plan_value(place, fqn, value, source)
                continue
            if isinstance(value, torch.Tensor):
                problem = _misfit(value, entry, cast=self._cast)
                as_stored = place in targets.as_stored
                if as_stored and value.dtype is not entry.properties.dtype:
                    problem = "is of another dtype"
                if problem and as_stored and self._is_opaque(source, entry):
                    self._read_whole(place, fqn, source, entry)
                    continue
                if problem:
                    value = self._replace(place, fqn, value, entry, problem)
            elif (value is None or place in targets.as_stored) and self._is_opaque(source, entry):
                self._read_whole(place, fqn, source, entry)
                continue
            elif value is None or place in targets.as_stored:
                value = self._make(place, torch.empty(entry.size, dtype=entry.properties.dtype))
            else:
                self._plan_number(place, fqn, value, source, entry)
                continue
            if value is None:
                continue
            if value.dtype is not entry.properties.dtype:
                converted.append(fqn)
            if not (
                type(value) in PLAIN_TENSORS and value.layout is torch.strided and value.dtype not in QUANTIZED
            ) and (not is_sharded(value)):
                self._plan_opaque(place, fqn, source, entry)
            else:
                self._plan.tensors.extend(_read_tensor(self._pieces, fqn, source, value, entry))
        targets.holders = self._find_holders()
        return self._plan, self._problems

    def _is_opaque(self, source: str, entry: TensorStorageMetadata) -> bool:
        """Whether a tensor is stored whole, as `torch.save` wrote it, and not as a dense buffer of elements."""
        return len(entry.chunks) == 1 and (
            entry.properties.layout is not torch.strided or source in self._pieces.opaque
        )

    def _read_value(self, place: int, fqn: str, source: str, offsets: torch.Size | None) -> None:
        info = self._pieces.find(source, offsets)
        self._plan.values.append(ValueRead(fqn, place, info.relative_path, info.offset, info.length))

    def _read_whole(self, place: int, fqn: str, source: str, entry: TensorStorageMetadata) -> None:
        self._assigned.append(place)
        self._read_value(place, fqn, source, entry.chunks[0].offsets)

    def _plan_value(self, place: int, fqn: str, value: Any, source: str) -> None:
        if isinstance(value, torch.Tensor) and place not in self._targets.as_stored:
            self._plan.fills.append(place)
        self._assigned.append(place)
        self._read_value(place, fqn, source, None)

    def _plan_number(self, place: int, fqn: str, value: Any, source: str, entry: TensorStorageMetadata) -> None:
        if len(entry.size) or not isinstance(value, int | float):
            self._problems.append(f"{fqn} is a tensor in the checkpoint, {type(value).__name__} in the state dict")
            return
        self._plan.numbers.append(place)
        self._read_whole(place, fqn, source, entry)

    def _plan_opaque(self, place: int, fqn: str, source: str, entry: TensorStorageMetadata) -> None:
        if len(entry.chunks) != 1:
            self._problems.append(f"{fqn} is stored in {len(entry.chunks)} pieces, of which no such tensor can be made")
            return
        self._plan.opaque.append(place)
        self._read_whole(place, fqn, source, entry)

    def _replace(
        self, place: int, fqn: str, value: torch.Tensor, entry: TensorStorageMetadata, problem: str
    ) -> torch.Tensor | None:
        """Return a new tensor in place of one that cannot be filled; None, and a problem, where that must not be."""
        if torch.nn.parameter.is_lazy(value):
            return self._make(place, torch.empty(entry.size, dtype=entry.properties.dtype))
        if value.is_meta and not _differs(value, entry, cast=self._cast):
            return self._make(place, _with_memory(value, self._targets.home.place_of(value)))
        if place not in self._targets.as_stored:
            self._problems.append(f"{fqn} {problem}")
            return None
        if isinstance(value, DTensor) and value.shape == entry.size:
            return self._make(place, torch.empty_like(value, dtype=entry.properties.dtype))
        device = self._targets.home.place_of(value)
        return self._make(place, torch.empty(entry.size, dtype=entry.properties.dtype, device=device))

    def _make(self, place: int, tensor: torch.Tensor) -> torch.Tensor:
        self._targets.values[place] = tensor
        self._assigned.append(place)
        return tensor

    def _find_holders(self) -> dict[int, tuple[Any, Any]]:
        targets, finder = self._targets, Finder()
        roots = [*targets.rebuilt, *(path for _, _, ranks in targets.joined for path in ranks.values())]
        holders: dict[int, tuple[Any, Any]] = {}
        for place in self._assigned:
            path = targets.paths[place]
            if any(path[: len(root)] == root for root in roots):
                continue
            _, holder, key = finder.find(targets.states, path)
            if not isinstance(holder, MutableMapping | list | PerRank):
                problem = f"{targets.fqns[place]} is in a {type(holder).__name__}, which takes no new value"
                raise ArgumentError("state_dict", problem)
            holders[place] = holder, key
        return holders


def _with_memory(value: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor like one on the meta device, with memory."""
    if isinstance(value, DTensor):
        local = torch.empty_like(value.to_local(), device=device)
        return DTensor.from_local(
            local, value.device_mesh, value.placements, run_check=False, shape=value.shape, stride=value.stride()
        )
    return torch.empty_like(value, device=device)


def settle_values(plan: LoadPlan, targets: LoadTargets, *, cast: bool) -> list[str]:
    """Convert between numbers and tensors, given the values; return why something does not fit."""
    problems: list[str] = []
    loaded = targets.loaded
    for place in plan.numbers:
        stored, wanted = loaded[place].item(), type(targets.values[place])
        number = as_number(stored, wanted, cast=cast)
        if number is None:
            problems.append(
                f"{targets.fqns[place]} is the tensor {stored!r} in the checkpoint, {wanted.__name__} in the state "
                "dict, which loses: cast=True allows it"
            )
        loaded[place] = number
        targets.report.converted.append(targets.fqns[place])
    for place in plan.fills:
        fqn, value, tensor = targets.fqns[place], loaded[place], targets.values[place]
        if value is None and targets.kinds.get(str(targets.paths[place][0])) == "plain":
            continue  # there was none
        if not isinstance(value, int | float) or tensor.dim() or is_sharded(tensor):
            problems.append(f"{fqn} is a tensor in the state dict, another kind of value in the checkpoint")
        elif not holds_number(tensor.dtype, value, cast=cast):
            problems.append(
                f"{fqn} is the number {value!r} in the checkpoint, {tensor.dtype} in the state dict, which loses: "
                "cast=True allows it"
            )
        targets.report.converted.append(fqn)
    for place in plan.opaque:
        value, tensor = loaded[place], targets.values[place]
        if not isinstance(value, torch.Tensor) or value.shape != tensor.shape:
            problems.append(f"{targets.fqns[place]} is a {type(value).__name__} in the checkpoint")
        elif value.layout is not tensor.layout:
            problems.append(
                f"{targets.fqns[place]} is {value.layout} in the checkpoint, {tensor.layout} in the state dict"
            )
    return problems


def fill_whole(plan: LoadPlan, targets: LoadTargets) -> None:
    """Fill, after everything is checked, the tensors that are not filled part by part."""
    with torch.no_grad():
        for place in plan.fills:
            if targets.loaded[place] is not None:
                targets.values[place].fill_(targets.loaded.pop(place))
        for place in plan.opaque:
            target = targets.values[place]
            try:
                target.copy_(targets.loaded[place])
            except Exception as error:  # whatever its kind of tensor says that it cannot: then it is replaced
                log.debug("%s is replaced, it cannot be filled: %r", targets.fqns[place], error)
                continue
            del targets.loaded[place]


def _misfit(value: torch.Tensor, entry: TensorStorageMetadata, *, cast: bool) -> str:
    """Say why a stored tensor cannot go into this one; empty when it can."""
    return _differs(value, entry, cast=cast) or next(filter(None, map(_cannot_fill, _parts(value))), "")


def _differs(value: torch.Tensor, entry: TensorStorageMetadata, *, cast: bool) -> str:
    """Say in what a tensor differs from the stored one; empty when it does not, or in nothing that matters."""
    if torch.nn.parameter.is_lazy(value):
        return "is a parameter of a lazy module, which has no shape yet"
    shape, wanted = shape_and_dtype(value)
    if shape != entry.size:
        return f"has shape {tuple(entry.size)} in the checkpoint, {tuple(shape)} in the state dict"
    dtype = entry.properties.dtype
    if not cast and loses(dtype, wanted):
        return f"is {dtype} in the checkpoint, {wanted} in the state dict, which loses: cast=True allows it"
    if isinstance(value, DTensor) and any(isinstance(placement, Partial) for placement in value.placements):
        return f"has Partial placements {value.placements} (a pending reduction), which cannot be loaded into"
    layout = entry.properties.layout
    return f"is {layout} in the checkpoint, {value.layout} in the state dict" if layout is not value.layout else ""


def _parts(value: torch.Tensor) -> list[torch.Tensor]:
    """What this rank holds of a tensor."""
    if not isinstance(value, DTensor | ShardedTensor):
        return [value]
    if isinstance(value, DTensor) and value.device_mesh.get_coordinate() is None:
        return []
    return held_parts(value)


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
    if value.layout is not torch.strided or type(value) not in PLAIN_TENSORS:
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


class PieceFinder:
    """Where the pieces of one checkpoint lie."""

    def __init__(self, metadata: Metadata, checkpoint_id: str) -> None:
        self.checkpoint_id = checkpoint_id
        self._is_framed = framed_by_us(metadata)
        self.opaque = opaque_names(metadata)
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
        source: str,
        entry: TensorStorageMetadata,
        chunk: ChunkStorageMetadata,
        part: tuple[torch.Size, torch.Size] | None,
        into: torch.Tensor,
    ) -> TensorRead:
        """Read a chunk of a tensor, or a part of it: only its rows, where they are much less than the whole.

        Args:
            fqn: the tensor, by the name under which it is wanted.
            source: by the name under which it is stored.
            entry, chunk: of it.
            part: what is wanted of the chunk; None for all of it.
            into: where that goes.
        """
        dtype, sizes = entry.properties.dtype, chunk.sizes
        info = self.find(source, chunk.offsets)
        frame = frame_tensor(dtype, tuple(sizes)) if self._is_framed(source) else None
        start, nbytes = info.offset, info.length
        bare = False
        if part is not None and frame is not None:
            first, last = extent(frame, part)
            if last - first < BARE_BELOW * nbytes:
                if frame.item_nbytes != nbytes:
                    raise CorruptError(self.checkpoint_id, fqn, f"{nbytes} bytes are not {dtype} of {tuple(sizes)}")
                start, nbytes, bare = start + len(frame.head) + first, last - first, True
        return TensorRead(fqn, info.relative_path, start, nbytes, dtype, sizes, frame, part, into, bare)


def _read_tensor(
    pieces: PieceFinder, fqn: str, source: str, tensor: torch.Tensor, entry: TensorStorageMetadata
) -> list[TensorRead]:
    if prod(entry.size) == 0:
        return []
    if type(tensor) in PLAIN_TENSORS and len(entry.chunks) == 1 and is_whole(entry):
        return [pieces.read(fqn, source, entry, entry.chunks[0], None, tensor)]
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
            reads.append(pieces.read(fqn, source, entry, chunk, part, into))
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

"""Which stored pieces a load reads, and where they go. Pure: no files, no clock.

It follows `create_read_items_for_chunk_list` of DCP, which cuts stored chunks to the parts that are asked for.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from math import prod
from typing import Any

import torch
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.tensor import DTensor

from .._format.chunks import cut, is_whole
from .._format.dcp import BytesStorageMetadata, ChunkStorageMetadata, Metadata, TensorStorageMetadata
from .._format.indexed_metadata import IndexedTensor, chunks_over
from .._state.per_rank import PerRank
from .._state.plain_tensors import PLAIN_TENSORS, QUANTIZED
from .._state.sharding import is_sharded, placed_parts
from .._state.structure import Finder
from ..errors import ArgumentError, CorruptError
from .chunk_index import ChunkIndex
from .fitting import differs, misfit, unfillable
from .plan import TensorRead, ValueRead
from .read_plan import ReadPlan
from .small_reads import SmallChooser
from .targets import LoadTargets


def plan_load(
    metadata: Metadata, targets: LoadTargets, pieces: ChunkIndex, *, cast: bool
) -> tuple[ReadPlan, list[str]]:
    """Find every piece that the targets want, and check all that can be checked without reading one.

    Targets that have no memory, or may be replaced and do not fit, are replaced by new tensors.

    Returns:
        The plan, and one sentence for every value that does not fit.

    Raises:
        CorruptError: the metadata does not say where a piece is, or its chunks do not make up the tensor.
        ArgumentError: a container takes no new value.
    """
    return _Planner(metadata, targets, pieces, cast).plan()


class _Planner:
    def __init__(self, metadata: Metadata, targets: LoadTargets, pieces: ChunkIndex, cast: bool) -> None:
        self._metadata = metadata
        self._entries = metadata.state_dict_metadata
        self._pieces = pieces
        self._targets = targets
        self._cast = cast
        self._plan = ReadPlan(tensors=[], values=[])
        self._problems: list[str] = []
        self._assigned: list[int] = []

    def plan(self) -> tuple[ReadPlan, list[str]]:
        targets, entries = self._targets, self._entries
        converted = targets.report.converted
        chooser = SmallChooser(self._metadata, targets.device_copies.device)
        self._plan.small, others = chooser.choose(targets.fqns, targets.sources, targets.values)
        for index in others:
            fqn, value, source = targets.fqns[index], targets.values[index], targets.sources[index]
            assert source is not None
            entry = entries[source]
            # The usual case besides, spelt out as it is that of 10,000 tensors: contiguous, stored in one piece.
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
                self._plan_value(index, fqn, value, source)
                continue
            if isinstance(value, torch.Tensor):
                problem = misfit(value, entry, cast=self._cast)
                as_stored = index in targets.as_stored
                if as_stored and value.dtype is not entry.properties.dtype:
                    problem = "is of another dtype"
                if problem and as_stored and self._is_opaque(source, entry):
                    self._read_whole(index, fqn, source, entry)
                    continue
                if problem:
                    value = self._replace(index, fqn, value, entry, problem)
            elif (value is None or index in targets.as_stored) and self._is_opaque(source, entry):
                self._read_whole(index, fqn, source, entry)
                continue
            elif value is None or index in targets.as_stored:
                value = self._make(index, torch.empty(entry.size, dtype=entry.properties.dtype))
            else:
                self._plan_number(index, fqn, value, source, entry)
                continue
            if value is None:
                continue
            if value.dtype is not entry.properties.dtype:
                converted.append(fqn)
            if not (
                type(value) in PLAIN_TENSORS and value.layout is torch.strided and value.dtype not in QUANTIZED
            ) and (not is_sharded(value)):
                self._plan_opaque(index, fqn, source, entry)
            else:
                self._plan.tensors.extend(_read_tensor(self._pieces, fqn, source, value, entry))
        targets.assignments = self._find_assignments()
        return self._plan, self._problems

    def _is_opaque(self, source: str, entry: TensorStorageMetadata) -> bool:
        """Whether a tensor is stored whole, as `torch.save` wrote it, and not as a dense buffer of elements."""
        return len(entry.chunks) == 1 and (
            entry.properties.layout is not torch.strided or source in self._pieces.opaque
        )

    def _read_value(self, index: int, fqn: str, source: str, offsets: torch.Size | None) -> None:
        info = self._pieces.find(source, offsets)
        self._plan.values.append(ValueRead(fqn, index, info.relative_path, info.offset, info.length))

    def _read_whole(self, index: int, fqn: str, source: str, entry: TensorStorageMetadata) -> None:
        self._assigned.append(index)
        self._read_value(index, fqn, source, entry.chunks[0].offsets)

    def _plan_value(self, index: int, fqn: str, value: Any, source: str) -> None:
        if isinstance(value, torch.Tensor) and index not in self._targets.as_stored:
            if value.is_meta:
                self._make(index, _with_memory(value, self._targets.new_tensors.device_of(value)))
            elif problem := unfillable(value):
                self._problems.append(f"{fqn} {problem}")
                return
            self._plan.fills.append(index)
        self._assigned.append(index)
        self._read_value(index, fqn, source, None)

    def _plan_number(self, index: int, fqn: str, value: Any, source: str, entry: TensorStorageMetadata) -> None:
        if len(entry.size) or not isinstance(value, int | float):
            self._problems.append(f"{fqn} is a tensor in the checkpoint, {type(value).__name__} in the state dict")
            return
        self._plan.numbers.append(index)
        self._read_whole(index, fqn, source, entry)

    def _plan_opaque(self, index: int, fqn: str, source: str, entry: TensorStorageMetadata) -> None:
        if len(entry.chunks) != 1:
            self._problems.append(
                f"{fqn} is stored in {len(entry.chunks)} chunks, but a tensor of its kind can only be loaded from one"
            )
            return
        self._plan.opaque.append(index)
        self._read_whole(index, fqn, source, entry)

    def _replace(
        self, index: int, fqn: str, value: torch.Tensor, entry: TensorStorageMetadata, problem: str
    ) -> torch.Tensor | None:
        """Return a new tensor in place of one that cannot be filled; None, and a problem, where that must not be."""
        if torch.nn.parameter.is_lazy(value):
            return self._make(index, torch.empty(entry.size, dtype=entry.properties.dtype))
        if value.is_meta and not differs(value, entry, cast=self._cast):
            return self._make(index, _with_memory(value, self._targets.new_tensors.device_of(value)))
        if index not in self._targets.as_stored:
            self._problems.append(f"{fqn} {problem}")
            return None
        if isinstance(value, DTensor) and value.shape == entry.size:
            return self._make(index, torch.empty_like(value, dtype=entry.properties.dtype))
        device = self._targets.new_tensors.device_of(value)
        return self._make(index, torch.empty(entry.size, dtype=entry.properties.dtype, device=device))

    def _make(self, index: int, tensor: torch.Tensor) -> torch.Tensor:
        self._targets.values[index] = tensor
        self._assigned.append(index)
        return tensor

    def _find_assignments(self) -> dict[int, tuple[Any, Any]]:
        targets, finder = self._targets, Finder()
        roots = [*targets.rebuilt, *(path for _, _, ranks in targets.joined for path in ranks.values())]
        assignments: dict[int, tuple[Any, Any]] = {}
        for index in self._assigned:
            path = targets.paths[index]
            if any(path[: len(root)] == root for root in roots):
                continue
            _, container, key = finder.find(targets.states, path)
            if not isinstance(container, MutableMapping | list | PerRank):
                problem = f"{targets.fqns[index]} is in a {type(container).__name__}, which cannot be updated in place"
                raise ArgumentError("state_dict", problem)
            assignments[index] = container, key
        return assignments


def _with_memory(value: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor like one on the meta device, with memory."""
    if isinstance(value, DTensor):
        local = torch.empty_like(value.to_local(), device=device)
        return DTensor.from_local(
            local, value.device_mesh, value.placements, run_check=False, shape=value.shape, stride=value.stride()
        )
    return torch.empty_like(value, device=device)


def _read_tensor(
    pieces: ChunkIndex, fqn: str, source: str, tensor: torch.Tensor, entry: TensorStorageMetadata
) -> list[TensorRead]:
    if prod(entry.size) == 0:
        return []
    if type(tensor) in PLAIN_TENSORS and len(entry.chunks) == 1 and is_whole(entry):
        return [pieces.read(fqn, source, entry, entry.chunks[0], None, tensor)]
    return read_parts(pieces, fqn, source, placed_parts(tensor), entry)


def read_parts(
    pieces: ChunkIndex,
    fqn: str,
    source: str,
    parts: Sequence[tuple[torch.Tensor, ChunkStorageMetadata]],
    entry: TensorStorageMetadata,
) -> list[TensorRead]:
    """Return what is read for parts of a tensor, each given with where in the whole it is.

    Raises:
        CorruptError: the chunks do not make up the tensor, or the metadata does not say where one is.
    """
    if not isinstance(entry, IndexedTensor) and not is_whole(entry):
        problem = f"its {len(entry.chunks)} chunks do not cover its shape exactly: {tuple(entry.size)}"
        raise CorruptError(pieces.checkpoint_id, fqn, problem)
    reads = []
    for held, wanted in parts:
        near = TensorStorageMetadata(entry.properties, entry.size, chunks_over(entry, wanted))
        for item in create_read_items_for_chunk_list(fqn, near, [wanted]):
            assert item.storage_index.index is not None
            chunk = near.chunks[item.storage_index.index]
            if not prod(item.lengths):
                continue
            into = cut(held.detach(), (item.dest_offsets, item.lengths))
            part = None if item.lengths == chunk.sizes else (item.storage_offsets, item.lengths)
            reads.append(pieces.read(fqn, source, entry, chunk, part, into))
    return reads

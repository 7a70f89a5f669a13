"""Who writes what, as plain data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed.checkpoint.planner as dcp
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.tensor import DTensor

from .._format.dcp import KeyPath, Metadata
from .._format.extension import Containers
from .._format.layout import Layout
from .._state.capture import Capture
from .._state.sharding import holds_shards, shape_and_dtype
from .comparison import Comparison
from .cutting import Cut
from .sharing import SharingPlan

FROZEN_NBYTES = 1024  # about what a number takes with its framing

LeafKind = tuple[Any, ...] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalPlan:
    """What one rank could write: all that it holds, also what others hold too.

    Attributes:
        items: as a save planner made them.
        sources: of each item, which of the captured values it writes.
        frozen: which items were frozen at capture.
        paths: fqn -> keys.
        containers: what dotted names do not say of them.
        planner_data: what the caller's own planner adds for its global plan.
        cuts: of captured values, which are sources beyond them: large tensors, where files are pieces.
        piece_nbytes: of tensors in one file, at most; None where each rank has one file.
    """

    items: list[WriteItem]
    sources: list[int]
    frozen: set[int]
    paths: dict[str, KeyPath]
    containers: Containers = field(default_factory=Containers)
    planner_data: Any = None
    cuts: list[Cut] = field(default_factory=list)
    piece_nbytes: int | None = None


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
        containers: what dotted names do not say of them.
        sharing: which items several ranks hold.
    """

    shares: list[Share]
    kept: list[list[int]]
    plans: list[dcp.SavePlan]
    metadata: Metadata
    paths: dict[str, KeyPath] | None
    containers: Containers
    sharing: SharingPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class WritePlan:
    """What this rank writes for every state dict of one structure.

    Attributes:
        fqns: of all leaves, in the order of the state dict.
        kinds: of each leaf, type, dtype and shape if it is a tensor, and more if it is sharded; else None.
        paths: of each leaf, its keys.
        share: the items, and the file that they make.
        staged: of each staged item, which of the captured values it writes.
        frozen: of each frozen item, the index of its leaf.
        frozen_indices: of all leaves that were frozen, this rank's to write or not.
        items: of the caller's own planner's local plan.
        containers: what dotted names do not say of them.
        comparison: of what other ranks hold too.
        cuts: of captured values, which are to be added to them.
        piece_nbytes: of tensors in one file, at most; None where each rank has one file.
    """

    fqns: list[str]
    kinds: list[LeafKind]
    paths: list[KeyPath]
    share: Share
    staged: list[int]
    frozen: list[int]
    frozen_indices: set[int]
    items: list[WriteItem] | None
    containers: Containers
    comparison: Comparison
    cuts: list[Cut]
    piece_nbytes: int | None

    def fits(self, captured: Capture, piece_nbytes: int | None) -> bool:
        """Whether a state dict has the structure that this plan was made for: names, kinds, dtypes, shapes."""
        if self.piece_nbytes != piece_nbytes:
            return False
        if self.fqns != captured.fqns or self.paths != captured.paths or self.containers != captured.containers:
            return False
        if self.items != (None if captured.planned is None else captured.planned.items):
            return False
        for index, (kind, value) in enumerate(zip(self.kinds, captured.values, strict=False)):
            if not isinstance(value, torch.Tensor):
                if kind is not None and index not in captured.parts:
                    return False
            elif kind is None or kind[0] is not type(value) or kind[1] is not value.dtype or kind[2] != value.shape:
                return False
        if {index for index, kind in enumerate(self.kinds) if kind and len(kind) > 3} != captured.sharded.keys():
            return False
        if any(self.kinds[index] != sharded_kind(captured, index) for index in captured.sharded):
            return False
        return captured.frozen.keys() == self.frozen_indices


def sharded_kind(captured: Capture, index: int) -> LeafKind:
    """What makes two captures of a sharded tensor alike: all that its plan depends on."""
    value = captured.sharded[index]
    if isinstance(value, DTensor) and holds_shards(value):
        chunks = [(chunk.offsets, chunk.sizes) for chunk in value.__create_chunk_list__()]  # type: ignore[no-untyped-call]
        return type(value), value.dtype, value.shape, tuple(chunks)
    if isinstance(value, DTensor):
        local = captured.values[index]
        return type(local), local.dtype, local.shape, value.shape, value.placements, value.device_mesh
    shards = [(tuple(each.shard_offsets), tuple(each.shard_sizes)) for each in value.metadata().shards_metadata]
    held = [tuple(shard.metadata.shard_offsets) for shard in value.local_shards()]
    shape, dtype = shape_and_dtype(value)
    return type(value), dtype, shape, tuple(shards), tuple(held)


def tensor_kind(value: object) -> tuple[type, torch.dtype, torch.Size] | None:
    return (type(value), value.dtype, value.shape) if isinstance(value, torch.Tensor) else None

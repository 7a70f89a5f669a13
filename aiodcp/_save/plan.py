"""Who writes what, as plain data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch.distributed.checkpoint.planner as dcp
from torch.distributed.checkpoint.planner import WriteItem

from .._engine.gil_fairness import AT_ONCE
from .._format.dcp import KeyPath, Metadata
from .._format.extension import Containers
from .._format.layout import Layout
from .._state.capture import Capture
from .._state.sharding import LeafKind
from .comparison import Comparison
from .cutting import Cut
from .sharing import SharingPlan

FROZEN_NBYTES = 1024  # about what a number takes with its framing


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
        kinds: of each leaf, as of `Capture`.
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
        for start in range(0, len(self.kinds), AT_ONCE):
            if self.kinds[start : start + AT_ONCE] != captured.kinds[start : start + AT_ONCE]:
                return False
        return captured.frozen.keys() == self.frozen_indices

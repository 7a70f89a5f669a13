"""What a load reads."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed.checkpoint.planner as dcp

from .plan import TensorRead, ValueRead
from .small_reads import SmallReads


@dataclass(slots=True, kw_only=True)
class ReadPlan:
    """What a load reads.

    Attributes:
        tensors: parts of tensors.
        small: tensors that are read as columns.
        values: other values, and tensors that are not filled part by part.
        numbers: indices of numbers that are stored as tensors.
        fills: indices of tensors that are stored as numbers.
        opaque: indices of tensors that are filled as a whole, by themselves, or replaced.
        items: of the caller's own planner, to which the values' indices refer.
        resolved: of those the tensors', with what they are read into.
    """

    tensors: list[TensorRead]
    values: list[ValueRead]
    small: SmallReads | None = None
    numbers: list[int] = field(default_factory=list)
    fills: list[int] = field(default_factory=list)
    opaque: list[int] = field(default_factory=list)
    items: list[dcp.ReadItem] = field(default_factory=list)
    resolved: list[tuple[dcp.ReadItem, torch.Tensor]] = field(default_factory=list)

    def expand(self) -> None:
        """Put small tensors among the others, an object for each."""
        if self.small is not None:
            self.tensors.extend(self.small.as_reads())
            self.small = None

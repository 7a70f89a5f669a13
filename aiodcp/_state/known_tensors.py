"""What was seen of a state's tensors when it was last looked at: mostly it is still so.

To ask a tensor for its type, dtype, shape and place takes most of a microsecond in Python. `torch.compile` has the same
question, and code for it: `TensorGuards` compare hundreds of tensors with what they were in a single call, many times
as fast, and keep none of them alive. Source: torch/csrc/dynamo/guards.cpp.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any

import torch

from .plain_tensors import AT_ONCE, PLAIN_TENSORS, QUANTIZED, is_plain
from .sharding import LeafKind, tensor_kind
from .versions import versions_of

try:
    from torch._C._dynamo.guards import TensorGuards
except ImportError:  # it is private to torch: without it every tensor is looked at each time
    TensorGuards = None  # type: ignore[assignment, misc]

KEPT_STATES = 4  # of different numbers of values: those of one checkpoint take turns


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What is seen of the values of a state in one go.

    Attributes:
        odd: the indices of all that is not `is_plain`.
        kinds: what a plan depends on, of each value.
        versions: how often each was changed.
        devices: where those are that are plain, but for host memory.
    """

    odd: list[int]
    kinds: list[LeafKind]
    versions: list[int]
    devices: set[torch.device]


class KnownTensors:
    """The last looks at states, for the next. From any thread."""

    def __init__(self) -> None:
        self._known: dict[int, list[_Stretch]] = {}  # by the number of values

    def look(self, values: Sequence[Any]) -> Seen:
        """Look at every value once."""
        known = self._known.pop(len(values), [])
        stretches: list[_Stretch] = []
        odd: list[int] = []
        kinds: list[LeafKind] = []
        devices: set[torch.device] = set()
        for start in range(0, len(values), AT_ONCE):
            some = values[start : start + AT_ONCE]
            stretch = known[len(stretches)] if known else None
            if stretch is None or not stretch.is_still(some):
                stretch = _Stretch.of(some)
            stretches.append(stretch)
            odd += [start + index for index in stretch.odd]
            kinds += stretch.kinds
            devices |= stretch.devices
        self._known[len(values)] = stretches
        for number in [*self._known][:-KEPT_STATES]:
            self._known.pop(number, None)
        return Seen(odd=odd, kinds=kinds, versions=versions_of(values), devices=devices)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stretch:
    """What was seen of some of the values.

    Attributes:
        odd, kinds, devices: as of `Seen`.
        guards: of the tensors that are not odd; None if they cannot be recognized.
    """

    odd: list[int]
    kinds: list[LeafKind]
    devices: set[torch.device]
    guards: TensorGuards | None

    @classmethod
    def of(cls, values: Sequence[Any]) -> _Stretch:
        odd, kinds, devices = _look_at(values)
        has_odd_tensors = any(kinds[index] is not None for index in odd)  # which have to be looked at each time
        guards = None if has_odd_tensors else _guard([*compress(values, kinds)])
        return cls(odd=odd, kinds=kinds, devices=devices, guards=guards)

    def is_still(self, values: Sequence[Any]) -> bool:
        """Whether all of this is to be seen of `values`."""
        if self.guards is None or any(isinstance(values[index], torch.Tensor) for index in self.odd):
            return False
        return self.guards.check(*compress(values, self.kinds))


def _guard(tensors: Sequence[torch.Tensor]) -> TensorGuards | None:
    if TensorGuards is None or len({*map(id, tensors)}) < len(tensors):  # one that is there twice is never recognized
        return None
    try:
        return TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
    except TypeError:  # another torch may want other arguments
        return None


def _look_at(values: Sequence[Any]) -> tuple[list[int], list[LeafKind], set[torch.device]]:
    """Return what is odd, and kinds and devices: each is looked at once, for a second look takes as long."""
    odd: list[int] = []
    kinds: list[LeafKind] = []
    facts: set[tuple[torch.layout, torch.dtype, torch.device | bool]] = set()
    plain, add_kind, add_fact = PLAIN_TENSORS, kinds.append, facts.add
    for index, value in enumerate(values):
        kind = type(value)
        if kind in plain:
            dtype = value.dtype
            add_kind((kind, dtype, value.shape))
            add_fact((value.layout, dtype, value.is_cpu or value.device))  # a device takes longer to make
        else:
            odd.append(index)
            add_kind(tensor_kind(value))
    devices = {device for _, _, device in facts if isinstance(device, torch.device)}
    if torch.device("meta") not in devices and not any(
        layout is not torch.strided or dtype in QUANTIZED for layout, dtype, _ in facts
    ):
        return odd, kinds, devices
    odd = [index for index, value in enumerate(values) if type(value) not in plain or not is_plain(value)]
    others = {*odd}
    plain_ones = (value for index, value in enumerate(values) if index not in others)
    return odd, kinds, {value.device for value in plain_ones if not value.is_cpu}

"""A state dict at one instant, in the caller's thread."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress
from typing import Any

import torch
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.tensor import DTensor

from .._format.dcp import KeyPath
from .._format.extension import Containers
from ..errors import CaptureError
from .flatten import KnownNames, flatten
from .freeze import Frozen, freeze
from .plain_tensors import PLAIN_TENSORS, QUANTIZED, is_plain
from .sharding import ShardedTensor, holds_shards, is_sharded, local_parts
from .stateful import call_stateful


@dataclass(frozen=True, slots=True, kw_only=True)
class Capture:
    """A state dict taken apart; `fqns`, `paths` and `values` go in step.

    Attributes:
        fqns: dotted names.
        paths: the keys and list indices that lead to each value.
        values: the leaves themselves; of sharded ones the part that this rank holds. A `ShardedTensor` has any number
            of parts, which follow all leaves.
        frozen: for every leaf that is not staged, by index, its pickle; framed as `torch.save` does it or still bare.
        sharded: the leaves that are sharded, by index.
        parts: of each leaf with any number of parts, by index, where among the values its first part is.
        devices: where the tensors are that are staged.
        versions: of each value, how often it was changed; None if they are to be read one by one.
        containers: what dotted names do not say of them.
        planned: the plan of the caller's own planner, whose items are the leaves.
    """

    fqns: list[str]
    paths: list[KeyPath]
    values: list[Any]
    frozen: dict[int, Frozen]
    sharded: dict[int, DTensor | ShardedTensor]
    parts: dict[int, int]
    devices: set[torch.device]
    versions: list[int] | None = None
    containers: Containers = field(default_factory=Containers)
    planned: SavePlan | None = None

    @property
    def names(self) -> list[str]:
        """The name of each of `values`; of parts that of their leaf."""
        if not self.parts:
            return self.fqns
        starts = {start: self.fqns[index] for index, start in self.parts.items()}
        names = list(self.fqns)
        for index in range(len(names), len(self.values)):
            names.append(starts.get(index, names[-1]))
        return names

    def name_on(self, device: torch.device) -> str:
        """Return the name of a tensor on `device`."""
        on_it = (isinstance(value, torch.Tensor) and value.device == device for value in self.values)
        return next(compress(self.names, on_it))

    def leaf(self, index: int) -> Any:
        """Return a leaf as it stands in the state dict."""
        return self.sharded.get(index, self.values[index])


def capture(
    state_dict: Mapping[str, Any], rank: int = 0, *, may_be_empty: bool = False, names: KnownNames | None = None
) -> Capture:
    """Take `state_dict` apart.

    Args:
        state_dict: of the caller.
        rank: whose it is.
        may_be_empty: whether another rank may hold all of it.
        names: see `flatten`.

    Raises:
        ArgumentError: it is not a mapping.
        CaptureError: it is empty, a `state_dict()` raised, or a leaf cannot be saved.
    """
    leaves = flatten(call_stateful(state_dict), rank, names)
    fqns, values = leaves.fqns, leaves.values
    if not fqns and not leaves.containers.empty and not may_be_empty:
        raise nothing_to_save()
    seen = _look_at(values)
    odd, devices = seen.odd, seen.devices
    sharded = {index: values[index] for index in odd if is_sharded(values[index])}
    parts: dict[int, int] = {}
    frozen: dict[int, Frozen] = {}
    for index, value in sharded.items():
        held = local_parts(fqns[index], value)
        devices |= {part.device for part in held}
        if isinstance(value, DTensor) and not holds_shards(value):
            [values[index]] = held
            if not is_plain(held[0]) and not held[0].is_meta:
                frozen[index] = freeze(fqns[index], held[0])
        else:
            parts[index] = len(values)
            values[index] = None
            values += held
    frozen |= {index: freeze(fqns[index], values[index]) for index in odd if index not in sharded}
    return Capture(
        fqns=fqns,
        paths=leaves.paths,
        values=values,
        frozen=frozen,
        sharded=sharded,
        parts=parts,
        devices=devices,
        versions=seen.versions,
        containers=leaves.containers,
    )


@dataclass(frozen=True, slots=True)
class _Seen:
    """What is seen of the values of a state in one go.

    Attributes:
        odd: the indices of all but tensors that are only referred to (see `is_plain`).
        devices: where those are, but for host memory.
        versions: of each value, how often it was changed; None if they are to be read one by one.
    """

    odd: list[int]
    devices: set[torch.device]
    versions: list[int] | None


def _look_at(values: Sequence[Any]) -> _Seen:
    """Look at every value once: of 20,000 tensors none is in the cache, and each look takes 3 ms more."""
    odd: list[int] = []
    versions: list[int] = []
    facts: set[tuple[torch.layout, torch.dtype, torch.device | bool]] = set()
    plain, add_version, add_fact = PLAIN_TENSORS, versions.append, facts.add
    try:
        for index, value in enumerate(values):
            if type(value) in plain:
                add_version(value._version)
                add_fact((value.layout, value.dtype, value.is_cpu or value.device))  # a device takes longer to make
            else:
                odd.append(index)
                add_version(0)
    except RuntimeError:  # an inference tensor has no version
        versions = []
    devices = {device for _, _, device in facts if isinstance(device, torch.device)}
    if not versions or any(
        layout is not torch.strided or dtype in QUANTIZED or torch.device("meta") in devices
        for layout, dtype, _ in facts
    ):
        odd = [index for index, value in enumerate(values) if type(value) not in PLAIN_TENSORS or not is_plain(value)]
        others = set(odd)
        return _Seen(odd, {value.device for index, value in enumerate(values) if index not in others}, None)
    has_others = any(isinstance(values[index], torch.Tensor) for index in odd)
    return _Seen(odd, devices, None if has_others else versions)


def nothing_to_save() -> CaptureError:
    """Return the error for what is most likely a mistake, and would replace a checkpoint by nothing."""
    return CaptureError("", "the state dict contains nothing to save")

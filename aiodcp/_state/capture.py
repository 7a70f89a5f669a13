"""A state dict at one instant: taken in the caller's thread, its tensors looked at where that holds nobody up."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress
from typing import Any

import torch
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.tensor import DTensor

from .._format.dcp import KeyPath
from .._format.extension import Containers
from ..errors import CaptureError
from .flatten import KnownNames, Leaves, Walk
from .freeze import Frozen, freeze, ragged
from .known_tensors import KnownTensors
from .plain_tensors import PLAIN_TENSORS
from .sharding import (
    LeafKind,
    ShardedTensor,
    held_parts,
    holds_shards,
    is_sharded,
    local_parts,
    local_tensor,
    sharded_kind,
)
from .stateful import call_stateful
from .versions import version_of

# Values, up to which a state's tensors are looked at in the caller's thread: it takes one or two milliseconds, and to
# ask another thread takes one. A sharded tensor counts as several.
SMALL = 4000

SHORT = 64  # values: what is computed of so many takes about a millisecond

SHARDED = 6

SAMPLED = 500  # tensors of a large state, of which it is known that they were not changed before they were looked at


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
        kinds: of each leaf, what the plan depends on.
        versions: of each of the values, how often it was changed.
        devices: where the tensors are that are staged.
        containers: what dotted names do not say of them.
        planned: the plan of the caller's own planner, whose items are the leaves.
    """

    fqns: list[str]
    paths: list[KeyPath]
    values: list[Any]
    frozen: dict[int, Frozen]
    sharded: dict[int, DTensor | ShardedTensor]
    parts: dict[int, int]
    kinds: list[LeafKind]
    versions: list[int]
    devices: set[torch.device]
    containers: Containers = field(default_factory=Containers)
    planned: SavePlan | None = None

    @property
    def is_short(self) -> bool:
        """Whether to work on it takes no longer than to ask a thread to."""
        return len(self.values) <= SHORT

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
        return _name_on(device, self.names, self.values)

    def leaf(self, index: int) -> Any:
        """Return a leaf as it stands in the state dict."""
        return self.sharded.get(index, self.values[index])


@dataclass(frozen=True, slots=True, kw_only=True)
class Instant:
    """What a state dict is at one instant, but for its tensors, which do not change until they are staged.

    To look at a tensor that is in no cache takes most of a microsecond, and to name one as long: both are done later,
    and elsewhere.

    Attributes:
        values: the leaves.
        named: returns them with their names.
        frozen: as of `Capture`, of what is no tensor or a tensor of a class of its own.
        sharded: as of `Capture`.
        devices: where some of the tensors are, or all, if it is small.
        versions: of some of the tensors, by index, how often they were changed.
        planned: as of `Capture`.
        odd_keys: names of mappings whose keys a checkpoint keeps as text only.
    """

    values: list[Any]
    named: Callable[[], Leaves]
    frozen: dict[int, Frozen]
    sharded: dict[int, DTensor | ShardedTensor]
    devices: set[torch.device]
    versions: dict[int, int]
    planned: SavePlan | None = None
    odd_keys: Sequence[str] = ()

    @classmethod
    def of(
        cls,
        values: list[Any],
        named: Callable[[], Leaves],
        frozen: dict[int, Frozen],
        sharded: dict[int, DTensor | ShardedTensor],
        planned: SavePlan | None = None,
        odd_keys: Sequence[str] = (),
    ) -> Instant:
        """Return what this instant is, given what is frozen of it and what is sharded."""
        some = {index: values[index] for index in range(0, len(values), len(values) // SAMPLED + 1)}
        return cls(
            values=values,
            named=named,
            frozen=frozen,
            sharded=sharded,
            devices=_devices_of(values if len(values) <= SMALL else some.values()),
            versions={index: version_of(value) for index, value in some.items() if type(value) in PLAIN_TENSORS},
            planned=planned,
            odd_keys=odd_keys,
        )

    @property
    def is_small(self) -> bool:
        """Whether its tensors are looked at here and now, rather than in another thread."""
        return len(self.values) + (SHARDED - 1) * len(self.sharded) <= SMALL

    def name_on(self, device: torch.device) -> str:
        """Return the name of a tensor on `device`."""
        return _name_on(device, self.named().fqns, self.values)

    def look(self, known: KnownTensors | None = None, wait_for_devices: Callable[[], None] = lambda: None) -> Capture:
        """Look at the tensors, and keep none of them here. Once, from any thread.

        Args:
            known: what was seen of the state before.
            wait_for_devices: called before tensors are pickled: in another thread than the caller's until those have
                been computed.

        Raises:
            CaptureError: one of them cannot be saved.
        """
        leaves = self.named()
        fqns, values, frozen = leaves.fqns, [*self.values], dict(self.frozen)
        self.values.clear()  # the caller may free them when all is staged
        parts: dict[int, int] = {}
        for index, value in self.sharded.items():
            held = local_parts(fqns[index], value)
            if isinstance(value, DTensor) and not holds_shards(value):
                [values[index]] = held
            else:
                parts[index] = len(values)
                values[index] = None
                values += held
        try:
            seen = (known or KnownTensors()).look(values)
        except RuntimeError as error:  # as a nested tensor does that is asked for its shape
            for fqn, value in zip(fqns, values, strict=False):
                if isinstance(value, torch.Tensor) and value.is_nested:
                    raise ragged(fqn) from error
            raise
        named = {*frozen, *parts, *range(len(fqns), len(values))}
        if odd := [index for index in seen.odd if index not in named]:
            wait_for_devices()
        frozen |= {index: freeze(fqns[index], values[index]) for index in odd}
        for index, value in self.sharded.items():
            seen.kinds[index] = sharded_kind(value, values[index])
        return Capture(
            fqns=fqns,
            paths=leaves.paths,
            values=values,
            frozen=frozen,
            sharded=self.sharded,
            parts=parts,
            kinds=seen.kinds[: len(fqns)],
            versions=seen.versions,
            devices=seen.devices,
            containers=leaves.containers,
            planned=self.planned,
        )


def capture(
    state_dict: Mapping[str, Any], rank: int = 0, *, may_be_empty: bool = False, names: KnownNames | None = None
) -> Capture:
    """Take `state_dict` apart, as `take` and `look` do; raises what they raise."""
    return take(state_dict, rank, may_be_empty=may_be_empty, names=names).look()


def take(
    state_dict: Mapping[str, Any], rank: int = 0, *, may_be_empty: bool = False, names: KnownNames | None = None
) -> Instant:
    """Take `state_dict` as it is now, in the caller's thread.

    Args:
        state_dict: of the caller.
        rank: whose it is.
        may_be_empty: whether another rank may hold all of it.
        names: see `Walk`.

    Raises:
        ArgumentError: it is not a mapping.
        CaptureError: it is empty, a `state_dict()` raised, or a leaf cannot be saved.
    """
    walk = Walk(call_stateful(state_dict), rank, names)
    values = walk.values
    if not values and not may_be_empty and not walk.leaves().containers.empty:
        raise nothing_to_save()
    frozen: dict[int, Frozen] = {}
    sharded: dict[int, DTensor | ShardedTensor] = {}
    if others := walk.kinds - PLAIN_TENSORS:
        for index in compress(range(len(values)), map(others.__contains__, map(type, values))):
            value = values[index]
            if is_sharded(value):
                sharded[index] = value
            else:
                frozen[index] = freeze(walk.fqn(index), value)
    return Instant.of(values, walk.leaves, frozen, sharded, odd_keys=[".".join(map(str, p)) for p in walk.odd_keys()])


def _devices_of(values: Iterable[Any]) -> set[torch.device]:
    """Return the devices on which tensors are that are staged, but for host memory."""
    tensors: list[torch.Tensor] = []
    for value in values:
        if type(value) in PLAIN_TENSORS:
            tensors.append(value)
        elif is_sharded(value):
            tensors += [local_tensor(value)] if type(value) is DTensor else held_parts(value)
    return {tensor.device for tensor in tensors if not tensor.is_cpu}


def _name_on(device: torch.device, names: Sequence[str], values: Sequence[Any]) -> str:
    on_it = (isinstance(value, torch.Tensor) and value.device == device for value in values)
    return next(compress(names, on_it), "a tensor")


def nothing_to_save() -> CaptureError:
    """Return the error for what is most likely a mistake, and would replace a checkpoint by nothing."""
    return CaptureError("", "the state dict contains nothing to save")

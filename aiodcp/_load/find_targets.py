"""Finding what a load is to fill: the leaves of the caller's state dict."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from itertools import compress
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint.planner import LoadPlanner
from torch.distributed.checkpoint.stateful import Stateful

from .._engine.device_copies import CopyStreams, DeviceCopies
from .._engine.gc_pause import gc_paused
from .._engine.gil_fairness import AT_ONCE
from .._format.dcp import Metadata, TensorStorageMetadata
from .._state.capture import SAMPLED, SHORT
from .._state.flatten import Leaves, Walk
from .._state.freeze import refuse_nested
from .._state.optimizers import find_optimizer, is_optimizer_state, keys_of, parameters_of
from .._state.per_rank import PerRank
from .._state.plain_tensors import PLAIN_TENSORS, devices_of
from .._state.sharding import ShardedTensor, held_parts
from .._state.stateful import call_stateful, is_stateful
from .._state.structure import find
from ..errors import ArgumentError, CaptureError, LoadError
from .optimizer_plan import allocate
from .targets import LoadTargets, NewTensorDevice, ObjectKind, OptimizerScope

_IS_META = attrgetter("is_meta")

_PLAIN_LEAVES = (torch.Tensor, int, float, str, bytes, type(None))


class Taken(NamedTuple):
    """What is to be filled, taken from the caller's state dict.

    Attributes:
        find: looks at it, once, from any thread; it raises what `take_targets` does.
        is_short: whether that takes no longer than to ask a thread to.
    """

    find: Callable[[], LoadTargets]
    is_short: bool


def take_targets(
    state_dict: MutableMapping[str, Any], rank: int, planner: LoadPlanner | None, streams: CopyStreams
) -> Taken:
    """Take what is to be filled of `state_dict`. In the caller's thread.

    Raises:
        ArgumentError: it takes no values, or has an object inside that is only looked for at the top level.
        LoadError: a `state_dict()` raised.
    """
    if planner is not None and not isinstance(planner, LoadPlanner):
        raise ArgumentError("planner", f"must be a LoadPlanner, got {type(planner).__name__}")
    if not isinstance(state_dict, MutableMapping):
        raise ArgumentError("state_dict", f"must be a mutable mapping such as a dict, got {type(state_dict).__name__}")
    try:
        called = call_stateful(state_dict)
        states = dict(called)
        with gc_paused():
            walk = Walk(states, rank)
    except CaptureError as error:
        raise LoadError(str(error)) from error.__cause__
    tops = states if called is state_dict else dict(state_dict)
    new_tensors = NewTensorDevice()
    filled = _Filled(walk, tops, new_tensors)
    copies = None
    if torch.accelerator.current_accelerator() is not None:  # whose streams are marked now
        copies = filled.begin_copies(streams)
    taken = [filled]  # until it is looked at: else the caller's thread would free it all

    def find() -> LoadTargets:
        filled = taken.pop()
        walk = filled.walk
        with gc_paused():
            leaves = walk.leaves()
        owners = {str(key): _held(value) for key, value in tops.items()}
        if not all(issubclass(kind, _PLAIN_LEAVES) for kind in walk.kinds):
            _refuse_objects(leaves)
        begun = filled.begin_copies(streams) if copies is None else copies
        filled.add_devices(begun)
        return _find_targets(states, owners, leaves, begun, new_tensors, planner)

    return Taken(find, len(walk.values) <= SHORT)


def _refuse_objects(leaves: Leaves) -> None:
    for fqn, value in zip(leaves.fqns, leaves.values, strict=True):
        if not isinstance(value, _PLAIN_LEAVES) and (found := _object_in(value)) is not None:
            raise ArgumentError("state_dict", str(refuse_nested(fqn, value, found)))


def _find_targets(
    states: dict[str, Any],
    owners: Mapping[str, Any],
    leaves: Leaves,
    copies: DeviceCopies,
    new_tensors: NewTensorDevice,
    planner: LoadPlanner | None,
) -> LoadTargets:
    optimizers = [
        OptimizerScope(path=path, state=state, optimizer=_optimizer_of(owners[str(path[0])], str(path[-1]), state))
        for path in leaves.optimizers
        if is_optimizer_state(state := find(states, path)[0])
    ]
    if is_optimizer_state(states):
        optimizers.append(OptimizerScope(path=(), state=states, optimizer=None))
    return LoadTargets(
        states=states,
        kinds={name: _kind_of(owner) for name, owner in owners.items()},
        optimizers=optimizers,
        per_rank=leaves.per_rank,
        fqns=leaves.fqns,
        paths=leaves.paths,
        values=leaves.values,
        device_copies=copies,
        new_tensors=new_tensors,
        planner=planner,
    )


def _held(value: Any) -> Any:
    return value.value if type(value) is PerRank else value


class _Filled:
    """The tensors that a load may fill, as this rank holds them, and where they are."""

    def __init__(self, walk: Walk, tops: Mapping[Any, Any], new_tensors: NewTensorDevice) -> None:
        self.walk: Walk = walk
        self._tops = tops
        self._new_tensors = new_tensors
        self._plain: list[torch.Tensor] = []
        self._known: set[torch.device] = set()

    def begin_copies(self, streams: CopyStreams) -> DeviceCopies:
        """Begin the copies to all that is filled; of many plain tensors only some are asked where they are.

        Raises:
            LoadError: the current stream of a device captures a graph.
            ArgumentError: as `CopyStreams.begin`.
        """
        parameters = [
            each
            for owner in map(_held, self._tops.values())
            if isinstance(owner, torch.optim.Optimizer)
            for each in _params(owner)
        ]
        filled = [*self.walk.values, *parameters]
        self._plain = plain = _chosen(filled, lambda some: map(PLAIN_TENSORS.__contains__, map(type, some)))
        tensors = _chosen(plain, lambda some: map(_IS_META, some))
        if len(plain) < len(filled):
            tensors += [each for each in filled if type(each) not in PLAIN_TENSORS and isinstance(each, torch.Tensor)]
        if sharded := [value for value in tensors if isinstance(value, ShardedTensor)]:  # these have no `device`
            tensors = [value for value in tensors if not isinstance(value, ShardedTensor)]
            tensors += [part for value in sharded for part in held_parts(value)]
        others = {self._new_tensors.device_of(tensor) for tensor in tensors if not tensor.is_cpu}
        self._known = devices_of(plain[:: len(plain) // SAMPLED + 1]) | others
        try:
            return streams.begin(self._known, self._name_on)
        except CaptureError as error:
            raise LoadError(str(error)) from error

    def add_devices(self, copies: DeviceCopies) -> None:
        """Ask all tensors where they are. From any thread."""
        copies.add(devices_of(self._plain) - self._known, self._name_on)

    def _name_on(self, device: torch.device) -> str:
        for fqn, value in zip(self.walk.leaves().fqns, self.walk.values, strict=True):
            parts = held_parts(value) if isinstance(value, ShardedTensor) else [value]
            if any(isinstance(part, torch.Tensor) and self._new_tensors.device_of(part) == device for part in parts):
                return fqn
        return "a parameter of an optimizer"


def _chosen(values: Sequence[Any], are_chosen: Callable[[Sequence[Any]], Iterable[bool]]) -> list[Any]:
    """Return those that are chosen, of some at a time: no other thread has the GIL meanwhile."""
    chosen: list[Any] = []
    for start in range(0, len(values), AT_ONCE):
        some = values[start : start + AT_ONCE]
        chosen += compress(some, are_chosen(some))
    return chosen


def _object_in(value: object) -> object | None:
    """Return an object whose `state_dict()` would not be called."""
    if isinstance(value, list | tuple):
        return next(filter(None, map(_object_in, value)), None)
    return value if not isinstance(value, type) and isinstance(value, Stateful) else None


def _kind_of(owner: object) -> ObjectKind:
    if not is_stateful(owner):
        return "plain"
    if isinstance(owner, torch.nn.Module):
        return "module"
    return "optimizer" if isinstance(owner, torch.optim.Optimizer) else "stateful"


def _optimizer_of(owner: Any, name: str, state: Mapping[str, Any]) -> torch.optim.Optimizer | None:
    if isinstance(owner, torch.optim.Optimizer):
        return owner
    return find_optimizer(owner, name, state) if is_stateful(owner) else None


def _params(optimizer: torch.optim.Optimizer) -> Iterable[torch.Tensor]:
    return (each for group in optimizer.param_groups for each in group["params"])


def allocate_optimizers(targets: LoadTargets, metadata: Metadata) -> None:
    """Put into optimizers' states that are still empty a target for all that is stored of them: for a planner."""
    for scope in targets.optimizers:
        if scope.state["state"] or len(scope.path) != 1:
            continue
        states: dict[Any, Any] = scope.state["state"]
        keys = {str(key): key for group in scope.state["param_groups"] for key in keys_of(group) or ()}
        live = parameters_of(scope.state["param_groups"], scope.optimizer)
        for fqn, path in (metadata.planner_data or {}).items():
            entry = metadata.state_dict_metadata.get(fqn)
            if entry is not None and len(path) == 4 and path[:2] == (*scope.path, "state") and path[2] in keys:
                key = keys[path[2]]
                room = allocate(entry, live.get(key)) if isinstance(entry, TensorStorageMetadata) else None
                states.setdefault(key, {})[path[3]] = room

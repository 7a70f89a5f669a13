"""What a load is to fill: the leaves of the caller's state dict, and how they reach their containers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.checkpoint.planner import LoadPlanner
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.tensor import DTensor

from ._capture import (
    Leaves,
    Path,
    PerRank,
    call_stateful,
    flatten,
    held_parts,
    is_stateful,
    per_rank_key,
    refuse_nested,
    short_names,
)
from ._devices import CopyStreams, DeviceCopies
from ._matching import LoadReport
from ._optimizer_state import allocate, find_optimizer, is_optimizer_state, keys_of, parameters_of
from ._structure import find, like, rebuild
from .errors import ArgumentError, CaptureError, LoadError, StatefulError
from .metadata import Metadata, TensorStorageMetadata

Kind = Literal["module", "optimizer", "stateful", "plain"]

_PLAIN_LEAVES = (torch.Tensor, int, float, str, bytes, type(None))


class Home:
    """Where a thread makes new tensors. Asked in the caller's thread: both settings are a thread's own."""

    def __init__(self) -> None:
        self._default = torch.get_default_device()
        self._index: int | None = None

    def place_of(self, value: torch.Tensor) -> torch.device:
        """Return where a tensor is, or is to be made if it is on the meta device: on its mesh, or as new ones are."""
        if not value.is_meta:
            return value.device
        device = torch.device(value.device_mesh.device_type) if isinstance(value, DTensor) else self._default
        if device.type == "meta":
            return torch.device("cpu")
        if device.type == "cpu" or device.index is not None:
            return device
        if self._index is None:  # first asked when the copies are begun, in the caller's thread
            self._index = torch.accelerator.current_device_index()
        return torch.device(device.type, self._index)


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerScope:
    """A mapping in the shape of an optimizer's state dict.

    Attributes:
        path: where it is.
        state: the mapping.
        optimizer: whose it is, if that is known.
    """

    path: Path
    state: Mapping[str, Any]
    optimizer: torch.optim.Optimizer | None


@dataclass(slots=True, kw_only=True)
class LoadTargets:
    """What a load is to fill. `fqns`, `paths`, `values` and `sources` go in step: one place a leaf.

    Attributes:
        states: the state dict, `Stateful` values replaced by their state.
        kinds: what the values of the top level are, by name.
        optimizers: where optimizers' state dicts are.
        per_rank: where each rank has a value of its own.
        fqns, paths: names of the leaves, and the keys that lead to them.
        values: what is there now: tensors to fill, and anything else.
        sources: by which name they are stored; None for a value that stays.
        device_copies: brings tensors to devices.
        home: where the caller's thread makes new tensors, and which of the accelerators it uses.
        as_stored: places whose stored value need not fit what is there.
        holders: of places whose value is put into a container when all is read, that container, and the key there.
        rebuilt: paths of containers that are made anew.
        empty, int_keys: what is known of these: see `ContainerNotes`.
        joined: values of all ranks, of which a function makes this rank's: path of it, `PerRank`, and by rank where
            the values are.
        loaded: new values, by place.
        report: what was left out or converted.
        planner: the caller's own, which puts everything into `states` itself.
    """

    states: dict[str, Any]
    kinds: dict[str, Kind]
    optimizers: list[OptimizerScope]
    per_rank: list[tuple[Path, PerRank]]
    fqns: list[str]
    paths: list[Path]
    values: list[Any]
    device_copies: DeviceCopies
    home: Home
    sources: list[str | None] = field(default_factory=list)
    as_stored: set[int] = field(default_factory=set)
    holders: dict[int, tuple[Any, Any]] = field(default_factory=dict)
    rebuilt: list[Path] = field(default_factory=list)
    empty: list[Path] = field(default_factory=list)
    int_keys: set[Path] = field(default_factory=set)
    joined: list[tuple[Path, PerRank, dict[int, Path]]] = field(default_factory=list)
    loaded: dict[int, Any] = field(default_factory=dict)
    report: LoadReport = field(default_factory=LoadReport)
    planner: LoadPlanner | None = None
    _made: dict[Path, Any] = field(default_factory=dict)

    def fresh(self) -> LoadTargets:
        """Return the same wishes, to be planned anew."""
        return LoadTargets(
            states=self.states,
            kinds=self.kinds,
            optimizers=self.optimizers,
            per_rank=self.per_rank,
            fqns=list(self.fqns),
            paths=list(self.paths),
            values=list(self.values),
            device_copies=self.device_copies,
            home=self.home,
            planner=self.planner,
        )

    def value(self, place: int) -> Any:
        """Return what is to be in a place: what was loaded, or the tensor that was filled."""
        return self.loaded[place] if place in self.loaded else self.values[place]

    def rebuild(self) -> None:
        """Make the containers anew that are to be as they were saved. All values are there."""
        for path, per_rank, ranks in self.joined:
            values = {rank: self._rebuild(base, None) for rank, base in ranks.items()}
            assert callable(per_rank.new_rank)
            self._made[path] = per_rank.new_rank(values)
        for path in self.rebuilt:
            self._made[path] = self._rebuild(path, find(self.states, path)[0])

    def _rebuild(self, path: Path, template: Any) -> Any:
        length = len(path)
        items = [(each, self.value(place)) for place, each in enumerate(self.paths) if each[:length] == path]
        return rebuild(path, items, template, self.empty, self.int_keys)

    def hand_over(self, state_dict: MutableMapping[str, Any], *, absent: set[str]) -> None:
        """Put all that was loaded where it belongs, and give objects their state. In the caller's thread.

        Args:
            state_dict: the caller's.
            absent: names of the top level of which nothing is stored: nothing is given to them.

        Raises:
            StatefulError: an object refused its state.
        """
        for place, (holder, key) in self.holders.items():
            _assign(holder, key, self.value(place))
        for path, made in self._made.items():
            there, holder, key = find(self.states, path)
            if self.kinds.get(str(path[0])) == "plain" and type(there) is type(made) and isinstance(made, dict | list):
                there.clear()  # the caller may hold it elsewhere, too
                there.extend(made) if isinstance(made, list) else there.update(made)
            else:
                _assign(holder if holder is not None else self.states, key, made)
        for key in sorted(self.states, key=str):
            state = self.states[key]
            if key not in state_dict:  # put there by a planner
                state_dict[key] = state
                continue
            target, loaded = state_dict[key], state
            if isinstance(target, PerRank) and isinstance(state, PerRank) and target is not state:
                if not is_stateful(target.value):
                    target.value = state.value
                    continue
                target, loaded = target.value, state.value
            if target is not loaded and isinstance(target, Stateful):
                if str(key) not in absent:
                    _give_state(str(key), target, loaded)
            elif target is not state:
                state_dict[key] = state


def _assign(holder: Any, key: Any, value: Any) -> None:
    if isinstance(holder, PerRank):
        holder.value = value
    else:
        holder[key] = value


def _give_state(name: str, target: Any, state: Any) -> None:
    options: dict[str, Any] = {}
    if isinstance(target, torch.nn.Module):
        now = target.state_dict()
        if names := short_names(target, now):
            whole = like(now)  # with the versions of the modules, which are attributes of it
            whole.update((long, state[short]) for long, short in names.items() if short in state)
            state = whole
        if any(isinstance(each, torch.Tensor) and each.is_meta for each in now.values()):
            options["assign"] = True  # a copy into a tensor without memory would do nothing
    try:
        target.load_state_dict(state, **options)
    except Exception as error:
        raise StatefulError(name, f"load_state_dict() of {type(target).__name__} raised {error!r}") from error


def find_targets(
    state_dict: MutableMapping[str, Any], rank: int, planner: LoadPlanner | None, streams: CopyStreams
) -> LoadTargets:
    """Return what is to be filled of `state_dict`. In the caller's thread.

    Raises:
        ArgumentError: it takes no values, or has an object inside that is only looked for at the top level.
        LoadError: a `state_dict()` raised.
    """
    if planner is not None and not isinstance(planner, LoadPlanner):
        raise ArgumentError("planner", f"a {type(planner).__name__} is no LoadPlanner")
    if not isinstance(state_dict, MutableMapping):
        raise ArgumentError("state_dict", f"a {type(state_dict).__name__} takes no values: pass a dict")
    try:
        states = call_stateful(state_dict)
        leaves = flatten(states, rank)
    except CaptureError as error:
        raise LoadError(str(error)) from error.__cause__
    for fqn, value in zip(leaves.fqns, leaves.values, strict=True):
        if not isinstance(value, _PLAIN_LEAVES) and (found := _object_in(value)) is not None:
            raise ArgumentError("state_dict", str(refuse_nested(fqn, value, found)))
    owners = {str(key): value.value if type(value) is PerRank else value for key, value in state_dict.items()}
    kinds = {name: _kind_of(owner) for name, owner in owners.items()}
    optimizers = [
        OptimizerScope(path=path, state=state, optimizer=_optimizer_of(owners[str(path[0])], str(path[-1]), state))
        for path in leaves.optimizers
        if is_optimizer_state(state := find(states, path)[0])
    ]
    parameters: list[torch.Tensor] = [
        each for owner in owners.values() if isinstance(owner, torch.optim.Optimizer) for each in _params(owner)
    ]
    home = Home()
    return LoadTargets(
        states=states,
        kinds=kinds,
        optimizers=optimizers,
        per_rank=leaves.per_rank,
        fqns=leaves.fqns,
        paths=leaves.paths,
        values=leaves.values,
        device_copies=_begin_copies(leaves, parameters, streams, home),
        home=home,
        planner=planner,
    )


def _begin_copies(leaves: Leaves, parameters: Sequence[torch.Tensor], streams: CopyStreams, home: Home) -> DeviceCopies:
    """Begin the copies to all that is filled, as this rank holds it."""
    tensors = [value for value in (*leaves.values, *parameters) if isinstance(value, torch.Tensor)]
    if sharded := [value for value in tensors if isinstance(value, ShardedTensor)]:  # these do not tell where they are
        tensors = [value for value in tensors if not isinstance(value, ShardedTensor)]
        tensors += [part for value in sharded for part in held_parts(value)]
    devices = {home.place_of(tensor) for tensor in tensors if not tensor.is_cpu}

    def name_on(device: torch.device) -> str:
        for fqn, value in zip(leaves.fqns, leaves.values, strict=True):
            parts = held_parts(value) if isinstance(value, ShardedTensor) else [value]
            if any(isinstance(part, torch.Tensor) and home.place_of(part) == device for part in parts):
                return fqn
        return "a parameter of an optimizer"

    try:
        return streams.begin(devices, name_on)
    except CaptureError as error:
        raise LoadError(str(error)) from error


def _object_in(value: object) -> object | None:
    """Return an object that has a `state_dict()` and nobody would ask for it."""
    if isinstance(value, list | tuple):
        return next(filter(None, map(_object_in, value)), None)
    return value if not isinstance(value, type) and isinstance(value, Stateful) else None


def _kind_of(owner: object) -> Kind:
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


def own_path(base: Path, rank: int) -> Path:
    """Return where this rank's own value lies."""
    return (*base, per_rank_key(rank))


def allocate_optimizers(targets: LoadTargets, metadata: Metadata) -> None:
    """Put into optimizers' states that are still empty a place for all that is stored of them: for a planner."""
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

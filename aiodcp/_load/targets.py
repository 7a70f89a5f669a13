"""What a load is to fill, and how it reaches the caller's containers."""

from __future__ import annotations

from collections.abc import Collection, Mapping, MutableMapping
from dataclasses import dataclass, field
from itertools import compress, repeat
from operator import is_, is_not
from typing import Any, Literal

import torch
from torch.distributed.checkpoint.planner import LoadPlanner
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.tensor import DTensor

from .._engine.device_copies import DeviceCopies
from .._engine.gil_fairness import let_go
from .._format.dcp import KeyPath
from .._state.capture import SHORT
from .._state.per_rank import PerRank, per_rank_key
from .._state.stateful import is_stateful, short_names
from .._state.structure import find, like, rebuild
from ..errors import StatefulError
from .report import LoadReport

_ABSENT = object()

ObjectKind = Literal["module", "optimizer", "stateful", "plain"]


class NewTensorDevice:
    """Where a thread makes new tensors. Asked in the caller's thread: both settings are a thread's own."""

    def __init__(self) -> None:
        self._default = torch.get_default_device()
        self._index: int | None = None

    def device_of(self, value: torch.Tensor) -> torch.device:
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

    path: KeyPath
    state: Mapping[str, Any]
    optimizer: torch.optim.Optimizer | None


@dataclass(slots=True, kw_only=True)
class LoadTargets:
    """What a load is to fill. `fqns`, `paths`, `values` and `sources` go in step: one entry a leaf.

    Attributes:
        states: the state dict, `Stateful` values replaced by their state.
        kinds: what the values of the top level are, by name.
        optimizers: where optimizers' state dicts are.
        per_rank: where each rank has a value of its own.
        fqns, paths: names of the leaves, and the keys that lead to them.
        values: what is there now: tensors to fill, and anything else.
        sources: by which name they are stored; None for a value that stays.
        device_copies: brings tensors to devices.
        new_tensors: where the caller's thread makes new tensors, and which of the accelerators it uses.
        as_stored: indices whose stored value need not fit what is there.
        assignments: of indices whose value is put into a container when all is read, that container, and the key there.
        rebuilt: paths of containers that are made anew.
        empty, int_keys: what is known of these: see `Containers`.
        joined: values of all ranks, of which a function makes this rank's: path of it, `PerRank`, and by rank where
            the values are.
        loaded: new values, by index.
        report: what was left out or converted.
        planner: the caller's own, which puts everything into `states` itself.
    """

    states: dict[str, Any]
    kinds: dict[str, ObjectKind]
    optimizers: list[OptimizerScope]
    per_rank: list[tuple[KeyPath, PerRank]]
    fqns: list[str]
    paths: list[KeyPath]
    values: list[Any]
    device_copies: DeviceCopies
    new_tensors: NewTensorDevice
    sources: list[str | None] = field(default_factory=list)
    as_stored: set[int] = field(default_factory=set)
    assignments: dict[int, tuple[Any, Any]] = field(default_factory=dict)
    rebuilt: list[KeyPath] = field(default_factory=list)
    empty: list[KeyPath] = field(default_factory=list)
    int_keys: set[KeyPath] = field(default_factory=set)
    joined: list[tuple[KeyPath, PerRank, dict[int, KeyPath]]] = field(default_factory=list)
    loaded: dict[int, Any] = field(default_factory=dict)
    report: LoadReport = field(default_factory=LoadReport)
    planner: LoadPlanner | None = None
    _made: dict[KeyPath, Any] = field(default_factory=dict)

    @property
    def is_short(self) -> bool:
        """Whether to work on them takes no longer than to ask a thread to."""
        return len(self.fqns) <= SHORT

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
            new_tensors=self.new_tensors,
            planner=self.planner,
        )

    def value(self, index: int) -> Any:
        """Return the value for a leaf: what was loaded, or the tensor that was filled."""
        return self.loaded[index] if index in self.loaded else self.values[index]

    def keep_only_new(self) -> None:
        """Keep only what `hand_over` needs: the caller's thread is not to free the rest."""
        for index in self.assignments:
            self.loaded[index] = self.value(index)
        for each in (self.fqns, self.paths, self.values, self.sources):
            let_go(each)

    def rebuild(self) -> None:
        """Make the containers anew that are to be as they were saved. All values are there."""
        for path, per_rank, ranks in self.joined:
            values = {rank: self._rebuild(base, None) for rank, base in ranks.items()}
            assert callable(per_rank.new_rank)
            self._made[path] = per_rank.new_rank(values)
        for path in self.rebuilt:
            self._made[path] = self._rebuild(path, find(self.states, path)[0])

    def _rebuild(self, path: KeyPath, template: Any) -> Any:
        length = len(path)
        items = [(each, self.value(index)) for index, each in enumerate(self.paths) if each[:length] == path]
        return rebuild(path, items, template, self.empty, self.int_keys)

    def hand_over(self, state_dict: MutableMapping[str, Any], *, absent: set[str]) -> None:
        """Put all that was loaded where it belongs, and give objects their state. In the caller's thread.

        Args:
            state_dict: the caller's.
            absent: names of the top level of which nothing is stored: nothing is given to them.

        Raises:
            StatefulError: an object refused its state.
        """
        for index, (container, key) in self.assignments.items():
            _assign(container, key, self.value(index))
        for path, made in self._made.items():
            there, container, key = find(self.states, path)
            is_plain = not path or self.kinds.get(str(path[0])) == "plain"
            if is_plain and type(there) is type(made) and isinstance(made, dict | list):
                there.clear()  # the caller may hold it elsewhere, too
                there.extend(made) if isinstance(made, list) else there.update(made)
            else:
                _assign(container if container is not None else self.states, key, made)
        if _are_same(state_dict, self.states) and _are_same(state_dict.values(), self.states.values()):
            return  # all was filled in place: of many names it takes long to look for each
        before = map(state_dict.get, self.states, repeat(_ABSENT))
        for key in sorted(compress(self.states, map(is_not, self.states.values(), before)), key=str):
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


def _are_same(those: Collection[Any], others: Collection[Any]) -> bool:
    return len(those) == len(others) and all(map(is_, those, others))


def _assign(container: Any, key: Any, value: Any) -> None:
    if isinstance(container, PerRank):
        container.value = value
    else:
        container[key] = value


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


def own_path(base: KeyPath, rank: int) -> KeyPath:
    """Return where this rank's own value lies."""
    return (*base, per_rank_key(rank))

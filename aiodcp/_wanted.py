"""What a load is to fill: the leaves of the caller's state dict, and who holds them."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch.distributed.checkpoint.planner import LoadPlanner
from torch.distributed.tensor import DTensor

from ._capture import Path, PerRank, call_stateful, flatten
from ._devices import CopyStreams, Crossing
from .errors import ArgumentError, CaptureError, LoadError
from .metadata import Metadata, TensorStorageMetadata


@dataclass(slots=True, kw_only=True)
class Wanted:
    """What a load is to fill: the leaves of a state dict.

    Attributes:
        states: the state dict, `Stateful` values replaced by their state.
        lazy: optimizers that have no state yet, by their key.
        fqns, paths, values: the leaves, in step.
        crossing: brings tensors to devices.
        holders: of each leaf that is no tensor, by place, the container that holds it, and its key there.
        loaded: new values of those leaves, by place.
        planner: the caller's own, which puts everything into `states` itself.
    """

    states: dict[str, Any]
    lazy: dict[str, torch.optim.Optimizer]
    fqns: list[str]
    paths: list[Path]
    values: list[Any]
    crossing: Crossing
    holders: dict[int, tuple[Any, Any]] = field(default_factory=dict)
    loaded: dict[int, Any] = field(default_factory=dict)
    planner: LoadPlanner | None = None


def grow_optimizers(metadata: Metadata, wanted: Wanted) -> None:
    """Put into optimizer states that are still empty a place for everything that the checkpoint has for them."""
    for fqn, steps in (metadata.planner_data or {}).items():
        entry = metadata.state_dict_metadata.get(fqn)
        if entry and len(steps) == 4 and steps[0] in wanted.lazy and steps[1] == "state" and str(steps[2]).isdecimal():
            number = int(steps[2])  # of the parameter
            room: torch.Tensor | None = None
            if isinstance(entry, TensorStorageMetadata):
                groups = wanted.lazy[steps[0]].param_groups
                parameter = next(islice((each for group in groups for each in group["params"]), number, None), None)
                if isinstance(parameter, DTensor) and parameter.shape == entry.size:  # sharded as its parameter is
                    room = torch.zeros_like(parameter, dtype=entry.properties.dtype, requires_grad=False)
                else:
                    room = torch.empty(entry.size, dtype=entry.properties.dtype)
            wanted.states[steps[0]]["state"].setdefault(number, {})[steps[3]] = room


def find_holders(
    state_dict: Mapping[str, Any], fqns: Sequence[str], paths: Sequence[Path], values: Sequence[Any]
) -> dict[int, tuple[Any, Any]]:
    """Return for every value that will be replaced, by its place, the container that holds it and its key there.

    Raises:
        ArgumentError: names a value in a container that takes no other.
    """
    keys: dict[int, dict[str, Any]] = {}  # of mappings whose keys are no strings: paths have them as text, as in DCP
    holders: dict[int, tuple[Any, Any]] = {}
    for number, (fqn, path, value) in enumerate(zip(fqns, paths, values, strict=True)):
        if isinstance(value, torch.Tensor):
            continue
        holder: Any = None
        key: Any = None
        below: Any = state_dict
        for step in path:
            holder, key = below, step
            if isinstance(holder, PerRank):
                key = "value"
                below = holder.value
                continue
            if isinstance(holder, Mapping) and step not in holder:
                if id(holder) not in keys:
                    keys[id(holder)] = {str(each): each for each in holder}
                key = keys[id(holder)][str(step)]
            below = holder[key]
        if not isinstance(holder, MutableMapping | list | PerRank):
            raise ArgumentError("state_dict", f"{fqn} is in a {type(holder).__name__}, which takes no new value")
        holders[number] = holder, key
    return holders


def want(state_dict: MutableMapping[str, Any], rank: int, planner: LoadPlanner | None, streams: CopyStreams) -> Wanted:
    if planner is not None and not isinstance(planner, LoadPlanner):
        raise ArgumentError("planner", f"a {type(planner).__name__} is no LoadPlanner")
    if not isinstance(state_dict, MutableMapping):
        raise ArgumentError("state_dict", f"a {type(state_dict).__name__} takes no values: pass a dict")
    try:
        states = call_stateful(state_dict)
    except CaptureError as error:
        raise LoadError(str(error)) from error.__cause__
    lazy = {
        key: value
        for key, value in state_dict.items()
        if isinstance(value, torch.optim.Optimizer) and not states[key]["state"]
    }
    fqns, paths, values = flatten(states, rank)
    return Wanted(
        states=states,
        lazy=lazy,
        fqns=fqns,
        paths=paths,
        values=values,
        crossing=streams.begin(values, fqns),
        planner=planner,
    )

"""How the state dict of an optimizer is loaded: by torch's rules, checked before anything changes.

As `Optimizer.load_state_dict` has it, the groups' options are those that were saved, and a parameter's state may be
absent, or present as a whole, in the checkpoint as well as in the optimizer. Checked here, and not there: that it is an
optimizer of the same parameters, by their names where both have them, and else by their number and shapes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from .._format.dcp import BytesStorageMetadata, KeyPath, TensorStorageMetadata
from .._state.optimizers import keys_of, parameters_of
from .._state.stateful import COMPILED
from .conversion import is_lossy

Entry = TensorStorageMetadata | BytesStorageMetadata

SHOWN = 5  # names in one message

STATE_KEYS = {"state", "param_groups"}  # of an optimizer's state dict; others are its class's own

_OWN = {"params", "param_names"}  # of a group: the optimizer's own, whatever was saved


@dataclass(slots=True, kw_only=True)
class OptimizerPlan:
    """What becomes of an optimizer's state dict.

    Attributes:
        targets: of what is loaded, path as saved -> the tensor or number that is there; None to have it as saved.
        paths: path as saved -> path now, where they differ.
        kept: values that stay what they are, by path.
        int_keys: whether parameters are known by numbers.
        problems: why it cannot be loaded.
    """

    targets: dict[KeyPath, Any] = field(default_factory=dict)
    paths: dict[KeyPath, KeyPath] = field(default_factory=dict)
    kept: dict[KeyPath, Any] = field(default_factory=dict)
    int_keys: bool = True
    problems: list[str] = field(default_factory=list)


def prefix_of(base: KeyPath) -> str:
    """Return how the names begin of what lies below a path; nothing is before them where it is the whole state."""
    return "".join(f"{step}." for step in base)


def group_fqns(base: KeyPath, fqns: Iterable[str]) -> list[str]:
    """Return the names of the options of an optimizer's groups, given where its state dict is."""
    start = f"{prefix_of(base)}param_groups"
    return [fqn for fqn in fqns if fqn == start or fqn.startswith(f"{start}.")]


def plan_optimizer(
    base: KeyPath,
    live: Mapping[str, Any],
    optimizer: torch.optim.Optimizer | None,
    stored: Mapping[KeyPath, Entry],
    groups: Sequence[Mapping[str, Any]],
    *,
    cast: bool,
) -> OptimizerPlan:
    """Plan how an optimizer's state dict is loaded.

    Args:
        base: where it is.
        live: as it is now.
        optimizer: whose it is, if that is known.
        stored: what the checkpoint has below `base`, by path.
        groups: the groups as saved, values read.
        cast: whether conversions that lose are allowed.
    """
    name = ".".join(map(str, base)) or "the state dict"
    own = live["param_groups"]
    plan = OptimizerPlan(int_keys=all(type(each) is int for group in own for each in keys_of(group) or ()))
    if len(own) != len(groups):
        plan.problems.append(
            f"{name} has {len(groups)} parameter groups in the checkpoint, {len(own)} in the state dict"
        )
        return plan
    matched = _match_groups(name, own, groups, plan)
    if plan.problems:
        return plan
    keys: dict[str, Any] = {}  # as saved, as text -> as it is now
    for number, (mine, match) in enumerate(zip(own, matched, strict=True)):
        keys.update({str(saved): now for saved, now in match.keys.items()})
        _plan_group(plan, (*base, "param_groups"), number, mine, match.number, groups[match.number], stored)
    parameters = parameters_of(own, optimizer)
    is_known = type(optimizer).__module__.startswith("torch.")
    _plan_states(plan, base, live["state"], parameters, keys, stored, cast=cast, is_known=is_known)
    return plan


def has_same_parameters(own: Sequence[Mapping[str, Any]], saved: Sequence[Mapping[str, Any]]) -> bool:
    """Whether two lists of groups have the same parameters under the same keys, in the same order."""
    return len(own) == len(saved) and all(
        (mine := keys_of(group, key)) is None or list(mine) == list(keys_of(other, key) or ())
        for group, other in zip(own, saved, strict=True)
        for key in _OWN
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Match:
    """A group of the checkpoint's that belongs to one of the optimizer's.

    Attributes:
        number: of the checkpoint's.
        keys: of its parameters, as saved -> as they are now.
    """

    number: int
    keys: dict[Any, Any]


def _match_groups(
    name: str, own: Sequence[Mapping[str, Any]], groups: Sequence[Mapping[str, Any]], plan: OptimizerPlan
) -> list[_Match]:
    mine, theirs = ([_names_of(group) for group in each] for each in (own, groups))
    if all(mine) and all(theirs):
        return _match_by_name(name, own, groups, [*filter(None, mine)], [*filter(None, theirs)], plan)
    matched = []
    for number, (group, saved) in enumerate(zip(own, groups, strict=True)):
        before = keys_of(saved) or ()
        now = keys_of(group)
        if now is None:
            now = before
        if len(now) != len(before):
            plan.problems.append(
                f"{name}.param_groups.{number} has {len(before)} parameters in the checkpoint, "
                f"{len(now)} in the state dict"
            )
        matched.append(_Match(number=number, keys=dict(zip(before, now, strict=False))))
    return matched


def _match_by_name(
    name: str,
    own: Sequence[Mapping[str, Any]],
    groups: Sequence[Mapping[str, Any]],
    mine: Sequence[Sequence[str]],
    theirs: Sequence[Sequence[str]],
    plan: OptimizerPlan,
) -> list[_Match]:
    """Match groups that hold the same parameters, in whatever order."""
    lacking = sorted({each for names in mine for each in names} - {each for names in theirs for each in names})
    unknown = sorted({each for names in theirs for each in names} - {each for names in mine for each in names})
    if lacking or unknown:
        parts = [
            f"{what} {', '.join(names[:SHOWN])}{f' and {len(names) - SHOWN} more' if len(names) > SHOWN else ''}"
            for what, names in (("lacks", lacking), ("also has", unknown))
            if names
        ]
        plan.problems.append(f"{name} has other parameters: the checkpoint {' and '.join(parts)}")
        return []
    by_names = {frozenset(names): number for number, names in enumerate(theirs)}
    matched = []
    for number, names in enumerate(mine):
        found = by_names.get(frozenset(names))
        if found is None:
            plan.problems.append(f"{name}.param_groups.{number} does not match a parameter group of the checkpoint")
            continue
        saved = dict(zip(theirs[found], groups[found]["params"], strict=True))
        keys = {saved[each]: now for each, now in zip(names, own[number]["params"], strict=True)}
        matched.append(_Match(number=found, keys=keys))
    return matched


def _names_of(group: Mapping[str, Any]) -> list[str] | None:
    """Return the names of a group's parameters, without wrappers'; None if they have none."""
    params = keys_of(group)
    names = keys_of(group, "param_names") or params
    if params is None or names is None or len(names) != len(params) or not all(isinstance(each, str) for each in names):
        return None
    return [each.replace(COMPILED, "").removeprefix("module.") for each in names]


def _plan_group(
    plan: OptimizerPlan,
    base: KeyPath,
    number: int,
    own: Mapping[str, Any],
    saved_number: int,
    saved: Mapping[str, Any],
    stored: Mapping[KeyPath, Entry],
) -> None:
    """Options as saved; those that were not saved as the optimizer has them; parameters always its own."""
    here, there = (*base, number), (*base, saved_number)
    own_names = {key for key in _OWN if keys_of(own, key) is not None}
    for path in stored:
        if path[: len(there)] == there and len(path) > len(there) and path[len(there)] not in own_names:
            plan.targets[path] = None
            plan.paths[path] = (*here, *path[len(there) :])
    if base in stored:  # the groups as one value, as torch before 2.4 saved them
        for key, value in saved.items():
            if key not in own_names:
                plan.kept[*here, key] = value
    for key, value in own.items():
        if key in own_names or key not in saved:
            plan.kept[*here, key] = value


def _plan_states(
    plan: OptimizerPlan,
    base: KeyPath,
    live: Mapping[Any, Any],
    parameters: Mapping[Any, torch.Tensor],
    keys: Mapping[str, Any],
    stored: Mapping[KeyPath, Entry],
    *,
    cast: bool,
    is_known: bool,
) -> None:
    start = (*base, "state")
    by_parameter: dict[str, dict[KeyPath, Entry]] = {}
    for path, entry in stored.items():
        if path[: len(start)] == start and len(path) > len(start):
            by_parameter.setdefault(str(path[len(start)]), {})[path] = entry
    for saved, entries in by_parameter.items():
        key = keys.get(saved, saved)  # of no parameter: torch keeps such a state as it is
        own = live.get(key)
        parameter = parameters.get(key)
        if isinstance(own, Mapping) and own and (*start, saved) not in entries:
            plan.problems += _partial(start, key, own, entries)
        elif own is None and parameter is not None and parameter.is_meta:
            plan.problems.append(
                f"{'.'.join(map(str, (*start, key)))} is of a parameter on the meta device: load the model first, and "
                "make the optimizer of the parameters that it has then"
            )
        elif own is None and parameter is not None:
            plan.problems += _other_parameter(
                start, key, parameter, parameters.values(), entries, cast=cast, is_known=is_known
            )
        for path, entry in entries.items():
            now = (*start, str(key), *path[len(start) + 1 :])
            if now != path:
                plan.paths[path] = now
            target = _at(own, path[len(start) + 1 :])
            if isinstance(entry, BytesStorageMetadata):
                plan.targets[path] = target if isinstance(target, torch.Tensor) and not target.dim() else None
            elif isinstance(target, torch.Tensor | int | float):
                plan.targets[path] = target
            else:
                plan.targets[path] = allocate(entry, parameter)


def _partial(start: KeyPath, key: Any, own: Mapping[Any, Any], entries: Mapping[KeyPath, Entry]) -> Iterator[str]:
    """Yield what keeps two states of one parameter from being of one kind: moments that only one of them has."""
    names = {str(path[len(start) + 1]) for path in entries}
    now = set(map(str, own))
    name = ".".join(map(str, (*start, key)))
    for each, value in own.items():
        if isinstance(value, torch.Tensor) and value.dim() and str(each) not in names:
            yield f"{name}.{each} is in the state dict, and not among what the checkpoint has of this parameter"
    for path, entry in entries.items():
        if isinstance(entry, TensorStorageMetadata) and len(entry.size) and str(path[len(start) + 1]) not in now:
            yield f"{name}.{path[len(start) + 1]} is in the checkpoint, and not among what the optimizer has of it"


def _other_parameter(
    start: KeyPath,
    key: Any,
    parameter: torch.Tensor,
    parameters: Collection[torch.Tensor],
    entries: Mapping[KeyPath, Entry],
    *,
    cast: bool,
    is_known: bool,
) -> Iterator[str]:
    """Yield why a state cannot be that of a parameter which has none yet, given whether the optimizer is torch's."""
    moments = {
        path: entry for path, entry in entries.items() if isinstance(entry, TensorStorageMetadata) and len(entry.size)
    }
    total = sum(each.numel() for each in parameters)  # LBFGS keeps moments of all parameters with the first
    if moments and not any(
        _is_related(entry.size, parameter.shape)
        or entry.size.numel() == total
        or (not is_known and {*entry.size} & {*parameter.shape})  # of low rank, or a factor for each dimension
        for entry in moments.values()
    ):
        path, entry = next(iter(moments.items()))
        name = ".".join(map(str, (*start, key, *path[len(start) + 1 :])))
        yield f"{name} has shape {tuple(entry.size)} in the checkpoint, its parameter {tuple(parameter.shape)}"
    for path, entry in moments.items():
        dtype = entry.properties.dtype
        if not cast and dtype.is_floating_point and parameter.is_floating_point() and is_lossy(dtype, parameter.dtype):
            name = ".".join(map(str, (*start, key, *path[len(start) + 1 :])))
            yield (
                f"{name} is {dtype} in the checkpoint, its parameter {parameter.dtype}, to which the optimizer "
                "converts it: a lossy conversion, which cast=True allows"
            )


def _is_related(size: torch.Size, shape: torch.Size) -> bool:
    """Whether a moment may belong to a parameter: of its shape, as many elements, or with some dimensions summed up."""
    return size.numel() == shape.numel() or (
        len(size) == len(shape) and all(one in (1, other) for one, other in zip(size, shape, strict=True))
    )


def allocate(entry: TensorStorageMetadata, parameter: torch.Tensor | None) -> torch.Tensor:
    """Make room for a moment: sharded as its parameter is, and where that is."""
    dtype = entry.properties.dtype
    if isinstance(parameter, DTensor) and parameter.shape == entry.size:
        return torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
    return torch.empty(entry.size, dtype=dtype)


def _at(own: Any, steps: KeyPath) -> Any:
    """Return what lies below a parameter's state; None if nothing does."""
    for step in steps:
        if isinstance(own, list):
            own = own[step] if isinstance(step, int) and step < len(own) else None
        elif isinstance(own, Mapping):
            own = own.get(step)
        else:
            return None
    return own

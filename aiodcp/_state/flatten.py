"""From a nested state dict to named leaves, as DCP names them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .._format.dcp import KeyPath
from .._format.extension import Containers
from ..errors import CaptureError
from .per_rank import PerRank, per_rank_key
from .plain_tensors import PLAIN_TENSORS

# Of a mapping: its keys, their types, fqns, paths.
KnownNames = dict[KeyPath, tuple[tuple[Any, ...], set[type], list[str], list[KeyPath]]]

MANY = 64  # tensors, from which on it is quicker to compare their keys with known ones than to make their names

SHOWN = 80  # characters of a name that is too long


@dataclass(frozen=True, slots=True)
class Leaves:
    """The leaves of a state dict: names, paths and values, in step and in its order.

    Attributes:
        optimizers: where mappings are that have the shape of an optimizer's state dict.
        per_rank: where values are of which each rank has its own.
    """

    fqns: list[str]
    paths: list[KeyPath]
    values: list[Any]
    containers: Containers
    optimizers: list[KeyPath]
    per_rank: list[tuple[KeyPath, PerRank]]


def flatten(state_dict: Mapping[str, Any], rank: int = 0, names: KnownNames | None = None) -> Leaves:
    """Return names, paths and leaves, in the order of the state dict.

    Args:
        state_dict: what to walk.
        rank: whose it is.
        names: those of the state before, and then of this one: large mappings have the same in the next save.

    Raises:
        CaptureError: it is nested deeper than Python's recursion limit, or contains itself.
    """
    names = {} if names is None else names
    used: KnownNames = {}
    fqns: list[str] = []
    paths: list[KeyPath] = []
    values: list[Any] = []
    containers = Containers()
    optimizers: list[KeyPath] = []
    per_rank: list[tuple[KeyPath, PerRank]] = []

    here = ""

    def walk(prefix: str, path: KeyPath, items: Iterable[tuple[Any, Any]], *, listed: bool) -> None:
        nonlocal here
        here = prefix
        for key, value in items:
            step = key if listed else str(key)
            if type(value) not in PLAIN_TENSORS:
                if type(value) is PerRank:
                    per_rank.append(((*path, step), value))
                    walk(f"{prefix}{key}.", (*path, step), [(per_rank_key(rank), value.value)], listed=False)
                    continue
                if isinstance(value, Mapping):
                    if not value:
                        containers.empty.append((*path, step))
                    elif type(next(iter(value))) is int and all(type(each) is int for each in value):
                        containers.int_keys.append((*path, step))
                    elif "param_groups" in value and "state" in value:
                        optimizers.append((*path, step))
                    walk_mapping(f"{prefix}{key}.", (*path, step), value)
                    continue
                if isinstance(value, list) and not _is_leaf(value):
                    walk(f"{prefix}{key}.", (*path, step), enumerate(value), listed=True)
                    continue
            fqns.append(f"{prefix}{key}")
            paths.append((*path, step))
            values.append(value)

    def walk_mapping(prefix: str, path: KeyPath, mapping: Mapping[Any, Any]) -> None:
        if len(mapping) < MANY or not PLAIN_TENSORS.issuperset(map(type, mapping.values())):
            walk(prefix, path, mapping.items(), listed=False)
            return
        keys = tuple(mapping)
        kinds = set(map(type, keys))  # equal keys of another type have other names: 1 and True
        known = names.get(path)
        if known is None or known[:2] != (keys, kinds) or len(kinds) > 1:
            known = keys, kinds, [f"{prefix}{key}" for key in keys], [(*path, str(key)) for key in keys]
        used[path] = known
        fqns.extend(known[2])
        paths.extend(known[3])
        values.extend(mapping.values())

    try:
        walk_mapping("", (), state_dict)
    except RecursionError as error:
        raise CaptureError(f"{here[:SHOWN]}...", "is nested too deeply, or contains itself") from error
    names.clear()
    names.update(used)
    return Leaves(fqns, paths, values, containers, optimizers, per_rank)


def _is_leaf(values: list[Any]) -> bool:
    """Whether DCP keeps this list whole: it holds no tensor, and no list or mapping that does."""
    return not any(
        isinstance(value, (torch.Tensor, Mapping, PerRank)) or (isinstance(value, list) and not _is_leaf(value))
        for value in values
    )

"""`Stateful` values of the top level, and the names that wrappers put into theirs."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.tensor import DTensor

from ..errors import ArgumentError, CaptureError
from .per_rank import PerRank
from .plain_tensors import PLAIN_TENSORS

StateDict = dict[str, Any]

_NEVER_STATEFUL = {*PLAIN_TENSORS, DTensor, dict, list, tuple, int, float, str, bytes, bool, type(None)}

COMPILED = "_orig_mod."  # what torch.compile puts into the names of what it wraps


def call_stateful(state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return `state_dict`, or a dict like it with each `Stateful` of its top level replaced by its state, as DCP does.

    They are asked in the order of their names, so that ranks whose dicts have another order meet in collectives.
    """
    if not isinstance(state_dict, Mapping):
        problem = f'must be a mapping such as {{"model": model}}, got {type(state_dict).__name__}'
        raise ArgumentError("state_dict", problem)
    if _NEVER_STATEFUL.issuperset(map(type, state_dict.values())):
        return state_dict
    called: StateDict = dict(state_dict)
    for key in sorted([key for key, value in called.items() if type(value) not in _NEVER_STATEFUL], key=str):
        value = called[key]
        stateful = value.value if type(value) is PerRank else value
        if is_stateful(stateful):
            try:
                state = stateful.state_dict()
            except Exception as error:
                raise CaptureError(str(key), f"state_dict() of {type(stateful).__name__} raised {error!r}") from error
            if isinstance(stateful, torch.nn.Module):
                state = without_wrappers(stateful, state)
            called[key] = PerRank(state, new_rank=value.new_rank) if type(value) is PerRank else state
    return called


def is_stateful(value: object) -> bool:
    """Whether a value of the top level is asked for its `state_dict()`."""
    return type(value) not in _NEVER_STATEFUL and isinstance(value, Stateful)


def without_wrappers(module: torch.nn.Module, state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a module's state under the names that it has without `torch.compile` and data-parallel wrappers."""
    names = short_names(module, state)
    if names is None:
        return state
    return OrderedDict((short, state[name]) for name, short in names.items())


def short_names(module: torch.nn.Module, names: Iterable[str]) -> dict[str, str] | None:
    """Return names as they are without wrappers, by the names that they have; None if there are no wrappers."""
    prefix, inner = "", module
    while True:
        if isinstance(inner, torch.nn.parallel.DistributedDataParallel | torch.nn.DataParallel):
            prefix, inner = f"{prefix}module.", inner.module
        elif "_orig_mod" in inner._modules:
            prefix, inner = f"{prefix}{COMPILED}", inner._modules["_orig_mod"]  # type: ignore[assignment]
        else:
            break
    if not prefix and COMPILED not in "\0".join(names):
        return None
    short = {name: name.removeprefix(prefix).replace(COMPILED, "") for name in names}
    return short if len(set(short.values())) == len(short) else None

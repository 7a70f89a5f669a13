"""State dicts of optimizers: their shape, and the optimizer that one belongs to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.distributed.checkpoint.stateful import Stateful

from .sharding import is_sharded

SEARCHED = 1000  # objects among which an optimizer is looked for


def is_optimizer_state(value: object) -> bool:
    """Whether a container has the shape of an optimizer's state dict."""
    return (
        isinstance(value, Mapping)
        and isinstance(value.get("param_groups"), list)
        and isinstance(value.get("state"), Mapping)
    )


def keys_of(group: Mapping[str, Any], key: str = "params") -> Sequence[Any] | None:
    """Return the keys of a group's parameters; None where there is something else, which stands for no wish."""
    found = group.get(key)
    return found if isinstance(found, list | tuple) else None


def parameters_of(own: Sequence[Mapping[str, Any]], optimizer: torch.optim.Optimizer | None) -> dict[Any, torch.Tensor]:
    """Return the parameters, by the keys that the state dict has for them."""
    if optimizer is None:
        return {}
    found: dict[Any, torch.Tensor] = {}
    for group, live in zip(own, optimizer.param_groups, strict=False):
        found.update(zip(keys_of(group) or (), live["params"], strict=False))
    return found


def find_optimizer(owner: Stateful, name: str, state: Mapping[str, Any]) -> torch.optim.Optimizer | None:
    """Return the optimizer of which an object's `state_dict()` has returned a state, from its attributes.

    A state dict does not say where its parameters are, and how they are sharded. It has the very objects that are the
    options of the optimizer's groups. Of several optimizers that are alike it is the one that has the state's name.
    """
    found = [(each, known) for known, each in _optimizers_below(owner) if _is_state_of(state, each)]
    if len(found) > 1:
        found = [each for each in found if each[1] == name]
    return found[0][0] if len(found) == 1 else None


def _is_state_of(state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> bool:
    groups = state["param_groups"]
    return len(groups) == len(optimizer.param_groups) and all(
        len(group.get("params", ())) == len(live["params"])
        and all(live.get(key) is value for key, value in group.items() if key != "params")
        for group, live in zip(groups, optimizer.param_groups, strict=True)
    )


def _optimizers_below(owner: object) -> Iterator[tuple[str, torch.optim.Optimizer]]:
    """Yield the optimizers that an object holds, with the name of the attribute or key."""
    seen: set[int] = set()
    pending: list[tuple[str, object]] = [("", owner)]
    while pending and len(seen) < SEARCHED:
        name, each = pending.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, torch.optim.Optimizer):
            yield name, each
        elif isinstance(each, Mapping):
            pending += [(str(key), value) for key, value in each.items()]
        elif isinstance(each, list | tuple | set):
            pending += [(name, value) for value in each]
        elif not isinstance(each, torch.nn.Module | torch.Tensor | type) and not is_sharded(each):
            pending += getattr(each, "__dict__", {}).items()

"""A state dict at one instant, captured apart by a caller's own `SavePlanner`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner

from .._format.extension import Containers
from .._format.plain_data import unsafe_in_archive
from ..errors import CaptureError
from .capture import Instant
from .flatten import Leaves, flatten
from .freeze import Frozen, checksums, freeze
from .plain_tensors import is_plain
from .stateful import call_stateful


def take_planned(state_dict: Mapping[str, Any], planner: SavePlanner, *, is_coordinator: bool) -> Instant:
    """Take `state_dict` as it is now, as `planner` takes it apart: every item of its local plan is a leaf.

    Raises:
        CaptureError: the planner raised, or an item is not what it says.
    """
    states = dict(call_stateful(state_dict))
    leaves = flatten(states)
    for name, value in zip(leaves.fqns, leaves.values, strict=True):
        if not isinstance(value, torch.Tensor | int | float | str | bytes | None):
            freeze(name, value)  # raises for what would not come back
    fqn = ""
    values: list[Any] = []
    frozen: dict[int, Frozen] = {}
    try:
        planner.set_up_planner(states, is_coordinator=is_coordinator)
        plan = _whole_plan(planner)
        for index, item in enumerate(plan.items):
            fqn = item.index.fqn
            with checksums():
                data = planner.resolve_data(item)
            if not isinstance(data, torch.Tensor):
                archive = bytes(data.getbuffer())
                frozen[index] = Frozen(archive, True, tuple(unsafe_in_archive(archive)))
            elif not is_plain(data):
                frozen[index] = freeze(fqn, data)
            values.append(data)
    except CaptureError:
        raise
    except Exception as error:
        raise CaptureError(fqn, f"{type(planner).__name__} raised {error!r}") from error
    for item, value in zip(plan.items, values, strict=True):
        if (item.tensor_data is None) is isinstance(value, torch.Tensor):
            raise CaptureError(item.index.fqn, f"planned as {item.type.name}, resolved as a {type(value).__name__}")
        if item.tensor_data is not None:
            planned = item.tensor_data.properties.dtype, tuple(item.tensor_data.chunk.sizes)
            if planned != (value.dtype, tuple(value.shape)):
                problem = f"planned as {planned}, resolved as {(value.dtype, tuple(value.shape))}"
                raise CaptureError(item.index.fqn, problem)
    fqns = [item.index.fqn for item in plan.items]
    named = Leaves(fqns, [], values, Containers(), [], [])
    return Instant.of(values, lambda: named, frozen, {}, plan)


def _whole_plan(planner: SavePlanner) -> SavePlan:
    """Return a planner's local plan, also of one that keeps plans and would only say "as before".

    Which plans are kept, and when, is this library's business: it keeps them by its own rules.
    """
    if getattr(planner, "_enable_plan_caching", False):
        planner._enable_plan_caching = False  # type: ignore[attr-defined]
    plan = planner.create_local_plan()
    if not plan.usable:
        problem = f"{type(planner).__name__} returned a plan that says only that nothing has changed (usable=False)"
        raise CaptureError("", problem)
    return plan

"""A caller's own `SavePlanner` or `LoadPlanner`, called as `torch.distributed.checkpoint` calls it.

What it plans and resolves takes the place of the leaves of the state dict; all else goes its usual way.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.planner import LoadPlan as DcpLoadPlan

from ._capture import Capture, Frozen, call_stateful, checksums, flatten, freeze, is_plain
from ._dtypes import loses
from ._plain_data import unsafe_in_archive
from ._reads import LoadPlan, PieceFinder, ValueRead
from .errors import CaptureError, CorruptError, LoadError, MismatchError
from .metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata


def capture_planned(state_dict: Mapping[str, Any], planner: SavePlanner, *, is_coordinator: bool) -> Capture:
    """Take `state_dict` apart as `planner` does: every item of its local plan is a leaf.

    Raises:
        CaptureError: the planner raised, or an item is not what it says.
    """
    states = call_stateful(state_dict)
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
        for place, item in enumerate(plan.items):
            fqn = item.index.fqn
            with checksums():
                data = planner.resolve_data(item)
            if not isinstance(data, torch.Tensor):
                archive = bytes(data.getbuffer())
                frozen[place] = Frozen(archive, True, tuple(unsafe_in_archive(archive)))
            elif not is_plain(data):
                frozen[place] = freeze(fqn, data)
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
    return Capture(
        fqns=[item.index.fqn for item in plan.items],
        paths=[],
        values=values,
        frozen=frozen,
        sharded={},
        parts={},
        devices={value.device for value in values if isinstance(value, torch.Tensor)},
        planned=plan,
    )


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


def plan_local_load(
    planner: LoadPlanner, states: dict[str, Any], metadata: Metadata, *, is_coordinator: bool
) -> DcpLoadPlan:
    """Ask `planner` what this rank wants.

    Raises:
        LoadError: the planner raised.
    """
    try:
        planner.set_up_planner(states, metadata, is_coordinator)
        return planner.create_local_plan()
    except Exception as error:
        raise LoadError(f"{type(planner).__name__} raised {error!r}") from error


def plan_reads(
    planner: LoadPlanner, plan: DcpLoadPlan, metadata: Metadata, *, checkpoint_id: str, cast: bool
) -> LoadPlan:
    """Find the pieces that the items of `plan` ask for.

    Raises:
        MismatchError: a target has not the shape of its item, or a dtype that loses.
        CorruptError: the metadata does not say where a piece is.
    """
    pieces = PieceFinder(metadata, checkpoint_id)
    made = LoadPlan(tensors=[], values=[])
    problems: list[str] = []
    for place, item in enumerate(plan.items):
        fqn = item.storage_index.fqn
        entry = metadata.state_dict_metadata.get(fqn)
        if item.type is LoadItemType.BYTE_IO and isinstance(entry, BytesStorageMetadata):
            info = pieces.find(fqn, None)
            made.values.append(ValueRead(fqn, place, info.relative_path, info.offset, info.length))
        elif item.type is LoadItemType.TENSOR and isinstance(entry, TensorStorageMetadata):
            chunk = next((each for each in entry.chunks if each.offsets == item.storage_index.offset), None)
            if chunk is None:
                raise CorruptError(checkpoint_id, fqn, f"has no chunk at {item.storage_index.offset}")
            into = planner.resolve_tensor(item).detach()
            if into.shape != item.lengths:
                problems.append(f"{fqn} is to be loaded as {tuple(item.lengths)} into {tuple(into.shape)}")
            elif not cast and loses(entry.properties.dtype, into.dtype):
                problems.append(f"{fqn} is {entry.properties.dtype} in the checkpoint, {into.dtype} in the state dict")
            else:
                part = None if item.lengths == chunk.sizes else (item.storage_offsets, item.lengths)
                made.tensors.append(pieces.read(fqn, fqn, entry, chunk, part, into))
                made.resolved.append((item, into))
        else:
            problems.append(f"{fqn} is wanted as {item.type.name}, and is not that in the checkpoint")
    if problems:
        raise MismatchError(checkpoint_id, problems=problems)
    made.items.extend(plan.items)
    return made


def commit_loaded(planner: LoadPlanner, plan: LoadPlan, loaded: Mapping[int, bytes]) -> None:
    """Hand over what has been read.

    Raises:
        LoadError: the planner raised.
    """
    try:
        for place, data in loaded.items():
            planner.load_bytes(plan.items[place], io.BytesIO(data))
        for item, tensor in plan.resolved:
            planner.commit_tensor(item, tensor)
    except Exception as error:
        raise LoadError(f"{type(planner).__name__} raised {error!r}") from error

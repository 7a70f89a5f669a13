"""What a caller's own `LoadPlanner` reads."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from torch.distributed.checkpoint.planner import LoadItemType, LoadPlanner
from torch.distributed.checkpoint.planner import LoadPlan as DcpLoadPlan

from .._format.dcp import BytesStorageMetadata, Metadata, TensorStorageMetadata
from ..errors import CorruptError, LoadError, MismatchError
from .chunk_index import ChunkIndex
from .conversion import is_lossy
from .plan import ValueRead
from .read_plan import ReadPlan


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
) -> ReadPlan:
    """Find the pieces that the items of `plan` ask for.

    Raises:
        MismatchError: a target has not the shape of its item, or a dtype with a lossy conversion.
        CorruptError: the metadata does not say where a piece is.
    """
    pieces = ChunkIndex(metadata, checkpoint_id)
    made = ReadPlan(tensors=[], values=[])
    problems: list[str] = []
    for index, item in enumerate(plan.items):
        fqn = item.storage_index.fqn
        entry = metadata.state_dict_metadata.get(fqn)
        if item.type is LoadItemType.BYTE_IO and isinstance(entry, BytesStorageMetadata):
            info = pieces.find(fqn, None)
            made.values.append(ValueRead(fqn, index, info.relative_path, info.offset, info.length))
        elif item.type is LoadItemType.TENSOR and isinstance(entry, TensorStorageMetadata):
            chunk = next((each for each in entry.chunks if each.offsets == item.storage_index.offset), None)
            if chunk is None:
                raise CorruptError(checkpoint_id, fqn, f"has no chunk at {item.storage_index.offset}")
            into = planner.resolve_tensor(item).detach()
            if into.shape != item.lengths:
                problems.append(
                    f"{fqn} has shape {tuple(item.lengths)} in the load plan, {tuple(into.shape)} in its target"
                )
            elif not cast and is_lossy(entry.properties.dtype, into.dtype):
                problems.append(f"{fqn} is {entry.properties.dtype} in the checkpoint, {into.dtype} in the state dict")
            else:
                part = None if item.lengths == chunk.sizes else (item.storage_offsets, item.lengths)
                made.tensors.append(pieces.read(fqn, fqn, entry, chunk, part, into))
                made.resolved.append((item, into))
        else:
            problems.append(f"{fqn} is requested as {item.type.name}, but stored as something else")
    if problems:
        raise MismatchError(checkpoint_id, problems=problems)
    made.items.extend(plan.items)
    return made


def commit_loaded(planner: LoadPlanner, plan: ReadPlan, loaded: Mapping[int, bytes]) -> None:
    """Hand over what has been read.

    Raises:
        LoadError: the planner raised.
    """
    try:
        for index, data in loaded.items():
            planner.load_bytes(plan.items[index], io.BytesIO(data))
        for item, tensor in plan.resolved:
            planner.commit_tensor(item, tensor)
    except Exception as error:
        raise LoadError(f"{type(planner).__name__} raised {error!r}") from error

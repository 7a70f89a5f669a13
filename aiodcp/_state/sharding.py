"""What a rank holds of a sharded tensor. The one file that knows `DTensor` and `ShardedTensor` by their parts."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed._shard.sharded_tensor.api import ShardedTensor as ShardedTensor
from torch.distributed.tensor import DTensor, Partial

from .._format.dcp import ChunkStorageMetadata
from ..errors import CaptureError
from .plain_tensors import PLAIN_TENSORS, is_plain

LeafKind = tuple[Any, ...] | None
"""Of a tensor type, dtype and shape, and more if it is sharded; None of what is no tensor."""


def tensor_kind(value: object) -> LeafKind:
    return (type(value), value.dtype, value.shape) if isinstance(value, torch.Tensor) else None


def sharded_kind(value: DTensor | ShardedTensor, local: Any) -> LeafKind:
    """What makes two captures of a sharded tensor alike, given its only local part: all that its plan depends on."""
    if isinstance(value, DTensor) and holds_shards(value):
        chunks = [(chunk.offsets, chunk.sizes) for chunk in value.__create_chunk_list__()]  # type: ignore[no-untyped-call]
        return type(value), value.dtype, value.shape, tuple(chunks)
    if isinstance(value, DTensor):
        return type(local), local.dtype, local.shape, value.shape, value.placements, value.device_mesh
    shards = [(tuple(each.shard_offsets), tuple(each.shard_sizes)) for each in value.metadata().shards_metadata]
    held = [tuple(shard.metadata.shard_offsets) for shard in value.local_shards()]
    shape, dtype = shape_and_dtype(value)
    return type(value), dtype, shape, tuple(shards), tuple(held)


def local_parts(fqn: str, value: DTensor | ShardedTensor) -> list[torch.Tensor]:
    """Return what this rank holds of a sharded tensor: of a `DTensor` mostly one part, else any number.

    Raises:
        CaptureError: it is not a part of the tensor's value, or not of a kind that can be copied.
    """
    if isinstance(value, DTensor) and any(isinstance(placement, Partial) for placement in value.placements):
        raise CaptureError(
            fqn, f"has Partial placements {value.placements} (a pending reduction): redistribute it first"
        )
    if type(value) is DTensor and is_plain(local_tensor(value)):  # as almost all are
        return [local_tensor(value)]
    parts = held_parts(value)
    whole = isinstance(value, DTensor) and not holds_shards(value)
    for part in parts:
        if part.is_meta and part.numel():
            raise CaptureError(fqn, "a tensor on the meta device has no data to save")
        if not part.is_meta and not is_plain(part) and not whole:
            raise CaptureError(
                fqn, f"cannot be saved: a {type(value).__name__} of {type(part).__name__}, {part.layout}, {part.dtype}"
            )
    return parts


def held_parts(value: DTensor | ShardedTensor) -> list[torch.Tensor]:
    """Return what this rank holds of a sharded tensor."""
    if isinstance(value, ShardedTensor):
        return [shard.tensor for shard in value.local_shards()]
    with torch.no_grad():
        local = value.to_local()
    shards: list[torch.Tensor] = local.local_shards() if holds_shards(value) else [local]  # type: ignore[attr-defined]
    return shards


def local_tensor(value: DTensor) -> torch.Tensor:
    """Return what this rank holds of a `DTensor`, as it is: `to_local` is differentiable, and slower."""
    return value._local_tensor


def holds_shards(value: DTensor) -> bool:
    """Whether the local part of a `DTensor` is itself a list of shards, as torchrec's is (`LocalShardsWrapper`)."""
    return hasattr(local_tensor(value), "local_shards")


def is_sharded(value: object) -> bool:
    """Whether `value` is one rank's part of a tensor."""
    return isinstance(value, DTensor | ShardedTensor)


def shape_and_dtype(value: torch.Tensor) -> tuple[torch.Size, torch.dtype]:
    """Return those of the whole tensor; without the warning that a `ShardedTensor` gives for its attributes."""
    if isinstance(value, ShardedTensor):
        metadata = value.metadata()
        return metadata.size, metadata.tensor_properties.dtype
    return value.shape, value.dtype


def parts_of(value: torch.Tensor) -> list[torch.Tensor]:
    """What this rank holds of a tensor."""
    if not isinstance(value, DTensor | ShardedTensor):
        return [value]
    if isinstance(value, DTensor) and value.device_mesh.get_coordinate() is None:
        return []
    return held_parts(value)


def placed_parts(value: torch.Tensor) -> list[tuple[torch.Tensor, ChunkStorageMetadata]]:
    """What this rank holds of a tensor, and where in the whole that is."""
    parts = parts_of(value)
    if isinstance(value, ShardedTensor):
        chunks = [
            ChunkStorageMetadata(
                offsets=torch.Size(shard.metadata.shard_offsets), sizes=torch.Size(shard.metadata.shard_sizes)
            )
            for shard in value.local_shards()
        ]
    elif isinstance(value, DTensor):
        chunks = value.__create_chunk_list__() if parts else []  # type: ignore[no-untyped-call]
    else:
        chunks = [ChunkStorageMetadata(offsets=torch.Size([0] * value.dim()), sizes=value.shape)]
    return list(zip(parts, chunks, strict=True))


def memory_place(value: object) -> tuple[object, ...] | None:
    """Return what two tensors have in common whose elements are the same memory; None if they have none."""
    held = local_tensor(value) if isinstance(value, DTensor) else value
    if not isinstance(held, torch.Tensor) or type(held) not in PLAIN_TENSORS or held.layout is not torch.strided:
        return None
    if held.is_meta or not held.data_ptr():
        return None
    return held.device, held.data_ptr(), held.dtype, held.shape, held.stride()

"""What is read into when a checkpoint is read: new tensors, on a device or over a mesh, and parts of tensors.

Made in the caller's thread: torch knows the current device and stream by thread.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Replicate, Shard, empty

from .._format.chunks import cut
from .._format.dcp import TensorStorageMetadata
from .._load.stored_reader import Part, StoredReader, Wanted
from ..errors import ArgumentError, LoadError
from .stored_values import StoredTensor, StoredValue

Placements = Sequence[Placement] | Callable[[StoredTensor], Sequence[Placement]]
"""Of all tensors, or of each."""

Rows = slice | tuple[slice, ...]
"""Of a tensor's first dimension, or of its first ones."""

Stored = Mapping[str, StoredTensor | StoredValue]
"""What a checkpoint holds, by name."""


class ReadTargets:
    """Makes what one call reads into, by its arguments.

    Attributes:
        devices: on which tensors were made.
    """

    def __init__(
        self,
        reader: StoredReader,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        device_mesh: DeviceMesh | None,
        placements: Placements | None,
    ) -> None:
        if (device_mesh is None) is not (placements is None):
            raise ArgumentError("placements", "go with a device_mesh, and a device_mesh with placements")
        if device_mesh is not None and device is not None:
            raise ArgumentError("device", "is that of the device_mesh")
        if device_mesh is not None and not isinstance(device_mesh, DeviceMesh):
            raise ArgumentError("device_mesh", f"must be a DeviceMesh, got {type(device_mesh).__name__}")
        self._reader = reader
        self._device = _check_device(device)
        self._dtype = check_dtype(dtype)
        self._mesh = device_mesh
        self._placements = placements
        self.devices: set[torch.device] = set()

    def target(self, stored: Stored, fqn: str, rows: Rows | None) -> Wanted:
        """Return what is wanted of a value.

        Raises:
            ArgumentError: the rows are no part of it.
        """
        entry = self._reader.metadata.state_dict_metadata[fqn]
        part = None
        if rows is not None:
            if not isinstance(entry, TensorStorageMetadata):
                raise ArgumentError("rows", f"{fqn} is not a tensor")
            if self._mesh is not None:
                raise ArgumentError("rows", "are read by themselves, or shards by the device_mesh, not both")
            part = _part(fqn, rows, entry.size)
        if not isinstance(entry, TensorStorageMetadata) or not self._reader.is_dense(fqn):
            return Wanted(fqn=fqn, part=part)
        return Wanted(fqn=fqn, into=self._allocate(stored, fqn, entry, part), part=part)

    def _allocate(
        self,
        stored: Stored,
        fqn: str,
        entry: TensorStorageMetadata,
        part: Part | None,
    ) -> torch.Tensor:
        dtype = self._converted(entry.properties.dtype)
        if self._mesh is not None:
            each = stored[fqn]
            assert isinstance(each, StoredTensor)
            placements = _placed(each, self._placements, self._mesh)
            make: Any = partial(empty, *entry.size, dtype=dtype, device_mesh=self._mesh, placements=placements)
        else:
            make = partial(torch.empty, entry.size if part is None else part[1], dtype=dtype, device=self._device)
        try:
            made: torch.Tensor = make()
        except (RuntimeError, MemoryError, TypeError, OverflowError) as error:
            problem = f"{fqn}, {tuple(entry.size)} of {dtype}, cannot be allocated: {str(error).splitlines()[0]:.200}"
            raise LoadError(problem) from error
        self.devices.add(made.device)
        return made

    def _converted(self, dtype: torch.dtype) -> torch.dtype:
        return self._dtype if self._dtype is not None and dtype.is_floating_point else dtype

    def finished(self, wanted: Wanted, value: Any) -> Any:
        """Return a value as it was asked for: one that could only be read whole is converted here."""
        if wanted.into is not None or not isinstance(value, torch.Tensor):
            return value
        value = value.to(self._device, self._converted(value.dtype))
        return cut(value, wanted.part)


def check_dtype(dtype: torch.dtype | None) -> torch.dtype | None:
    """Return the dtype to which floating-point tensors are to be converted.

    Raises:
        ArgumentError: they cannot be.
    """
    if dtype is None:
        return None
    given: object = dtype
    if not isinstance(given, torch.dtype) or not given.is_floating_point:
        raise ArgumentError("dtype", f"must be a floating-point torch.dtype, got {dtype!r}")
    try:
        torch.zeros(1).to(dtype)
    except RuntimeError as error:
        raise ArgumentError("dtype", f"torch does not convert to {dtype}") from error
    return dtype


def _check_device(device: torch.device | str | None) -> torch.device:
    try:
        found = torch.device("cpu" if device is None else device)
        torch.empty(0, device=found)
    except (RuntimeError, TypeError, AssertionError) as error:  # of the last, torch without CUDA
        raise ArgumentError("device", f"{device!r} is none here: {str(error).splitlines()[0]}") from error
    if found.type == "meta":
        raise ArgumentError("device", "meta has no memory to read into")
    return found


def _placed(stored: StoredTensor, placements: Placements | None, mesh: DeviceMesh) -> list[Placement]:
    """Return how a tensor is to be sharded: one without dimensions is replicated.

    Raises:
        ArgumentError: it cannot be; from a function of the caller's, too.
    """
    if callable(placements):
        try:
            placements = placements(stored)
        except Exception as error:
            raise ArgumentError("placements", f"raised {error!r} for {stored.fqn}") from error
    given: object = placements
    if (
        not isinstance(given, Sequence)
        or len(given) != mesh.ndim
        or not all(isinstance(each, Placement) for each in given)
    ):
        problem = f"must be {mesh.ndim} Placements, one for each dimension of the mesh, got {placements!r}"
        raise ArgumentError("placements", problem)
    return [_on_tensor(stored, each) for each in given]


def _on_tensor(stored: StoredTensor, placement: Placement) -> Placement:
    if not isinstance(placement, Shard):
        return placement
    if not stored.shape:
        return Replicate()
    dimensions = len(stored.shape)
    if not -dimensions <= placement.dim < dimensions:
        raise ArgumentError("placements", f"{stored.fqn} has {dimensions} dimensions, and no {placement.dim}")
    return placement if placement.dim >= 0 else Shard(placement.dim + dimensions)


def _part(fqn: str, rows: Rows, shape: torch.Size) -> Part:
    """Return offsets and sizes of rows, as Python counts them.

    Raises:
        ArgumentError: they are no part of a tensor of this shape.
    """
    slices = rows if isinstance(rows, tuple) else (rows,)
    if not all(isinstance(each, slice) for each in slices):
        raise ArgumentError("rows", f"must be a slice, or a tuple of slices, got {rows!r}")
    if len(slices) > len(shape):
        raise ArgumentError("rows", f"{fqn} has {len(shape)} dimensions, and these are {len(slices)} slices")
    offsets, sizes = [0] * len(shape), list(shape)
    for dimension, each in enumerate(slices):
        try:
            start, stop, step = each.indices(shape[dimension])
        except TypeError as error:
            raise ArgumentError("rows", f"{each!r} is none of integers: {error}") from error
        if step != 1:
            raise ArgumentError("rows", f"{each!r} has a step: only rows that follow each other can be read")
        offsets[dimension], sizes[dimension] = start, max(0, stop - start)
    return torch.Size(offsets), torch.Size(sizes)

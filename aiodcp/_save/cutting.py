"""Large tensors cut into chunks, each an item of its own, for stores that take files whole. Pure.

A chunk is a run of elements in the tensor's row-major order, so that it is contiguous where the tensor is: a load that
wants all of the tensor reads each chunk straight into its place. Readers of DCP's format know chunks from sharded
tensors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from .._format.chunks import cut
from .._format.dcp import ChunkStorageMetadata, MetadataIndex
from .._state.plain_tensors import PLAIN_TENSORS

Part = tuple[torch.Size, torch.Size]
"""Offsets and lengths, by dimension."""


@dataclass(frozen=True, slots=True)
class Cut:
    """A part of a captured value, which is captured as a value of its own."""

    source: int
    part: Part


def cut_item(item: WriteItem, value: Any, nbytes: int) -> list[tuple[WriteItem, Part]]:
    """Cut an item whose tensor is larger than `nbytes`; return none if it is not, or cannot be cut."""
    data = item.tensor_data
    if data is None or type(value) not in PLAIN_TENSORS or value.layout is not torch.strided:
        return []
    sizes, itemsize = tuple(data.chunk.sizes), data.properties.dtype.itemsize
    if not sizes or prod(sizes) * itemsize <= nbytes:
        return []
    found = []
    for starts, lengths in _parts(sizes, max(1, nbytes // itemsize)):
        offsets = torch.Size(map(sum, zip(data.chunk.offsets, starts, strict=True)))
        chunk = ChunkStorageMetadata(offsets, torch.Size(lengths))
        index = MetadataIndex(item.index.fqn, offsets)
        smaller = TensorWriteData(chunk=chunk, properties=data.properties, size=data.size)
        one = dataclasses.replace(item, index=index, type=WriteItemType.SHARD, tensor_data=smaller)
        found.append((one, (torch.Size(starts), torch.Size(lengths))))
    return found


def _parts(sizes: Sequence[int], count: int) -> Iterator[tuple[list[int], list[int]]]:
    """Cut a box into runs of at most `count` elements each, in row-major order; yield their offsets and lengths."""
    row = prod(sizes[1:])
    if row > count:
        for start in range(sizes[0]):
            for starts, lengths in _parts(sizes[1:], count):
                yield [start, *starts], [1, *lengths]
        return
    pieces = -(-sizes[0] * row // count)  # of about one size, none of them over
    step = min(-(-sizes[0] // pieces), count // row)
    for start in range(0, sizes[0], step):
        yield [start, *[0] * (len(sizes) - 1)], [min(step, sizes[0] - start), *sizes[1:]]


def captured_cuts(values: Sequence[Any], cuts: Sequence[Cut]) -> list[torch.Tensor]:
    """Return views of the parts of captured values that are captured as values of their own."""
    return [cut(values[each.source].detach(), each.part) for each in cuts]

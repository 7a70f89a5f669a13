"""The pieces that a tensor is cut into: do they make it up, and where do the elements of a part lie? Pure."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
import torch

from .archive_writer import Frame
from .arrays import Array
from .dcp import ChunkStorageMetadata, TensorStorageMetadata


def extent(frame: Frame, part: tuple[torch.Size, torch.Size]) -> tuple[int, int]:
    """Return from which byte of the payload to which the elements of a part lie."""
    offsets, lengths = part
    first = sum(offset * stride for offset, stride in zip(offsets, frame.strides, strict=True))
    steps = sum((length - 1) * stride for length, stride in zip(lengths, frame.strides, strict=True))
    return first * frame.dtype.itemsize, (first + steps + 1) * frame.dtype.itemsize


def cut(tensor: torch.Tensor, part: tuple[torch.Size, torch.Size] | None) -> torch.Tensor:
    """Return a view of a part, (offsets, lengths), of a tensor; all of it for None."""
    if part is not None:
        for dimension, (offset, length) in enumerate(zip(*part, strict=True)):
            if length != tensor.shape[dimension]:
                tensor = tensor.narrow(dimension, offset, length)
    return tensor


def is_whole(entry: TensorStorageMetadata) -> bool:
    """Whether the chunks make up the tensor: as many elements, all within it, none twice."""
    size, chunks = entry.size, entry.chunks
    if len(chunks) == 1:
        return chunks[0].sizes == size and not any(chunks[0].offsets)
    return (
        sum(prod(chunk.sizes) for chunk in chunks) == prod(size)
        and all(
            0 <= first <= first + length <= stop
            for chunk in chunks
            for first, length, stop in zip(chunk.offsets, chunk.sizes, size, strict=True)
        )
        and not overlap(chunks)
    )


def grid_makes_up(offsets: Array, sizes: Array, whole: Sequence[int]) -> bool:
    """Whether each dimension is cut, and chunks are all that this makes, given that no two have the same offsets."""
    cells = 1
    for dimension, length in enumerate(whole):
        starts, place = np.unique(offsets[:, dimension], return_inverse=True)
        lengths = np.diff(np.append(starts, length))
        if starts[0] != 0 or not np.array_equal(sizes[:, dimension], lengths[place]):
            return False
        cells *= len(starts)
    return cells == len(offsets)


def overlap(chunks: Sequence[ChunkStorageMetadata]) -> bool:
    """Whether two chunks share an element: a sweep along the dimension in which most of them differ."""
    chunks = [chunk for chunk in chunks if prod(chunk.sizes)]
    dimensions = range(len(chunks[0].offsets) if chunks else 0)
    sweep = max(dimensions, key=lambda each: len({chunk.offsets[each] for chunk in chunks}), default=0)
    active: list[ChunkStorageMetadata] = []
    for chunk in sorted(chunks, key=lambda each: each.offsets[sweep]):
        active = [other for other in active if other.offsets[sweep] + other.sizes[sweep] > chunk.offsets[sweep]]
        if any(_share_elements(chunk, other) for other in active):
            return True
        active.append(chunk)
    return False


def _share_elements(one: ChunkStorageMetadata, other: ChunkStorageMetadata) -> bool:
    return all(
        a < b + n and b < a + m for a, m, b, n in zip(one.offsets, one.sizes, other.offsets, other.sizes, strict=True)
    )

"""A run of a tensor's elements, as few views of it. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import torch


def element_views(tensor: torch.Tensor, start: int, stop: int) -> Iterator[torch.Tensor]:
    """Cut elements `start` to `stop`, in row-major order, out of a tensor: views of it, few and as large as can be."""
    if start >= stop:
        return
    if tensor.is_contiguous():
        yield tensor.view(-1)[start:stop]
        return
    row = prod(tensor.shape[1:])
    first, last = -(-start // row), stop // row
    if first > last:  # all of it lies within one row
        yield from element_views(tensor[last], start - last * row, stop - last * row)
        return
    if start < first * row:
        yield from element_views(tensor[first - 1], start - (first - 1) * row, row)
    if first < last:
        yield tensor[first:last]
    if last * row < stop:
        yield from element_views(tensor[last], 0, stop - last * row)

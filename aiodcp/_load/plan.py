"""Reads of a load, as plain data."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .._format.archive_writer import Frame

# The records of a load are not frozen, which would cost 1 us for each of 10,000, and hold no objects of their own:
# what stays alive while a load runs, the cycle collector goes through.


@dataclass(slots=True)
class ValueRead:
    """A stored value that is not a tensor.

    Attributes:
        fqn: the value.
        index: which leaf of the caller's it is.
        file: where it lies.
        offset: bytes, where in the file.
        nbytes: its length.
        crc: what its file's table says of it; None if there is none.
    """

    fqn: str
    index: int
    file: str
    offset: int
    nbytes: int
    crc: int | None = None


@dataclass(slots=True)
class TensorRead:
    """A stored chunk of a tensor, and the place that wants it or a part of it.

    Attributes:
        fqn: the tensor.
        file: where the chunk lies.
        offset: bytes, where in the file begins what is read: the item, or a part of its payload.
        nbytes: length of that.
        dtype: as stored.
        sizes: the chunk's shape as stored.
        frame: this library's framing around it; None if the item is an archive of `torch.save`.
        part: (offsets, lengths) of what is wanted of the chunk; None for all of it.
        into: where that goes: the caller's tensor, or a view of a part of it.
        bare: whether only the rows of the payload that hold the part are read, too few to compare a checksum; or all
            of a payload that has none.
        crc: what its file's table says of it; None if there is none.
    """

    fqn: str
    file: str
    offset: int
    nbytes: int
    dtype: torch.dtype
    sizes: torch.Size
    frame: Frame | None
    part: tuple[torch.Size, torch.Size] | None
    into: torch.Tensor
    bare: bool
    crc: int | None = None

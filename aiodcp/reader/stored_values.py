"""What a checkpoint says of its values, without reading them."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredChunk:
    """A part of a tensor, as it is stored.

    Attributes:
        offsets, sizes: which elements, by dimension.
        file: where, below the checkpoint.
        offset: bytes, where in the file.
        nbytes: stored, with what is stored around the elements.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """A tensor.

    Attributes:
        fqn: its name.
        path: the keys and list indices that lead to it in the state dict.
        shape: of the whole tensor.
        dtype: as it is stored.
        nbytes: of its elements.
        chunks: how it was sharded: the parts that make it up, one for a tensor that was not.
    """

    fqn: str
    path: tuple[str | int, ...]
    shape: torch.Size
    dtype: torch.dtype
    nbytes: int
    chunks: tuple[StoredChunk, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredValue:
    """A value that is not a tensor.

    Attributes:
        fqn: its name.
        path: the keys and list indices that lead to it in the state dict.
        nbytes: stored.
        file: where, below the checkpoint; empty if it has none of its own.
    """

    fqn: str
    path: tuple[str | int, ...]
    nbytes: int
    file: str


def name_of(dtype: torch.dtype) -> str:
    """Return the short name of a dtype, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")

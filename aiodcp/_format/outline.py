"""Names, shapes and dtypes of a checkpoint, to be read without the metadata around them.

The pickle of a large checkpoint's metadata takes tenths of a second to read. This stands behind it, in the seal: JSON.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import torch

from .dcp import STORAGE_TYPES, Metadata, TensorStorageMetadata

Kind = tuple[torch.dtype, Sequence[int]]
"""Dtype and shape of a tensor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outline:
    """What a checkpoint holds.

    Attributes:
        tensors: dtype and shape, by fqn, in the order of the state dict; None for other values.
    """

    tensors: Mapping[str, tuple[torch.dtype, torch.Size] | None] = field(default_factory=dict)

    def nbytes(self, fqn: str) -> int:
        """Return the bytes of a tensor's elements; of another value 0."""
        found = self.tensors[fqn]
        return prod(found[1]) * found[0].itemsize if found is not None else 0


def outline_of(metadata: Metadata) -> Outline:
    """Return what metadata says."""
    entries = metadata.state_dict_metadata
    return Outline(tensors={fqn: _kind(entries[fqn]) for fqn in _in_order(entries, metadata.planner_data or {})})


def _kind(entry: STORAGE_TYPES) -> tuple[torch.dtype, torch.Size] | None:
    return (entry.properties.dtype, entry.size) if isinstance(entry, TensorStorageMetadata) else None


def _in_order(entries: Mapping[str, STORAGE_TYPES], paths: Iterable[str]) -> list[str]:
    known = dict.fromkeys(fqn for fqn in paths if fqn in entries)
    return [*known, *(fqn for fqn in entries if fqn not in known)]


def encode_outline(metadata: Metadata) -> bytes:
    """Return the text for metadata."""
    entries = metadata.state_dict_metadata
    names = _in_order(entries, metadata.planner_data or {})
    return encode_kinds(names, [_kind(entries[name]) for name in names])


def encode_kinds(names: Sequence[str], kinds: Sequence[Kind | None]) -> bytes:
    """Return the text for names, in the order of the state dict, and the kinds of the tensors among them."""
    distinct = {kind: number for number, kind in enumerate(dict.fromkeys(kind for kind in kinds if kind is not None))}
    codes = [-1 if kind is None else distinct[kind] for kind in kinds]
    known = [[str(dtype).removeprefix("torch."), list(shape)] for dtype, shape in distinct]
    return json.dumps([names, known, codes], separators=(",", ":")).encode()


def decode_outline(text: bytes) -> Outline:
    """Return what `encode_outline` has made a text of.

    Raises:
        ValueError, TypeError, LookupError, AttributeError, RecursionError: it is malformed.
    """
    names, known, codes = json.loads(text)
    kinds: list[tuple[torch.dtype, torch.Size] | None] = []
    for dtype, shape in known:
        kinds.append((getattr(torch, dtype), torch.Size(shape)))
        if not isinstance(getattr(torch, dtype), torch.dtype):
            raise ValueError("a dtype that this torch does not have")
    kinds.append(None)  # -1
    tensors = {name: kinds[code] for name, code in zip(_texts(names), codes, strict=True)}
    if len(tensors) < len(names):
        raise ValueError("a name that is there twice")
    return Outline(tensors=tensors)


def _texts(values: list[str]) -> list[str]:
    if not all(type(value) is str for value in values):
        raise ValueError("a name that is no text")
    return values

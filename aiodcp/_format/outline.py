"""Names, shapes and dtypes of a checkpoint, to be read without the metadata around them.

The pickle of a large checkpoint's metadata takes tenths of a second to read. This stands behind it, in the seal: the
kinds of tensors that there are, which kind each value is of, and the names, some at a time: what takes long in one go
holds up all other threads.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import torch

from .arrays import Array
from .dcp import STORAGE_TYPES, Metadata, TensorProperties, TensorStorageMetadata
from .sections import LENGTH, SectionReader, pack_column, pack_section

_FORM = b"3"

_AT_ONCE = 2000  # names

Kind = tuple[TensorProperties, Sequence[int]]
"""Properties and shape of a tensor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outline:
    """What a checkpoint holds.

    Attributes:
        tensors: dtype and shape, by fqn, in the order of the state dict; None for other values.
        kinds: of the tensors, each once; empty if it was made of metadata, as `codes` then are.
        codes: of each value its kind, in the same order; -1 of what is no tensor.
        columns: what stands behind it; see `index_columns`.
    """

    tensors: Mapping[str, tuple[torch.dtype, torch.Size] | None] = field(default_factory=dict)
    kinds: Sequence[tuple[TensorProperties, torch.Size]] = field(default=(), compare=False)
    codes: Array = field(default_factory=lambda: np.zeros(0, dtype=np.int64), compare=False)
    columns: bytes = field(default=b"", repr=False, compare=False)

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
    kinds = [
        (entry.properties, entry.size) if isinstance(entry, TensorStorageMetadata) else None
        for entry in (entries[name] for name in names)
    ]
    return encode_kinds(names, kinds)


def encode_kinds(names: Sequence[str], kinds: Iterable[Kind | None]) -> bytes:
    """Return the text for names, in the order of the state dict, and the kinds of the tensors among them."""
    facts: dict[int, tuple[object, ...]] = {}
    distinct: dict[tuple[object, ...], int] = {}
    codes = []
    for kind in kinds:
        if kind is None:
            codes.append(-1)
            continue
        properties, size = kind
        if id(properties) not in facts:
            facts[id(properties)] = tuple(facts_of(properties))
        codes.append(distinct.setdefault((*facts[id(properties)], *size), len(distinct)))
    blocks = [names[start : start + _AT_ONCE] for start in range(0, len(names), _AT_ONCE)]
    header, *named = (json.dumps(each, separators=(",", ":")).encode() for each in ([len(names), *distinct], *blocks))
    text = [pack_section(header), pack_column(np.array(codes, dtype=np.int64)), *map(pack_section, named)]
    whole = _FORM + b"".join(text)
    return LENGTH.pack(len(whole)) + whole


def is_known(text: bytes) -> bool:
    """Whether `decode_outline` can read it: not what was written before aiodcp's first release."""
    return text[LENGTH.size :].startswith(_FORM)


def has_columns(text: bytes) -> bool:
    """Whether it is such a one, and columns stand behind it."""
    return is_known(text) and len(text) > LENGTH.size + int(LENGTH.unpack_from(text)[0])


def decode_outline(text: bytes) -> Outline:
    """Return what `encode_outline` has made a text of.

    Raises:
        ValueError, TypeError, LookupError, AttributeError, RecursionError, struct.error, zlib.error: it is malformed.
    """
    (length,) = LENGTH.unpack_from(text)
    first, stop = LENGTH.size + len(_FORM), LENGTH.size + length
    reader = SectionReader(memoryview(text)[first:stop])
    count, *known = json.loads(reader.section())
    kinds: list[tuple[TensorProperties, torch.Size]] = []
    for dtype, layout, requires_grad, memory_format, pin_memory, *shape in known:
        kinds.append((properties_of([dtype, layout, requires_grad, memory_format, pin_memory]), torch.Size(shape)))
    codes = reader.column(count)
    if codes.min(initial=0) < -1 or codes.max(initial=-1) >= len(kinds):
        raise ValueError("a kind that there is not")
    facts = [*((properties.dtype, size) for properties, size in kinds), None]  # the last for -1
    tensors: dict[str, tuple[torch.dtype, torch.Size] | None] = {}
    for start in range(0, count, _AT_ONCE):
        of_these = codes[start : start + _AT_ONCE].tolist()
        tensors.update(zip(_texts(json.loads(reader.section())), map(facts.__getitem__, of_these), strict=True))
    if len(tensors) < count:
        raise ValueError("a name that is there twice")
    return Outline(tensors=tensors, kinds=kinds, codes=codes, columns=text[stop:])


def facts_of(properties: TensorProperties) -> list[Any]:
    """Return what DCP keeps of a tensor, as JSON can say it."""
    return [
        str(properties.dtype).removeprefix("torch."),
        str(properties.layout).removeprefix("torch."),
        properties.requires_grad,
        str(properties.memory_format).removeprefix("torch."),
        properties.pin_memory,
    ]


def properties_of(facts: Sequence[Any]) -> TensorProperties:
    """Return what `facts_of` was given.

    Raises:
        ValueError, AttributeError: this torch has no such dtype, or there is none.
    """
    dtype, layout, requires_grad, memory_format, pin_memory = facts
    found = getattr(torch, dtype), getattr(torch, layout), getattr(torch, memory_format)
    if not all(map(isinstance, found, (torch.dtype, torch.layout, torch.memory_format))):
        raise ValueError("a dtype or a layout that this torch does not have")
    return TensorProperties(found[0], found[1], bool(requires_grad), found[2], bool(pin_memory))


def _texts(values: list[str]) -> list[str]:
    if not all(type(value) is str for value in values):
        raise ValueError("a name that is no text")
    return values

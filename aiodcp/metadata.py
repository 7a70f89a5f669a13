"""What a checkpoint holds and where: DCP's `.metadata`, written portably.

The file is a pickle of `torch.distributed.checkpoint.metadata.Metadata`, written so that torch 2.6 to 2.15 can read it
on Python 3.11 to 3.15. `_metadata_reader` reads it.
"""

from __future__ import annotations

import copyreg
import io
import pickle
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

import torch

from ._dcp import (
    STORAGE_TYPES,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageInfo,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
    gc_held_off,
)
from ._metadata_reader import read_metadata
from ._names import METADATA_NAME
from ._note import CLAIM
from ._pickle_screen import without_memoized_tuples

__all__ = [
    "METADATA_NAME",
    "STORAGE_TYPES",
    "BytesStorageMetadata",
    "ChunkStorageMetadata",
    "Field",
    "Metadata",
    "MetadataIndex",
    "StorageInfo",
    "StorageMeta",
    "Template",
    "TensorProperties",
    "TensorStorageMetadata",
    "read_metadata",
]

FORMAT_VERSION = "1.0.0"
"""DCP's own, `torch.distributed.checkpoint.filesystem.CURRENT_DCP_VERSION`."""


@dataclass(slots=True)
class ContainerNotes:
    """What dotted names do not say of the containers of a state dict, by path.

    Attributes:
        empty: mappings without a key.
        int_keys: mappings all of whose keys are ints; paths have them as text, as in DCP.
    """

    empty: list[tuple[str | int, ...]] = field(default_factory=list)
    int_keys: list[tuple[str | int, ...]] = field(default_factory=list)


# --- writing


class Field:
    """A value that differs from save to save, standing in a `Template`: an int, or a str where `text` is set."""

    def __init__(self, number: int, *, text: bool = False) -> None:
        self.stand_in: int | str = f"\0aiodcp field {number}\0" if text else _FIRST_FIELD + number


_MARK = b"dcp"  # no offset or length of a file is as large as an int with these bytes above its fourth
_FIRST_FIELD = int.from_bytes(bytes(4) + _MARK + b"\x40", "little")
_INT_FIELD = re.compile(rb"\x8a\x08(....)" + _MARK + rb"\x40", re.DOTALL)  # opcode LONG1, eight bytes
_TEXT_FIELD = re.compile(rb"X....\0aiodcp field (\d+)\0", re.DOTALL)  # opcode BINUNICODE, a length, the text


class Template:
    """A pickled `Metadata` with fields to fill in, so that a save need not pickle 10,000 tensors' places again.

    Protocol 2 has no length prefixes around groups of objects, so a field may be cut out and another put in.
    """

    def __init__(self, metadata: Metadata, fields: Sequence[Field]) -> None:
        data = _dump(metadata)
        cuts: list[tuple[int, int, int | str]] = []
        for found in _INT_FIELD.finditer(data):
            cuts.append((found.start(), found.end(), _FIRST_FIELD + int.from_bytes(found[1], "little")))
        for found in _TEXT_FIELD.finditer(data):
            cuts.append((found.start(), found.end(), found[0][5:].decode()))
        cuts.sort(key=itemgetter(0))
        numbers = {field.stand_in: number for number, field in enumerate(fields)}
        assert sorted(numbers, key=str) == sorted((cut[2] for cut in cuts), key=str), "every field stands there once"
        self._parts: list[bytes] = []
        self._order: list[int] = []
        position = 0
        for start, stop, stand_in in cuts:
            self._parts.append(data[position:start])
            self._order.append(numbers[stand_in])
            position = stop
        self._last = data[position:]

    def render(self, values: Sequence[int | str]) -> bytes:
        """Return `.metadata`'s content, with one value for each field, in the fields' order."""
        pieces: list[bytes] = []
        for part, number in zip(self._parts, self._order, strict=True):
            pieces += (part, _opcode(values[number]))
        return b"".join((*pieces, self._last))


def _opcode(value: int | str) -> bytes:
    pickled = pickle.dumps(value, protocol=2)[2:-1]
    return pickled if isinstance(value, int) else pickled[:-2]  # without "remember this as number 0"


class _Pickler(pickle.Pickler):
    def reducer_override(self, obj: object) -> Any:
        if isinstance(obj, TensorProperties):  # five fields, which every torch reads; 2.15 would write six
            return copyreg.__newobj__, (TensorProperties,), obj.__getstate__()[:5]  # type: ignore[attr-defined, no-untyped-call]
        return NotImplemented


def _dump(metadata: Metadata) -> bytes:
    file = io.BytesIO()
    _Pickler(file, protocol=2).dump(metadata)
    with gc_held_off():
        return without_memoized_tuples(file.getvalue())


def build_metadata(
    planned: Metadata,
    paths: Mapping[str, tuple[str | int, ...]] | None,
    stored: Mapping[MetadataIndex, StorageInfo],
    storage_meta: StorageMeta,
    opaque: Sequence[str],
    notes: ContainerNotes,
) -> Metadata:
    """Return `planned` completed for writing, equal parts shared so that the pickle is small and quick to read.

    Args:
        planned: what a save planner returns: names, shapes, chunks.
        paths: fqn -> the keys that lead to it in the state dict; None if a planner has not said.
        stored: where each item lies.
        storage_meta: as DCP's; ids are `str` (a pickled `Path` tells the host's paths and does not travel).
        opaque: fqns of tensors that lie there as `torch.save` wrote them, not in this library's framing.
        notes: what the names do not say of the containers.
    """
    share: dict[Any, Any] = {}

    def shared(value: Any, key: Any) -> Any:
        return share.setdefault((type(value), key), value)

    entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    for fqn, entry in planned.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            properties = entry.properties
            chunks = [
                ChunkStorageMetadata(
                    offsets=shared(torch.Size(chunk.offsets), chunk.offsets),
                    sizes=shared(torch.Size(chunk.sizes), chunk.sizes),
                )
                for chunk in entry.chunks
            ]
            size = shared(torch.Size(entry.size), entry.size)
            key = (properties.dtype, str(properties.layout), properties.requires_grad)
            entries[fqn] = TensorStorageMetadata(shared(properties, key), size, chunks)
        else:
            entries[fqn] = entry
    indices = {}
    for index, info in stored.items():
        same = MetadataIndex(index.fqn, None, index.index)
        if index.offset is not None:  # set past the constructor, which makes a `torch.Size` of its own
            object.__setattr__(same, "offset", shared(index.offset, index.offset))
        indices[same] = info
    keys = None if paths is None else {fqn: (*path,) for fqn, path in paths.items()}  # each a tuple of its own
    metadata = Metadata(entries, keys, indices, storage_meta, FORMAT_VERSION)
    # Stock readers ignore further attributes; ours reads tensors in its own framing without parsing archives.
    vars(metadata)["aiodcp"] = {
        "framing": 1,
        "opaque": list(opaque),
        "empty": list(notes.empty),
        "int_keys": list(notes.int_keys),
        CLAIM: True,  # the last: it is looked for in the last bytes
    }
    return metadata


def container_notes(metadata: Metadata) -> ContainerNotes | None:
    """Return what is noted of the containers; None if that was not noted."""
    mark = vars(metadata).get("aiodcp")
    if not isinstance(mark, dict) or "empty" not in mark:
        return None
    return ContainerNotes(list(mark["empty"]), list(mark.get("int_keys", ())))


def framed_by_us(metadata: Metadata) -> Callable[[str], bool]:
    """Return a function that tells of an fqn whether its tensor lies in this library's framing."""
    mark = vars(metadata).get("aiodcp")
    if not isinstance(mark, dict) or mark.get("framing") != 1:
        return lambda fqn: False
    opaque = opaque_names(metadata)
    return lambda fqn: fqn not in opaque


def opaque_names(metadata: Metadata) -> frozenset[str]:
    """Return the fqns of tensors that this library has stored as `torch.save` writes them."""
    mark = vars(metadata).get("aiodcp")
    return frozenset(mark.get("opaque", ())) if isinstance(mark, dict) else frozenset()

"""What a checkpoint holds and where: DCP's `.metadata`, written portably and read safely.

The file is a pickle of `torch.distributed.checkpoint.metadata.Metadata`. It is read by an unpickler that knows the
few classes such a file is made of and nothing else, in every form that torch 2.6 to 2.15 writes on Python 3.11 to
3.14. It is written so that all of those can read it.
"""

from __future__ import annotations

import copyreg
import gc
import io
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import PurePosixPath
from types import FunctionType
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo as StorageInfo
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from ._names import METADATA_NAME
from .errors import CorruptError, UnsafeError

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


# --- reading


class _AnyProperties(TensorProperties):
    """Reads `TensorProperties` of any length: five fields until torch 2.14, six (`strides`) from 2.15 on."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        super().__setstate__(state[:5])  # type: ignore[no-untyped-call]
        self.__class__ = TensorProperties  # type: ignore[assignment]


def _path(*parts: str) -> str:
    """Reads a pickled path of any Python version (3.13 moved the class to `pathlib._local`) as text."""
    return str(PurePosixPath(*parts))


def _memory_format(value: int) -> object:
    return dcp._MEM_FORMAT_ENCODING(value)


def _layout(name: str) -> torch.layout:
    layout: torch.layout = torch.serialization._get_layout(name)  # type: ignore[no-untyped-call]
    return layout


def _allowed() -> dict[tuple[str, str], Any]:
    checkpoint = "torch.distributed.checkpoint"
    allowed: dict[tuple[str, str], Any] = {(f"{checkpoint}.metadata", name): getattr(dcp, name) for name in dcp.__all__}
    allowed[f"{checkpoint}.metadata", "TensorProperties"] = _AnyProperties
    allowed[f"{checkpoint}.metadata", "_MEM_FORMAT_ENCODING"] = _memory_format
    older = "torch.distributed._shard.sharded_tensor.metadata"  # before torch 2.3
    allowed[older, "TensorProperties"] = _AnyProperties
    allowed[older, "MEM_FORMAT_ENCODING"] = _memory_format
    allowed[f"{checkpoint}.filesystem", "_StorageInfo"] = StorageInfo
    allowed[f"{checkpoint}.filesystem", "_StoragePrefix"] = filesystem._StoragePrefix
    allowed["torch", "Size"] = torch.Size
    allowed["torch", "device"] = torch.device
    allowed["torch.serialization", "_get_layout"] = _layout
    allowed["collections", "OrderedDict"] = OrderedDict
    for name, value in vars(torch).items():
        if isinstance(value, torch.dtype):
            allowed["torch", name] = value
    for module in ("pathlib", "pathlib._local"):
        for name in ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"):
            allowed[module, name] = _path
    return allowed


_ALLOWED = _allowed()


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, path: str) -> None:
        super().__init__(io.BufferedReader(io.BytesIO(data)))  # has peek(): twice as fast as BytesIO alone
        self._path = path
        self._copies: dict[tuple[str, str], Any] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Return a copy that lives as long as this load: a pickle can set attributes of whatever it names."""
        try:
            found = _ALLOWED[module, name]
        except KeyError:
            raise UnsafeError(self._path, "", f"names {module}.{name}, which no checkpoint needs") from None
        if isinstance(found, FunctionType):
            return lambda *arguments: found(*arguments)
        if isinstance(found, type) and found.__module__ not in ("torch", "collections"):
            return self._copies.setdefault((module, name), type(found.__name__, (found,), {}))
        return found  # of C: nothing can be set


def read_metadata(data: bytes, path: str) -> Metadata:
    """Return what `.metadata` says, without running anything that it brings.

    Args:
        data: the file's content.
        path: the file's name, for errors.

    Raises:
        UnsafeError: it names a class or function that no checkpoint needs.
        CorruptError: it is not DCP's metadata, or contradicts itself.
    """
    try:
        with gc_held_off():
            metadata = _Unpickler(data, path).load()
    except UnsafeError:
        raise
    except Exception as error:  # a damaged pickle can raise almost anything
        raise CorruptError(path, "", f"not a checkpoint's metadata: {error!r}") from error
    if not isinstance(metadata, Metadata) or not isinstance(getattr(metadata, "state_dict_metadata", None), dict):
        raise CorruptError(path, "", f"not a checkpoint's metadata: a {type(metadata).__name__}")
    if not isinstance(getattr(metadata, "storage_data", None), dict):
        raise CorruptError(path, "", "says of no value where it is stored")
    files: set[str] = set()
    for index, info in metadata.storage_data.items():
        try:
            file, offset, length = info.relative_path, info.offset, info.length
        except AttributeError as error:
            raise CorruptError(path, "", f"does not say where a value is stored: {error}") from error
        if file not in files:
            if not isinstance(file, str) or file.startswith("/") or ".." in file.split("/"):
                raise UnsafeError(path, index.fqn, f"is stored outside the checkpoint, in {file!r}")
            files.add(file)
        if type(offset) is not int or type(length) is not int or offset < 0 or length < 0:
            raise CorruptError(path, index.fqn, f"is stored at {offset!r}, {length!r} bytes")
    return metadata


def unsound(metadata: Metadata) -> tuple[str, str] | None:
    """Return what is wrong with an entry of a damaged pickle, which may be anything: its name, and a sentence."""
    for fqn, entry in metadata.state_dict_metadata.items():
        try:
            sound = type(fqn) is str and _is_sound(entry)
        except (AttributeError, TypeError):
            sound = False
        if not sound:
            return str(fqn), "the metadata does not say what it is"
    paths = metadata.planner_data
    if paths is not None and not (
        isinstance(paths, dict) and all(isinstance(path, tuple | list) and path for path in paths.values())
    ):
        return "", "the metadata does not say which keys lead to the values"
    mark = vars(metadata).get("aiodcp", {})
    if not isinstance(mark, dict) or not all(
        isinstance(mark.get(key, ()), tuple) for key in ("opaque", "empty", "int_keys")
    ):
        return "", "what this library has noted in the metadata is damaged"
    return None


def _is_sound(entry: object) -> bool:
    if not isinstance(entry, TensorStorageMetadata):
        return isinstance(entry, BytesStorageMetadata)
    fields: list[tuple[Any, type]] = [(entry.properties.dtype, torch.dtype), (entry.size, torch.Size)]
    fields += [(part, torch.Size) for chunk in entry.chunks for part in (chunk.offsets, chunk.sizes)]
    return all(isinstance(value, kind) for value, kind in fields)


@contextmanager
def gc_held_off() -> Iterator[None]:
    """Hold off the cycle collector while many objects are made that all stay.

    Measured, 10,000 tensors: 0.04 s, against 0.16-0.34 s with full collections in between, each of which would
    also hold the GIL.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


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
    return file.getvalue()


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
    metadata = Metadata(entries, None if paths is None else dict(paths), indices, storage_meta, FORMAT_VERSION)
    # Stock readers ignore further attributes; ours reads tensors in its own framing without parsing archives.
    vars(metadata)["aiodcp"] = {
        "framing": 1,
        "opaque": tuple(opaque),
        "empty": tuple(notes.empty),
        "int_keys": tuple(notes.int_keys),
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

"""`.metadata` read safely: an interpreter of the few pickle opcodes that such a file is made of, and nothing else.

`pickle.Unpickler` bounds neither memory nor time: ten bytes make it allocate gigabytes (a memo index), sixty nested
tuples as a key take centuries to hash, and a million of them overflow the C stack. Here memory grows with the file,
keys are hashed when they are known to be flat, and everything is checked before anyone else sees it. Files that
`pickle_screen` knows to be harmless, as those of this library, are left to the C unpickler, with an allow-list.

Read is every form that torch 2.6 to 2.15 writes on Python 3.11 to 3.15.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch

from ..errors import CorruptError, UnsafeError
from .dcp import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageInfo,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from .metadata_pickle import SHOWN, DamagedError, MetadataUnpickler, PickleInterpreter, shown
from .pickle_screen import is_harmless
from .seal import Seal, SealError, open_seal


def read_metadata(data: bytes, path: str) -> Metadata:
    """Return what `.metadata` says, without running anything that it brings.

    Args:
        data: the file's content.
        path: the file's name, for errors.

    Raises:
        UnsafeError: it names a class or function that no checkpoint needs, or leads out of the checkpoint.
        CorruptError: it is not what was saved, not DCP's metadata, or contradicts itself.
    """
    return read_sealed(data, path)[0]


def read_sealed(data: bytes, path: str) -> tuple[Metadata, Seal]:
    """Return what it says, and the seal that stands behind the pickle.

    Raises:
        UnsafeError, CorruptError: see `read_metadata`.
    """
    try:
        pickled, seal = open_seal(data)
    except SealError as error:
        raise CorruptError(path, "", str(error)) from error
    try:
        metadata = (
            MetadataUnpickler(pickled, path).load() if is_harmless(pickled) else PickleInterpreter(pickled, path).read()
        )
        _check(metadata, path)
    except (UnsafeError, CorruptError):
        raise
    except DamagedError as error:
        raise CorruptError(path, "", f"not a checkpoint's metadata: {error}") from error
    except Exception as error:  # a damaged pickle can raise almost anything
        raise CorruptError(path, "", f"not a checkpoint's metadata: {type(error).__name__}") from error
    return metadata, seal


def _check(metadata: Any, path: str) -> None:
    """Check every entry, so that all others can rely on their types and bounds."""
    if not isinstance(metadata, Metadata):
        raise DamagedError(f"a {type(metadata).__name__}")
    fields = metadata.__dict__
    if type(fields.get("state_dict_metadata")) is not dict:
        raise DamagedError("state_dict_metadata is missing")
    if type(fields.get("storage_data")) is not dict:
        raise CorruptError(path, "", "storage_data is missing")
    sound: set[tuple[int, ...]] = set()  # ids of what has been checked: equal tensors share their shapes
    for fqn, entry in metadata.state_dict_metadata.items():
        if type(fqn) is not str:
            raise DamagedError(f"a name that is a {type(fqn).__name__}")
        if isinstance(entry, BytesStorageMetadata):
            continue
        try:
            is_sound = _is_sound(entry, sound)
        except (AttributeError, KeyError, TypeError):
            is_sound = False
        if not is_sound:
            raise CorruptError(path, shown(fqn), "its entry in the metadata is malformed")
    _check_storage_data(metadata, path)
    _check_rest(fields, path)


def _is_sound(entry: object, sound: set[tuple[int, ...]]) -> bool:
    if not isinstance(entry, TensorStorageMetadata):
        return False
    fields = entry.__dict__
    size, chunks, properties = fields["size"], fields["chunks"], fields["properties"]
    if type(chunks) is not list:
        return False
    if (id(properties),) not in sound:
        if not isinstance(properties, TensorProperties) or type(properties.dtype) is not torch.dtype:
            return False
        sound.add((id(properties),))
    for chunk in chunks:
        if not isinstance(chunk, ChunkStorageMetadata):
            return False
        parts = chunk.__dict__
        offsets, sizes = parts["offsets"], parts["sizes"]
        ids = id(size), id(offsets), id(sizes)
        if ids in sound:
            continue
        if not type(size) is type(offsets) is type(sizes) is torch.Size or not len(size) == len(offsets) == len(sizes):
            return False
        if any(offset + length > whole for offset, length, whole in zip(offsets, sizes, size, strict=True)):
            return False
        sound.add(ids)
    return type(size) is torch.Size


def _check_storage_data(metadata: Metadata, path: str) -> None:
    files: set[str] = set()
    for index, info in metadata.storage_data.items():
        if not isinstance(index, MetadataIndex) or not isinstance(info, StorageInfo):
            raise DamagedError(f"a malformed storage entry, {type(index).__name__}: {type(info).__name__}")
        fields = info.__dict__
        try:
            file, offset, length = fields["relative_path"], fields["offset"], fields["length"]
        except KeyError as error:
            raise CorruptError(path, shown(index.fqn), f"its storage entry has no {error}") from None
        if type(offset) is not int or type(length) is not int or not 0 <= offset < 1 << 63 > length >= 0:
            raise CorruptError(path, shown(index.fqn), "its storage entry has an invalid offset or length")
        if file in files if type(file) is str else False:
            continue
        if type(file) is not str or not file or "\0" in file or file.startswith("/") or ".." in file.split("/"):
            written = shown(file) if type(file) is str else f"a {type(file).__name__}"
            raise UnsafeError(path, shown(index.fqn), f"is stored outside the checkpoint, in {written!r}")
        if not file.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in file):
            raise CorruptError(path, shown(index.fqn), f"is stored in {file!r:.{SHOWN}}, which is not a file name")
        files.add(file)


def _check_rest(fields: dict[str, Any], path: str) -> None:
    paths = fields.get("planner_data")
    if paths is not None and (type(paths) not in (dict, OrderedDict) or not all(map(_is_path, paths.values()))):
        raise CorruptError(path, "", "planner_data is malformed")
    mark = fields.get("aiodcp", {})
    if type(mark) is not dict or not all(
        type(mark.get(key, ())) in (list, tuple) for key in ("opaque", "empty", "int_keys")
    ):
        raise CorruptError(path, "", "the fields of aiodcp are malformed")
    if not all(type(name) is str for name in mark.get("opaque", ())):
        raise CorruptError(path, "", "the fields of aiodcp are malformed")
    if not all(_is_path(each) for key in ("empty", "int_keys") for each in mark.get(key, ())):
        raise CorruptError(path, "", "the fields of aiodcp are malformed")
    meta = fields.get("storage_meta")
    if meta is not None and not isinstance(meta, StorageMeta):
        raise CorruptError(path, "", "storage_meta is malformed")


def _is_path(value: Any) -> bool:
    return type(value) in (tuple, list) and bool(value) and all(type(key) in (str, int) for key in value)

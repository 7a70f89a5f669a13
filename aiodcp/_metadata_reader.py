"""`.metadata` read safely: an interpreter of the few pickle opcodes that such a file is made of, and nothing else.

`pickle.Unpickler` bounds neither memory nor time: ten bytes make it allocate gigabytes (a memo index), sixty nested
tuples as a key take centuries to hash, and a million of them overflow the C stack. Here memory grows with the file,
keys are hashed when they are known to be flat, and everything is checked before anyone else sees it. Files that
`_pickle_screen` knows to be harmless, as those of this library, are left to the C unpickler, with an allow-list.

Read is every form that torch 2.6 to 2.15 writes on Python 3.11 to 3.15.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import PurePosixPath
from struct import Struct
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint import metadata as dcp

from ._dcp import (
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
from ._note import Seal, SealError, open_seal
from ._pickle_screen import is_harmless
from .errors import CorruptError, UnsafeError

SHOWN = 80  # characters of what a damaged file says: it may say anything, at any length

_U2, _U4, _I4, _U8 = Struct("<H"), Struct("<I"), Struct("<i"), Struct("<Q")
_F8 = Struct(">d")
_MAX_INT_NBYTES = 16


class DamagedError(Exception):
    """The pickle is none of a checkpoint's metadata."""


def _path(*parts: str) -> str:
    """Reads a pickled path of any Python version (3.13 moved the class to `pathlib._local`) as text."""
    return str(PurePosixPath(*parts))


def _layout(name: str) -> torch.layout:
    layout: torch.layout = torch.serialization._get_layout(name)  # type: ignore[no-untyped-call]
    return layout


def _size(parts: tuple[int, ...]) -> torch.Size:
    if type(parts) is not tuple or not all(type(part) is int and 0 <= part < 1 << 63 for part in parts):
        raise DamagedError("a size that is none")
    return torch.Size(parts)


def _globals() -> dict[tuple[str, str], Any]:
    checkpoint = "torch.distributed.checkpoint"
    found: dict[tuple[str, str], Any] = {(f"{checkpoint}.metadata", name): getattr(dcp, name) for name in dcp.__all__}
    found[f"{checkpoint}.metadata", "_MEM_FORMAT_ENCODING"] = dcp._MEM_FORMAT_ENCODING
    older = "torch.distributed._shard.sharded_tensor.metadata"  # before torch 2.3
    found[older, "TensorProperties"] = TensorProperties
    found[older, "MEM_FORMAT_ENCODING"] = dcp._MEM_FORMAT_ENCODING
    found[f"{checkpoint}.filesystem", "_StorageInfo"] = StorageInfo
    found[f"{checkpoint}.filesystem", "_StoragePrefix"] = filesystem._StoragePrefix
    found["torch", "Size"] = torch.Size
    found["torch", "device"] = torch.device
    found["torch.serialization", "_get_layout"] = _layout
    found["collections", "OrderedDict"] = OrderedDict
    for name, value in vars(torch).items():
        if isinstance(value, torch.dtype):
            found["torch", name] = value
    for module in ("pathlib", "pathlib._local"):
        for name in ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"):
            found[module, name] = _path
    return found


_GLOBALS = _globals()
_CALLED: dict[Any, Callable[..., Any]] = {
    torch.Size: _size,
    torch.device: torch.device,
    dcp._MEM_FORMAT_ENCODING: dcp._MEM_FORMAT_ENCODING,
    _layout: _layout,
    _path: _path,
    OrderedDict: OrderedDict,
}
_MADE = {
    value
    for value in _GLOBALS.values()
    if isinstance(value, type) and value.__module__.startswith("torch.distributed") and value not in _CALLED
}


class _Reader:
    """Interprets one pickle."""

    def __init__(self, data: memoryview, path: str) -> None:
        self._data = bytes(data)
        self._path = path

    def read(self) -> Any:
        """Return what the pickle says.

        Raises:
            UnsafeError: it names a class or function that no checkpoint needs.
            Exception: it is damaged; anything may be raised.
        """
        data, position = self._data, 0
        stack: list[Any] = []
        memo: dict[int, Any] = {}
        push, pop = stack.append, stack.pop
        marks: list[int] = []  # where on the stack groups begin
        u4 = _U4.unpack_from
        while True:
            opcode = data[position]
            position += 1
            # The most frequent first: a file of 10,000 tensors has 680,000 of them.
            if opcode == 0x6A:  # LONG_BINGET
                push(memo[u4(data, position)[0]])
                position += 4
            elif opcode == 0x68:  # BINGET
                push(memo[data[position]])
                position += 1
            elif opcode == 0x94:  # MEMOIZE
                memo[len(memo)] = stack[-1]
            elif opcode == 0x72:  # LONG_BINPUT
                memo[u4(data, position)[0]] = stack[-1]
                position += 4
            elif opcode == 0x28:  # MARK
                marks.append(len(stack))
            elif opcode == 0x29:  # EMPTY_TUPLE
                push(())
            elif opcode == 0x7D:  # EMPTY_DICT
                push({})
            elif opcode == 0x81:  # NEWOBJ
                arguments = pop()
                stack[-1] = _make(stack[-1], arguments)
            elif opcode == 0x62:  # BUILD
                state = pop()
                _build(stack[-1], state)
            elif opcode == 0x75:  # SETITEMS
                start = marks.pop()
                _set_items(stack[start - 1], stack[start:])
                del stack[start:]
            elif opcode == 0x85:  # TUPLE1
                stack[-1] = (stack[-1],)
            elif opcode == 0x4B:  # BININT1
                push(data[position])
                position += 1
            elif opcode == 0x52:  # REDUCE
                arguments = pop()
                stack[-1] = _call(stack[-1], arguments)
            elif opcode == 0x58:  # BINUNICODE
                start = position + 4
                position = start + u4(data, position)[0]
                push(_text(data, start, position))
            elif opcode == 0x8C:  # SHORT_BINUNICODE
                start = position + 1
                position = start + data[position]
                push(_text(data, start, position))
            elif opcode == 0x4D:  # BININT2
                push(_U2.unpack_from(data, position)[0])
                position += 2
            elif opcode == 0x4A:  # BININT
                push(_I4.unpack_from(data, position)[0])
                position += 4
            elif opcode == 0x5D:  # EMPTY_LIST
                push([])
            elif opcode == 0x61:  # APPEND
                value = pop()
                _list(stack[-1]).append(value)
            elif opcode == 0x86:  # TUPLE2
                stack[-2:] = [(stack[-2], stack[-1])]
            elif opcode == 0x89:  # NEWFALSE
                push(False)
            elif opcode == 0x88:  # NEWTRUE
                push(True)
            elif opcode == 0x4E:  # NONE
                push(None)
            elif opcode == 0x74:  # TUPLE
                start = marks.pop()
                stack[start:] = [tuple(stack[start:])]
            elif opcode == 0x87:  # TUPLE3
                stack[-3:] = [(stack[-3], stack[-2], stack[-1])]
            elif opcode == 0x65:  # APPENDS
                start = marks.pop()
                _list(stack[start - 1]).extend(stack[start:])
                del stack[start:]
            elif opcode == 0x73:  # SETITEM
                _set_items(stack[-3], stack[-2:])
                del stack[-2:]
            elif opcode == 0x71:  # BINPUT
                memo[data[position]] = stack[-1]
                position += 1
            elif opcode == 0x8A:  # LONG1
                start = position + 1
                position = start + data[position]
                if position - start > _MAX_INT_NBYTES:
                    raise DamagedError("a number that is no size and no place")
                push(int.from_bytes(data[start:position], "little", signed=True))
            elif opcode == 0x63:  # GLOBAL
                end = data.index(b"\n", position)
                after = data.index(b"\n", end + 1)
                push(_find(data[position:end].decode(), data[end + 1 : after].decode(), self._path))
                position = after + 1
            elif opcode == 0x93:  # STACK_GLOBAL
                name = pop()
                stack[-1] = _find(stack[-1], name, self._path)
            elif opcode == 0x47:  # BINFLOAT
                push(_F8.unpack_from(data, position)[0])
                position += 8
            elif opcode == 0x95:  # FRAME: how much to read at a time
                position += 8
            elif opcode == 0x80:  # PROTO
                position += 1
            elif opcode == 0x8D:  # BINUNICODE8
                start = position + 8
                position = start + _U8.unpack_from(data, position)[0]
                push(_text(data, start, position))
            elif opcode == 0x2E:  # STOP
                [found] = stack
                return found
            else:
                raise DamagedError(f"an opcode {opcode:#x} at {position - 1}")


def _find(module: Any, name: Any, path: str) -> Any:
    if type(module) is not str or type(name) is not str:
        raise DamagedError("a name that is none")
    try:
        return _GLOBALS[module, name]
    except KeyError:
        raise UnsafeError(path, "", f"names {_shown(f'{module}.{name}')}, which no checkpoint needs") from None


def _text(data: bytes, start: int, stop: int) -> str:
    if stop > len(data):
        raise DamagedError("a text that does not end")
    return data[start:stop].decode("utf-8", "surrogatepass")


def _list(value: Any) -> list[Any]:
    if type(value) is not list:
        raise DamagedError("items of what is no list")
    return value


def _make(kind: Any, arguments: Any) -> Any:
    if kind in _MADE and arguments == ():
        return object.__new__(kind)
    return _call(kind, arguments)


def _call(function: Any, arguments: Any) -> Any:
    if type(arguments) is not tuple or not (isinstance(function, type) or callable(function)):
        raise DamagedError("a call that is none")
    if function in _MADE:
        if arguments:  # of enums; records come without
            raise DamagedError(f"a {function.__name__} made of arguments")
        return object.__new__(function)
    if not all(type(each) in (str, int, tuple) for each in arguments):
        raise DamagedError("a call with arguments that no checkpoint has")
    return _CALLED[function](*arguments)


def _build(made: Any, state: Any) -> None:
    if type(made) is TensorProperties:
        if type(state) is not tuple:
            raise DamagedError("the properties of a tensor are none")
        made.__setstate__(state[:5])  # type: ignore[no-untyped-call] # six from torch 2.15 on, with `strides`
    elif type(made) in _MADE and type(state) is dict:
        if type(made) is MetadataIndex:
            _check_index(state)
        made.__dict__.update(state)
    else:
        raise DamagedError(f"a state of a {type(made).__name__}")


def _check_index(state: dict[str, Any]) -> None:
    """Make sure that an index can be hashed and compared."""
    offset, number = state.get("offset"), state.get("index")
    if type(state.get("fqn")) is not str or not (offset is None or type(offset) is torch.Size):
        raise DamagedError("a place that belongs to no value")
    if not (number is None or type(number) is int):
        raise DamagedError("a place that belongs to no value")


def _set_items(target: Any, items: list[Any]) -> None:
    keys = items[::2]
    for key in keys:
        if type(key) is not str and not (type(key) is MetadataIndex and "fqn" in key.__dict__):
            raise DamagedError(f"a name that is a {type(key).__name__}")
    if type(target) not in (dict, OrderedDict) or len(items) % 2:
        raise DamagedError("names of what has none")
    target.update(zip(keys, items[1::2], strict=True))


class _Unpickler(pickle.Unpickler):
    """For what is harmless."""

    def __init__(self, data: memoryview, path: str) -> None:
        super().__init__(io.BufferedReader(io.BytesIO(data)))  # has peek(): twice as fast as BytesIO alone
        self._path = path
        self._copies: dict[Any, Any] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Return a copy that lives as long as this load: a pickle can set attributes of whatever it names."""
        found = _find(module, name, self._path)
        if found in _MADE:
            return self._copies.setdefault(found, type(found.__name__, (_CHECKED.get(found, found),), {}))
        if (function := _CALLED.get(found)) is not None:
            return lambda *arguments: function(*arguments)
        return found  # a dtype: nothing can be set


class _AnyProperties(TensorProperties):
    """Reads `TensorProperties` of any length: five fields until torch 2.14, six (`strides`) from 2.15 on."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        super().__setstate__(state[:5])  # type: ignore[no-untyped-call]
        self.__class__ = TensorProperties  # type: ignore[assignment]


class _FlatIndex(MetadataIndex):
    """Is a key only if it can be hashed and compared in no time."""

    def __hash__(self) -> int:
        fqn, offset = self.__dict__.get("fqn"), self.__dict__.get("offset")  # which is left out where it is None
        if type(fqn) is not str or not (offset is None or type(offset) is torch.Size):
            raise DamagedError("a place that belongs to no value")
        return hash((fqn, offset))


_CHECKED = {TensorProperties: _AnyProperties, MetadataIndex: _FlatIndex}


# --- what it must say


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
    """Return, besides, what stands behind the pickle.

    Raises:
        UnsafeError, CorruptError: see `read_metadata`.
    """
    try:
        pickled, seal = open_seal(data)
    except SealError as error:
        raise CorruptError(path, "", str(error)) from error
    try:
        with gc_held_off():
            metadata = _Unpickler(pickled, path).load() if is_harmless(pickled) else _Reader(pickled, path).read()
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
        raise DamagedError("it names no values")
    if type(fields.get("storage_data")) is not dict:
        raise CorruptError(path, "", "says of no value where it is stored")
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
            raise CorruptError(path, _shown(fqn), "the metadata does not say what it is")
    _check_places(metadata, path)
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


def _check_places(metadata: Metadata, path: str) -> None:
    files: set[str] = set()
    for index, info in metadata.storage_data.items():
        if not isinstance(index, MetadataIndex) or not isinstance(info, StorageInfo):
            raise DamagedError(f"a place that is a {type(info).__name__} of a {type(index).__name__}")
        fields = info.__dict__
        try:
            file, offset, length = fields["relative_path"], fields["offset"], fields["length"]
        except KeyError as error:
            raise CorruptError(path, _shown(index.fqn), f"the metadata does not say where it is: no {error}") from None
        if type(offset) is not int or type(length) is not int or not 0 <= offset < 1 << 63 > length >= 0:
            raise CorruptError(path, _shown(index.fqn), "is stored where no file has bytes")
        if file in files if type(file) is str else False:
            continue
        if type(file) is not str or not file or "\0" in file or file.startswith("/") or ".." in file.split("/"):
            shown = _shown(file) if type(file) is str else f"a {type(file).__name__}"
            raise UnsafeError(path, _shown(index.fqn), f"is stored outside the checkpoint, in {shown!r}")
        if not file.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in file):
            raise CorruptError(path, _shown(index.fqn), f"is stored in {file!r:.{SHOWN}}, which is no file's name")
        files.add(file)


def _check_rest(fields: dict[str, Any], path: str) -> None:
    paths = fields.get("planner_data")
    if paths is not None and (type(paths) not in (dict, OrderedDict) or not all(map(_is_path, paths.values()))):
        raise CorruptError(path, "", "the metadata does not say which keys lead to the values")
    mark = fields.get("aiodcp", {})
    if type(mark) is not dict or not all(
        type(mark.get(key, ())) in (list, tuple) for key in ("opaque", "empty", "int_keys")
    ):
        raise CorruptError(path, "", "what this library has noted in the metadata is damaged")
    if not all(type(name) is str for name in mark.get("opaque", ())):
        raise CorruptError(path, "", "what this library has noted in the metadata is damaged")
    if not all(_is_path(each) for key in ("empty", "int_keys") for each in mark.get(key, ())):
        raise CorruptError(path, "", "what this library has noted in the metadata is damaged")
    meta = fields.get("storage_meta")
    if meta is not None and not isinstance(meta, StorageMeta):
        raise CorruptError(path, "", "the metadata does not say by whom it was saved")


def _is_path(value: Any) -> bool:
    return type(value) in (tuple, list) and bool(value) and all(type(key) in (str, int) for key in value)


def _shown(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."

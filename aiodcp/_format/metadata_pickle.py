"""An interpreter of the few pickle opcodes that `.metadata` is made of."""

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

from ..errors import UnsafeError
from .dcp import MetadataIndex, StorageInfo, TensorProperties

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


class PickleInterpreter:
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
        raise UnsafeError(path, "", f"names {shown(f'{module}.{name}')}, which no checkpoint needs") from None


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


class MetadataUnpickler(pickle.Unpickler):
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


def shown(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."

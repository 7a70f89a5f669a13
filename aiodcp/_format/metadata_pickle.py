"""An interpreter of the few pickle opcodes that `.metadata` is made of."""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import PurePosixPath
from struct import Struct
from typing import Any, ClassVar

import torch
from torch.distributed.checkpoint import metadata as dcp

from ..errors import UnsafeError
from .dcp import (
    MEM_FORMAT_ENCODING,
    MetadataIndex,
    StorageInfo,
    StoragePrefix,
    TensorProperties,
    layout_named,
)

SHOWN = 80  # characters of what a damaged file says: it may say anything, at any length

_U2, _U4, _I4, _U8 = Struct("<H"), Struct("<I"), Struct("<i"), Struct("<Q")

_F8 = Struct(">d")

_MAX_INT_NBYTES = 16


class DamagedError(Exception):
    """The pickle is not a checkpoint's metadata."""


def _path(*parts: str) -> str:
    """Reads a pickled path of any Python version (3.13 moved the class to `pathlib._local`) as text."""
    return str(PurePosixPath(*parts))


def _size(parts: tuple[int, ...]) -> torch.Size:
    if type(parts) is not tuple or not all(type(part) is int and 0 <= part < 1 << 63 for part in parts):
        raise DamagedError("a malformed size")
    return torch.Size(parts)


def _globals() -> dict[tuple[str, str], Any]:
    checkpoint = "torch.distributed.checkpoint"
    found: dict[tuple[str, str], Any] = {(f"{checkpoint}.metadata", name): getattr(dcp, name) for name in dcp.__all__}
    found[f"{checkpoint}.metadata", "_MEM_FORMAT_ENCODING"] = MEM_FORMAT_ENCODING
    older = "torch.distributed._shard.sharded_tensor.metadata"  # before torch 2.3
    found[older, "TensorProperties"] = TensorProperties
    found[older, "MEM_FORMAT_ENCODING"] = MEM_FORMAT_ENCODING
    found[f"{checkpoint}.filesystem", "_StorageInfo"] = StorageInfo
    found[f"{checkpoint}.filesystem", "_StoragePrefix"] = StoragePrefix
    found["torch", "Size"] = torch.Size
    found["torch", "device"] = torch.device
    found["torch.serialization", "_get_layout"] = layout_named
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
    MEM_FORMAT_ENCODING: MEM_FORMAT_ENCODING,
    layout_named: layout_named,
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
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._marks: list[int] = []  # where on the stack groups begin

    def read(self) -> Any:
        """Return what the pickle says.

        Raises:
            UnsafeError: it names a class or function that no checkpoint needs.
            Exception: it is damaged; anything may be raised.
        """
        data, stack, memo, marks = self._data, self._stack, self._memo, self._marks
        push, u4, position = stack.append, _U4.unpack_from, 0
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
                arguments = stack.pop()
                stack[-1] = _make(stack[-1], arguments)
            elif opcode == 0x62:  # BUILD
                state = stack.pop()
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
                arguments = stack.pop()
                stack[-1] = _call(stack[-1], arguments)
            elif opcode == 0x2E:  # STOP
                [found] = stack
                return found
            elif opcode in self.OTHERS:
                position = self.OTHERS[opcode](self, position)
            else:
                raise DamagedError(f"an opcode {opcode:#x} at {position - 1}")

    # The other opcodes: each is given the position after it, and returns the position of the next one.

    def _bin_int_2(self, position: int) -> int:
        self._stack.append(_U2.unpack_from(self._data, position)[0])
        return position + 2

    def _bin_int(self, position: int) -> int:
        self._stack.append(_I4.unpack_from(self._data, position)[0])
        return position + 4

    def _long_1(self, position: int) -> int:
        start = position + 1
        stop = start + self._data[position]
        if stop - start > _MAX_INT_NBYTES:
            raise DamagedError("a number too large for a size or an offset")
        self._stack.append(int.from_bytes(self._data[start:stop], "little", signed=True))
        return stop

    def _bin_float(self, position: int) -> int:
        self._stack.append(_F8.unpack_from(self._data, position)[0])
        return position + 8

    def _text(self, start: int, nbytes: int) -> int:
        stop = start + nbytes
        if stop > len(self._data):
            raise DamagedError("a text that is cut off")
        self._stack.append(self._data[start:stop].decode("utf-8", "surrogatepass"))
        return stop

    def _bin_unicode(self, position: int) -> int:
        return self._text(position + 4, _U4.unpack_from(self._data, position)[0])

    def _short_bin_unicode(self, position: int) -> int:
        return self._text(position + 1, self._data[position])

    def _bin_unicode_8(self, position: int) -> int:
        return self._text(position + 8, _U8.unpack_from(self._data, position)[0])

    def _none(self, position: int) -> int:
        self._stack.append(None)
        return position

    def _new_true(self, position: int) -> int:
        self._stack.append(True)
        return position

    def _new_false(self, position: int) -> int:
        self._stack.append(False)
        return position

    def _empty_list(self, position: int) -> int:
        self._stack.append([])
        return position

    def _append(self, position: int) -> int:
        value = self._stack.pop()
        _list(self._stack[-1]).append(value)
        return position

    def _appends(self, position: int) -> int:
        start = self._marks.pop()
        _list(self._stack[start - 1]).extend(self._stack[start:])
        del self._stack[start:]
        return position

    def _tuple(self, position: int) -> int:
        start = self._marks.pop()
        self._stack[start:] = [tuple(self._stack[start:])]
        return position

    def _tuple_2(self, position: int) -> int:
        self._stack[-2:] = [(self._stack[-2], self._stack[-1])]
        return position

    def _tuple_3(self, position: int) -> int:
        self._stack[-3:] = [(self._stack[-3], self._stack[-2], self._stack[-1])]
        return position

    def _set_item(self, position: int) -> int:
        _set_items(self._stack[-3], self._stack[-2:])
        del self._stack[-2:]
        return position

    def _bin_put(self, position: int) -> int:
        self._memo[self._data[position]] = self._stack[-1]
        return position + 1

    def _global(self, position: int) -> int:
        end = self._data.index(b"\n", position)
        after = self._data.index(b"\n", end + 1)
        module, name = self._data[position:end].decode(), self._data[end + 1 : after].decode()
        self._stack.append(_find(module, name, self._path))
        return after + 1

    def _stack_global(self, position: int) -> int:
        name = self._stack.pop()
        self._stack[-1] = _find(self._stack[-1], name, self._path)
        return position

    def _frame(self, position: int) -> int:  # how much to read at a time
        return position + 8

    def _proto(self, position: int) -> int:
        return position + 1

    OTHERS: ClassVar[dict[int, Callable[[PickleInterpreter, int], int]]] = {
        0x47: _bin_float,
        0x4A: _bin_int,
        0x4D: _bin_int_2,
        0x4E: _none,
        0x58: _bin_unicode,
        0x5D: _empty_list,
        0x61: _append,
        0x63: _global,
        0x65: _appends,
        0x71: _bin_put,
        0x73: _set_item,
        0x74: _tuple,
        0x80: _proto,
        0x86: _tuple_2,
        0x87: _tuple_3,
        0x88: _new_true,
        0x89: _new_false,
        0x8A: _long_1,
        0x8C: _short_bin_unicode,
        0x8D: _bin_unicode_8,
        0x93: _stack_global,
        0x95: _frame,
    }


def _find(module: Any, name: Any, path: str) -> Any:
    if type(module) is not str or type(name) is not str:
        raise DamagedError("a malformed name")
    try:
        return _GLOBALS[module, name]
    except KeyError:
        raise UnsafeError(
            path, "", f"names {shown(f'{module}.{name}')}, which is not part of DCP's metadata format"
        ) from None


def _list(value: Any) -> list[Any]:
    if type(value) is not list:
        raise DamagedError("items of something that is not a list")
    return value


def _make(kind: Any, arguments: Any) -> Any:
    if kind in _MADE and arguments == ():
        return object.__new__(kind)
    return _call(kind, arguments)


def _call(function: Any, arguments: Any) -> Any:
    if type(arguments) is not tuple or not (isinstance(function, type) or callable(function)):
        raise DamagedError("a malformed call")
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
            raise DamagedError("malformed properties of a tensor")
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
        raise DamagedError("a malformed index")
    if not (number is None or type(number) is int):
        raise DamagedError("a malformed index")


def _set_items(target: Any, items: list[Any]) -> None:
    keys = items[::2]
    for key in keys:
        if type(key) is not str and not (type(key) is MetadataIndex and "fqn" in key.__dict__):
            raise DamagedError(f"a name that is a {type(key).__name__}")
    if type(target) not in (dict, OrderedDict) or len(items) % 2:
        raise DamagedError("names of something that is not a mapping")
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
            raise DamagedError("a malformed index")
        return hash((fqn, offset))


_CHECKED = {TensorProperties: _AnyProperties, MetadataIndex: _FlatIndex}


def shown(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."

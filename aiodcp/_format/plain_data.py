"""Which pickled values are plain data, and an unpickler that builds those and nothing else.

Plain data are Python's and numpy's value types, dtypes, paths, dates, and the enums, dataclasses and named tuples that
a program defines itself: building one runs no code of the checkpoint's. A class of the program's is looked up only in
modules that it has imported already. `torch.serialization.add_safe_globals` allows more.

The pickle module's own C unpickler would let a pickle set attributes of the classes that it names; this one is the
Python implementation, which need not.
"""

from __future__ import annotations

import collections
import dataclasses
import datetime
import enum
import io
import pathlib
import pickle
import pickletools
import sys
import threading
import warnings
import zipfile
from collections.abc import Callable, Iterable
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any, ClassVar

import torch

from .dcp import layout_named

Global = tuple[str, str]

_BUILTINS = (
    "Ellipsis", "bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int", "list", "range", "set",
    "slice", "str", "tuple",
)  # fmt: skip

_BY_MODULE: dict[str, tuple[str, ...]] = {
    "builtins": _BUILTINS,
    "collections": ("Counter", "OrderedDict", "deque"),
    "datetime": ("date", "datetime", "time", "timedelta", "timezone"),
    "decimal": ("Decimal",),
    "fractions": ("Fraction",),
    "uuid": ("UUID", "SafeUUID"),
    "argparse": ("Namespace",),
    "types": ("SimpleNamespace",),
    "_io": ("BytesIO",),
    "io": ("BytesIO",),
    "numpy": ("dtype", "ndarray"),
    "numpy.core.multiarray": ("_reconstruct", "scalar"),
    "numpy._core.multiarray": ("_reconstruct", "scalar"),
    "numpy.core.numeric": ("_frombuffer",),
    "numpy._core.numeric": ("_frombuffer",),
    "torch": ("Size", "device"),
}  # fmt: skip

_PATHS = ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath", "Path", "PurePath")

# What pickles of protocol 2 call things, as Python 2 did.
_OLD_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg"}

_OLD_NAMES = {("__builtin__", "xrange"): "range", ("__builtin__", "unicode"): "str", ("__builtin__", "long"): "int"}

_FACTORIES = {int, float, str, bool, list, dict, set, tuple}  # that a defaultdict may have


class NotPlainError(Exception):
    """A pickle names what is not plain data.

    Attributes:
        names: all such names, sorted.
    """

    def __init__(self, names: Iterable[str]) -> None:
        super().__init__(tuple(names))
        self.names: tuple[str, ...] = self.args[0]

    @property
    def problem(self) -> str:
        """What is wrong, and what allows it."""
        return (
            f"needs {', '.join(self.names)}, which {'is' if len(self.names) == 1 else 'are'} not plain data; "
            "allow them with torch.serialization.add_safe_globals, or any code with weights_only=False"
        )


def load_plain(pickled: bytes) -> Any:
    """Return the value, if it is made of plain data.

    Raises:
        NotPlainError: it is not; names all that it needs.
        Exception: whatever a damaged pickle raises.
    """
    if names := not_plain(pickled):
        raise NotPlainError(names)
    return _PlainUnpickler(io.BytesIO(pickled)).load()


def load_archive(archive: bytes) -> Any:
    """Return the value in an archive of `torch.save`, if it is made of tensors and plain data.

    Raises:
        NotPlainError: it is not; names all that it needs.
        Exception: whatever a damaged archive raises.
    """
    try:
        return quietly(lambda: torch.load(io.BytesIO(archive), map_location="cpu", weights_only=True))
    except pickle.UnpicklingError as error:
        try:
            names = unsafe_in_archive(archive)
        except ValueError:  # not of torch.save at all, such as TorchScript
            raise error from None
        if names:
            raise NotPlainError(names) from error
    # With a module of ours in place of pickle, which builds the same and no more, `torch.load` reads the tensors.
    return quietly(
        lambda: torch.load(io.BytesIO(archive), map_location="cpu", weights_only=False, pickle_module=_ArchivePickle)
    )


class StandIn:
    """Stands for a tensor that cannot be made without its bytes. Cannot be pickled."""

    def __init__(self, *args: object) -> None:
        return

    def __reduce__(self) -> Any:
        raise TypeError("stands for a tensor")


_PARAMETER: Global = ("torch._utils", "_rebuild_parameter")


def _rebuild_parameter(data: Any, *rest: Any) -> Any:
    rebuild: Any = torch._utils._rebuild_parameter
    return data if isinstance(data, StandIn) else rebuild(data, *rest)


# How torch makes tensors that are not dense, or are wrapped; all others can be made of a storage without memory.
_STAND_INS: dict[Global, Any] = {
    _PARAMETER: _rebuild_parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): StandIn,
} | {
    ("torch._utils", f"_rebuild_{kind}"): StandIn
    for kind in (
        "qtensor",
        "sparse_tensor",
        "nested_tensor",
        "wrapper_subclass",
        "device_tensor_from_numpy",
        "device_tensor_from_cpu_tensor",
        "meta_tensor_no_storage",
    )
}


def _unless_on_meta(make: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that makes a tensor, or a `StandIn` where what it is made of has no bytes."""
    return lambda *args: StandIn() if _is_on_meta(args) else make(*args)


def _is_on_meta(value: Any) -> bool:
    if isinstance(value, tuple):
        return any(map(_is_on_meta, value))
    if isinstance(value, torch.Tensor | torch.TypedStorage):
        return value.device.type == "meta"
    return isinstance(value, StandIn)


def load_with_storages(
    pickled: bytes, find_storage: Callable[[Any], Any], *, is_outline: bool, weights_only: bool = True
) -> Any:
    """Return the value that the pickle of an archive describes, made of plain data, tensors, and `StandIn`s of others.

    Args:
        pickled: the record `data.pkl` of an archive of `torch.save`.
        find_storage: returns the storage that stands for a persistent id; on "meta" for one without its bytes.
        is_outline: whether to make no tensor that is not dense, or is wrapped; else those whose bytes are there.
        weights_only: whether it may be made of nothing else.

    Raises:
        NotPlainError: it is made of anything else; names all that it needs.
        Exception: whatever a damaged pickle raises.
    """
    unpickler: Any = (_OutlineUnpickler if weights_only else _AnyUnpickler)(io.BytesIO(pickled))
    unpickler.persistent_load = find_storage
    unpickler.is_outline = is_outline
    try:
        value = quietly(unpickler.load)
    except NotPlainError as error:
        known = torch._weights_only_unpickler._get_allowed_globals()
        unknown = sorted(set(not_plain(pickled)) - known.keys())
        raise NotPlainError(unknown or error.names) from error
    validate: Any = torch._utils._validate_loaded_sparse_tensors  # as torch.load does
    validate()
    return value


def quietly(load: Callable[[], Any]) -> Any:
    """Call a function of torch's that warns of how this library calls it, which is none of the user's business.

    Where warnings are errors (`-W error`) it is called again without them. Not at once: filters are the process's, and
    to change them in one thread while another does the same may lose the user's.
    """
    try:
        return load()
    except Warning:
        with _without_warnings, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return load()


_without_warnings = threading.Lock()
# torch 2.14 and newer; the last filter, so that the user's own come first
warnings.filterwarnings("ignore", message="Validating sparse tensor invariants", append=True)


def not_plain(pickled: bytes) -> list[str]:
    """Return what a pickle names that is not plain data, sorted."""
    return sorted({f"{module}.{name}" for module, name in globals_in(pickled) if _find(module, name) is None})


def unsafe_in_archive(archive: bytes) -> list[str]:
    """Return what an archive of `torch.save` names that neither `torch.load` takes for data nor this library, sorted.

    Raises:
        ValueError: it is not such an archive.
    """
    unknown = set(torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(archive)))
    if not unknown:
        return []
    with zipfile.ZipFile(io.BytesIO(archive)) as records:
        [pickled] = [records.read(name) for name in records.namelist() if name.endswith("/data.pkl")]
    named = {(f"{module}.{name}", _find(module, name)) for module, name in globals_in(pickled)}
    return sorted(name for name, found in named if name in unknown and found is None)


def globals_in(pickled: bytes) -> set[Global]:
    """Return what a pickle names, by today's names."""
    found: set[Global] = set()
    texts: list[str] = []  # a name from protocol 4 on is the last two texts; before, an operand
    memo: dict[int, str] = {}
    operations: Iterable[tuple[Any, Any, Any]] = pickletools.genops(pickled)
    for opcode, argument, _ in operations:
        if opcode.name == "GLOBAL":
            module, _, name = argument.partition(" ")
            found.add(_today(module, name))
        elif opcode.name == "STACK_GLOBAL":
            found.add(_today(*texts[-2:]))
        elif "UNICODE" in opcode.name:
            texts.append(argument)
        elif opcode.name == "MEMOIZE" and texts:
            memo[len(memo)] = texts[-1]
        elif opcode.name in ("BINGET", "LONG_BINGET") and argument in memo:
            texts.append(memo[argument])
    return found


def _today(module: str, name: str) -> Global:
    name = _OLD_NAMES.get((module, name), name)
    return _OLD_MODULES.get(module, module), name


def _find(module: str, name: str) -> Any:
    """Return what a pickle may use under a name; None if that is not plain data."""
    if name in _BY_MODULE.get(module, ()):
        __import__(module)
        return getattr(sys.modules[module], name, None)
    if (module, name) in _GUARDED:
        return _GUARDED[module, name]
    if module in ("pathlib", "pathlib._local") and name in _PATHS:
        return getattr(pathlib, name)
    if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype | torch.memory_format):
        return found
    if module == "numpy" and "numpy" in sys.modules and _is_numpy_scalar(getattr(sys.modules[module], name, None)):
        return getattr(sys.modules[module], name)
    return _allowed_by_user().get((module, name)) or _defined_by_user(module, name)


def _is_numpy_scalar(found: object) -> bool:
    return isinstance(found, type) and issubclass(found, sys.modules["numpy"].generic)


def _allowed_by_user() -> dict[Global, Any]:
    allowed: dict[Global, Any] = {}
    for each in torch.serialization.get_safe_globals():
        if isinstance(each, tuple):
            module, _, name = each[1].rpartition(".")
            allowed[module, name] = each[0]
        else:
            allowed[each.__module__, each.__qualname__] = each
    return allowed


def _defined_by_user(module: str, name: str) -> Any:
    """Return an enum, a dataclass or a named tuple of the program's, if to build one runs no method of its own."""
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    if not isinstance(found, type) or found.__module__ != module:
        return None
    if issubclass(found, enum.Enum):
        return found
    if hasattr(found, "__del__"):
        return None
    if dataclasses.is_dataclass(found) and found.__new__ is object.__new__:
        restores = getattr(found, "__setstate__", None)  # of a frozen one with slots, made by dataclasses
        return found if restores is None or restores.__module__ == "dataclasses" else None
    if issubclass(found, tuple) and hasattr(found, "_fields") and found.__bases__ == (tuple,):
        return found
    return None


def _encode(text: str, encoding: str) -> bytes:
    """Stands for `_codecs.encode`, by which protocol 2 says bytes."""
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"bytes in {encoding!r}")
    return text.encode(encoding)


def _member(kind: Any, name: str) -> Any:
    """Stands for `getattr`, by which Python 3.11 says the members of an enum."""
    if not isinstance(kind, enum.EnumMeta):
        raise pickle.UnpicklingError(f"an attribute {name!r} of a {type(kind).__name__}")
    return kind.__members__[name]


class _DefaultDict:
    def __call__(self, factory: Any = None) -> Any:
        if factory is not None and factory not in _FACTORIES:
            raise pickle.UnpicklingError(f"a defaultdict of {factory!r}")
        return collections.defaultdict(factory)


def _rebuild_object(kind: Any, base: Any, state: Any) -> Any:
    """Stands for `copyreg._reconstructor`."""
    if base is object and state is None:
        return object.__new__(kind)
    raise pickle.UnpicklingError(f"a {kind!r} made as a {base!r}")


_GUARDED: dict[Global, Any] = {
    ("_codecs", "encode"): _encode,
    ("builtins", "getattr"): _member,
    ("collections", "defaultdict"): _DefaultDict(),
    ("copyreg", "_reconstructor"): _rebuild_object,
    ("builtins", "object"): object,
    ("torch.serialization", "_get_layout"): layout_named,
    ("datetime", "UTC"): datetime.UTC,
}


class _PlainUnpickler(pickle._Unpickler):
    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)
    stack: list[Any]

    def find_class(self, module: str, name: str) -> Any:
        module, name = _today(module, name)
        found = _find(module, name)
        if found is None:
            raise NotPlainError([f"{module}.{name}"])
        return found

    def load_build(self) -> None:
        """Set the state of an instance, never of a class or function: that would change it for the whole process."""
        if isinstance(self.stack[-2], type | FunctionType | BuiltinFunctionType | ModuleType | _DefaultDict):
            raise pickle.UnpicklingError("sets attributes of what it names")
        super().load_build()  # type: ignore[misc]

    dispatch[pickle.BUILD[0]] = load_build


class _ArchiveUnpickler(_PlainUnpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return super().find_class(module, name)
        except NotPlainError:
            known = torch._weights_only_unpickler._get_allowed_globals()
            if (found := known.get(f"{module}.{name}")) is None:
                raise
            return found


class _OutlineUnpickler(_ArchiveUnpickler):
    is_outline: bool

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _STAND_INS:
            return super().find_class(module, name)
        if self.is_outline or (module, name) == _PARAMETER:
            return _STAND_INS[module, name]
        return _unless_on_meta(super().find_class(module, name))


class _AnyUnpickler(pickle.Unpickler):
    is_outline: bool

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _STAND_INS:
            return super().find_class(module, name)
        if self.is_outline or (module, name) == _PARAMETER:
            return _STAND_INS[module, name]
        return _unless_on_meta(super().find_class(module, name))


class _ArchivePickle:
    """Stands for the pickle module in `torch.load`."""

    Unpickler = _ArchiveUnpickler
    UnpicklingError = pickle.UnpicklingError
    __name__ = "pickle"

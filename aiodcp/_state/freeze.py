"""Values pickled as of now."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint.stateful import Stateful

from .._format.archive_writer import frame_value
from .._format.plain_data import not_plain, unsafe_in_archive
from ..errors import CaptureError
from .per_rank import PerRank
from .sharding import is_sharded

_SCALARS = {int, float, str, bytes, bool, type(None)}


@dataclass(slots=True)
class Frozen:
    """A value as it was at the moment of capture.

    Attributes:
        data: its pickle, or an archive of `torch.save`.
        framed: which of the two.
        needs: what it names that is not plain data: `load` does not build it by default.
    """

    data: bytes
    framed: bool
    needs: tuple[str, ...] = ()

    def archive(self) -> bytes:
        """Return the archive of `torch.save`. Framing a pickle takes ten times as long as making it."""
        return self.data if self.framed else frame_value(self.data)


class _NestedStatefulError(Exception):
    """The value has an object inside whose `state_dict()` would not be called."""


class _FreezingPickler(pickle.Pickler):
    """Pickles a value, and finds out what is in it."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=2)
        self.holds_tensors = False
        self.holds_objects = False

    def reducer_override(self, obj: object) -> Any:  # called for nothing that pickle itself writes: fast
        self.holds_objects = True
        if isinstance(obj, PerRank) or is_sharded(obj):
            raise TypeError(f"a {type(obj).__name__} inside another object cannot be saved: hold it in a dict or list")
        if isinstance(obj, (torch.Tensor, torch.UntypedStorage, torch.TypedStorage)):
            self.holds_tensors = True  # only `torch.save` knows how to write it; here look on for the rest
            return int, ()
        if not isinstance(obj, type) and isinstance(obj, Stateful):
            raise _NestedStatefulError(obj)
        return NotImplemented


def freeze(fqn: str, value: object) -> Frozen:
    """Pickle a value as `torch.save` does, for the many values without tensors in a hundredth of its time.

    Raises:
        CaptureError: it cannot be pickled, or what would be loaded is not what is meant.
    """
    if type(value) in _SCALARS:
        return Frozen(pickle.dumps(value, protocol=2), False)
    if isinstance(value, torch.Tensor):
        if torch.nn.parameter.is_lazy(value):
            raise CaptureError(fqn, "is a parameter of a lazy module, which has no value before the first forward")
        if value.is_meta:
            raise CaptureError(fqn, "a tensor on the meta device has no data to save")
        if value.is_nested:
            raise ragged(fqn)
    file = io.BytesIO()
    pickler = _FreezingPickler(file)
    try:
        pickler.dump(value)
        if not pickler.holds_tensors:
            data = file.getvalue()
            return Frozen(data, False, tuple(not_plain(data)) if pickler.holds_objects else ())
        data = _archive(value)
    except _NestedStatefulError as error:
        raise refuse_nested(fqn, value, error.args[0]) from None
    except Exception as error:
        raise CaptureError(fqn, f"{type(value).__name__} cannot be pickled: {error!r}") from error
    return Frozen(data, True, tuple(unsafe_in_archive(data)))


def ragged(fqn: str) -> CaptureError:
    """Return the error for a nested tensor, which has no shape: DCP has no form for it."""
    return CaptureError(fqn, "a nested tensor cannot be saved: save its parts, as in list(x.unbind())")


def refuse_nested(fqn: str, value: object, found: object) -> CaptureError:
    """Return the error for an object with a `state_dict()` that is not at the top level."""
    problem = f"is a {type(found).__name__}: state_dict() is called only at the top level, so pass what it returns"
    return CaptureError(_name_of(fqn, value, found), problem)


def _name_of(fqn: str, value: object, wanted: object) -> str:
    """Return by which name an object inside a value is best called."""
    if isinstance(value, Mapping):
        items: Iterable[tuple[Any, Any]] = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    else:
        return fqn
    for key, each in items:
        if each is wanted:
            return f"{fqn}.{key}"
        if (name := _name_of(f"{fqn}.{key}", each, wanted)) != f"{fqn}.{key}":
            return name
    return fqn


def _archive(value: object) -> bytes:
    file = io.BytesIO()
    with checksums():
        torch.save(value, file)
    return file.getvalue()


@contextmanager
def checksums() -> Iterator[None]:
    """Have `torch.save` write CRC32s in the block, whatever the process has set."""
    before = torch.serialization.get_crc32_options()
    if not before:
        torch.serialization.set_crc32_options(True)
    try:
        yield
    finally:
        if not before:
            torch.serialization.set_crc32_options(False)

"""From stored bytes to tensors and values, each compared with its checksum on the way."""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ._archive import find_tensor
from ._arena import Arena
from ._layout import ALIGNMENT, frame_value
from ._reads import TensorRead
from ._stage import Checksum
from .errors import CorruptError, UnsafeError


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """How items are checked and decoded; `crc32` is None when checksums are not to be compared."""

    locate: Callable[[str], str]
    crc32: Checksum | None
    weights_only: bool

    def framed(self, read: TensorRead, place: int, head: memoryview, payload: memoryview) -> None:
        """Compare a payload with the CRC32 at `place` of `head`."""
        if self.crc32 is not None and self.crc32(payload, 0) != int.from_bytes(head[place : place + 4], "little"):
            raise self._damaged(read.fqn, read.file)

    def archive(self, fqn: str, file: str, data: bytes) -> Any:
        """Load an archive of `torch.save`."""
        try:
            if self.crc32 is not None and zipfile.ZipFile(io.BytesIO(data)).testzip() is not None:
                raise self._damaged(fqn, file)
        except CorruptError:
            raise
        except Exception as error:  # a damaged archive can raise almost anything
            raise CorruptError(self.locate(file), fqn, f"not an archive of torch.save: {error!r}") from error
        try:
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=self.weights_only)
        except pickle.UnpicklingError as error:
            if not self.weights_only:
                raise CorruptError(self.locate(file), fqn, f"cannot be unpickled: {error}") from error
            named = re.search(r"GLOBAL ([\w.]+)", str(error))
            problem = (
                f"needs {named[1] if named else 'more than data'}, which torch.load(weights_only=True) does not allow; "
                "torch.serialization.add_safe_globals allows it, weights_only=False allows any code"
            )
            raise UnsafeError(self.locate(file), fqn, problem) from error
        except Exception as error:
            raise CorruptError(self.locate(file), fqn, f"cannot be loaded: {error!r}") from error

    def value(self, fqn: str, file: str, data: bytes) -> Any:
        """Load a value that is no tensor; without torch's slow unpickler when nothing but builtins is in it."""
        start, nbytes = 46, int.from_bytes(data[18:22], "little")
        pickled = data[start : start + nbytes]
        if frame_value(pickled) == data:  # our own framing, byte for byte, checksums included
            try:
                return _BuiltinsUnpickler(io.BytesIO(pickled)).load()
            except _NotBuiltinError:
                return self.archive(fqn, file, data)
            except Exception as error:
                raise CorruptError(self.locate(file), fqn, f"cannot be unpickled: {error!r}") from error
        return self.archive(fqn, file, data)

    def _damaged(self, fqn: str, file: str) -> CorruptError:
        problem = "its CRC32 is not the one it was saved with; check_crc=False loads it nevertheless"
        return CorruptError(self.locate(file), fqn, problem)


class _NotBuiltinError(Exception):
    """The pickle names a class."""


class _BuiltinsUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise _NotBuiltinError


def unpack(read: TensorRead, arena: Arena, start: int, check: Check) -> torch.Tensor:
    """Return the tensor of an archive of `torch.save` that begins at `start`; a view of the arena if it can be one."""
    archive = arena.memory[start : start + read.nbytes]
    stored = find_tensor(archive, check.crc32)
    if stored is None:
        tensor = check.archive(read.fqn, read.file, bytes(archive))
    else:
        storage = arena.tensor[start + stored.start : start + stored.stop]
        if (start + stored.start) % ALIGNMENT:
            storage = storage.clone()
        tensor = storage.view(stored.dtype).as_strided(
            stored.sizes, stored.strides, storage.storage_offset() // stored.dtype.itemsize + stored.offset
        )
    if isinstance(tensor, torch.Tensor) and tensor.shape == read.sizes and tensor.dtype == read.dtype:
        return tensor
    problem = f"a {type(tensor).__name__}, where {read.dtype} of {tuple(read.sizes)} was announced"
    raise CorruptError(check.locate(read.file), read.fqn, problem)

"""From stored bytes to tensors and values, each compared with its checksum on the way."""

from __future__ import annotations

import io
import pickle
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .._engine.host_memory import Arena
from .._format.alignment import ALIGNMENT
from .._format.archive_reader import check_records, find_tensor, framed_pickle
from .._format.archive_writer import frame_value
from .._format.checksum import Checksum
from .._format.item_tables import matches_table
from .._format.plain_data import NotPlainError, load_archive, load_plain, quietly
from ..errors import CorruptError, LoadError, UnsafeError
from .plan import TensorRead

MAX_ERROR_CHARS = 300  # characters of an error's text


@dataclass(frozen=True, slots=True, kw_only=True)
class ItemDecoder:
    """How items are checked and decoded.

    Attributes:
        describe: returns what an error calls a file.
        crc32: computes checksums; None when they are not to be compared.
        weights_only: whether values may only be plain data.
        note_unchecked: called when an item has no checksums.
    """

    describe: Callable[[str], str]
    crc32: Checksum | None
    weights_only: bool
    note_unchecked: Callable[[], None] = lambda: None

    def framed(self, read: TensorRead, position: int, header: memoryview, payload: memoryview) -> None:
        """Compare a payload with the CRC32 at `position` of `header`."""
        if self.crc32 is None:
            return
        stored = int.from_bytes(header[position : position + 4], "little")
        self.compare(read.fqn, read.file, self.crc32(payload, 0), stored, read.crc)

    def compare(self, fqn: str, file: str, crc: int, stored: int, in_table: int | None) -> None:
        """Compare a payload's CRC32 with the one that is stored with it, and with the one in its file's table."""
        if crc != stored:
            raise self._damaged(fqn, file)
        if in_table not in (None, crc):
            raise self._wrong_item(fqn, file)

    def whole(self, read: TensorRead, item: memoryview) -> None:
        """Compare an item with its CRC32 in its file's table."""
        if self.crc32 is not None and read.crc not in (None, self.crc32(item, 0)):
            raise self._wrong_item(read.fqn, read.file)

    def archive(self, fqn: str, file: str, data: bytes, crc: int | None = None) -> Any:
        """Load an archive of `torch.save`, whose CRC32 in its file's table is `crc`."""
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                check_records(archive.infolist(), len(data))
                checked = self.crc32 is not None and self._has_checksums(archive)
                if checked and archive.testzip() is not None:
                    raise self._damaged(fqn, file)
                if (
                    self.crc32 is not None
                    and crc is not None
                    and not matches_table(crc, lambda: zlib.crc32(data), archive.infolist())
                ):
                    raise self._wrong_item(fqn, file)
        except CorruptError:
            raise
        except Exception as error:  # a damaged archive can raise almost anything
            raise CorruptError(
                self.describe(file), fqn, f"not an archive of torch.save: {_error_text(error)}"
            ) from error
        try:
            if self.weights_only:
                return load_archive(data)
            return quietly(lambda: torch.load(io.BytesIO(data), map_location="cpu", weights_only=False))
        except NotPlainError as error:
            raise UnsafeError(self.describe(file), fqn, error.problem, error.names) from error
        except (AttributeError, ImportError) as error:
            raise self._undefined(fqn, file, error) from error
        except Exception as error:
            if checked:  # the bytes are those that were saved
                raise LoadError(f"{fqn}: the saved value cannot be reconstructed: {error!r}") from error
            raise CorruptError(self.describe(file), fqn, f"cannot be loaded: {_error_text(error)}") from error

    def value(self, fqn: str, file: str, data: bytes, crc: int | None = None) -> Any:
        """Load a value that is not a tensor; without torch's slow unpickler when nothing but builtins is in it."""
        pickled = framed_pickle(data)
        if frame_value(pickled) == data:  # our own framing, byte for byte, checksums included
            if self.crc32 is not None and crc not in (None, zlib.crc32(data)):
                raise self._wrong_item(fqn, file)
            try:
                return _BuiltinsUnpickler(io.BytesIO(pickled)).load()
            except _NotBuiltinError:
                pass
            except Exception as error:
                raise CorruptError(self.describe(file), fqn, f"cannot be unpickled: {error!r}") from error
            if self.weights_only:
                try:
                    return load_plain(pickled)
                except NotPlainError as error:
                    raise UnsafeError(self.describe(file), fqn, error.problem, error.names) from error
                except Exception as error:
                    raise LoadError(f"{fqn}: the saved value cannot be reconstructed: {error!r}") from error
        return self.archive(fqn, file, data, crc)

    def _has_checksums(self, archive: zipfile.ZipFile) -> bool:
        """Whether an archive was saved with checksums: `torch.serialization.set_crc32_options` can leave them out."""
        if any(record.CRC for record in archive.infolist()):
            return True
        self.note_unchecked()
        return False

    def _undefined(self, fqn: str, file: str, error: Exception) -> UnsafeError:
        return UnsafeError(self.describe(file), fqn, f"needs a class that this program has not imported: {error}")

    def _wrong_item(self, fqn: str, file: str) -> CorruptError:
        problem = "is intact, but is not the item that was saved here; check_crc=False loads it anyway"
        return CorruptError(self.describe(file), fqn, problem)

    def _damaged(self, fqn: str, file: str) -> CorruptError:
        problem = "CRC32 mismatch; check_crc=False loads it anyway"
        return CorruptError(self.describe(file), fqn, problem)


def _error_text(error: BaseException) -> str:
    """Return what an error says, in bounds: a file may put anything into it."""
    return f"{type(error).__name__}: {error}"[:MAX_ERROR_CHARS]


class _NotBuiltinError(Exception):
    """The pickle names a class."""


class _BuiltinsUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise _NotBuiltinError


def unpack(read: TensorRead, arena: Arena, start: int, decoder: ItemDecoder) -> torch.Tensor:
    """Return the tensor of an archive of `torch.save` that begins at `start`; a view of the arena if it can be one."""
    archive = arena.memory[start : start + read.nbytes]
    stored = find_tensor(archive, decoder.crc32)
    if stored is not None:
        decoder.whole(read, archive)
    if stored is not None and not stored.has_checksums:
        decoder.note_unchecked()
    if stored is None:
        tensor = decoder.archive(read.fqn, read.file, bytes(archive), read.crc)
    else:
        storage = arena.tensor[start + stored.start : start + stored.stop]
        if (start + stored.start) % ALIGNMENT:
            storage = storage.clone()
        tensor = storage.view(stored.dtype).as_strided(
            stored.sizes, stored.strides, storage.storage_offset() // stored.dtype.itemsize + stored.offset
        )
    if isinstance(tensor, torch.Tensor) and tensor.shape == read.sizes and tensor.dtype == read.dtype:
        return tensor
    problem = f"contains a {type(tensor).__name__}, but the metadata says {read.dtype} of shape {tuple(read.sizes)}"
    raise CorruptError(decoder.describe(read.file), read.fqn, problem)

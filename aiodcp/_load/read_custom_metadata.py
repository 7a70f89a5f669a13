"""Custom metadata of a checkpoint, read without unpickling anything. No torch here."""

from __future__ import annotations

from typing import Any

from .._foreign.metadata_file import read_end
from .._format.custom_metadata import decode_custom_metadata
from .._format.naming import METADATA_NAME
from .._format.seal import SealError, read_seal, seal_nbytes
from ..errors import CorruptError, NotACheckpointError, ReadError
from ..storage.base import Storage


async def read_custom_metadata(storage: Storage, checkpoint_id: str) -> dict[str, Any]:
    """Return the custom metadata of a checkpoint.

    Raises:
        NotACheckpointError: there is no committed checkpoint.
        CorruptError: it is not what was saved.
        ReadError: storage failed.
    """
    custom_metadata, _ = await read_dated_custom_metadata(storage, checkpoint_id)
    return custom_metadata


async def read_dated_custom_metadata(storage: Storage, checkpoint_id: str) -> tuple[dict[str, Any], float | None]:
    """Return the custom metadata of a checkpoint, and when it was committed as the storage knows it.

    Raises:
        NotACheckpointError: there is no committed checkpoint.
        CorruptError: it is not what was saved.
        ReadError: storage failed.
    """
    path = storage.describe(checkpoint_id, METADATA_NAME)
    try:
        async with storage.open(checkpoint_id, METADATA_NAME) as reader:
            modified_at: float | None = reader.modified_at
            end = await read_end(reader, seal_nbytes)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotACheckpointError(checkpoint_id) from error
    except (OSError, EOFError) as error:
        raise ReadError(path, str(error)) from error
    try:
        return decode_custom_metadata(read_seal(end).custom_metadata), modified_at
    except SealError as error:
        raise CorruptError(path, "", str(error)) from error

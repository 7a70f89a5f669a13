"""Finding the `.metadata` of a checkpoint, or saying what is there instead."""

from __future__ import annotations

import re
from collections.abc import Sequence

from .._format.naming import METADATA_NAME
from ..errors import FormatError, NotACheckpointError, ReadError
from ..storage.base import Storage
from ..storage.error_mapping import read_errors

_RANK_METADATA = re.compile(r"__\d+\.metadata")


async def get_metadata(storage: Storage, checkpoint_id: str) -> bytes:
    """Return the metadata's content.

    Raises:
        NotACheckpointError: there is none.
        FormatError: there are files of another format instead.
        ReadError: storage failed.
    """
    path = storage.describe(checkpoint_id, METADATA_NAME)
    try:
        with read_errors(path):
            return await storage.get(checkpoint_id, METADATA_NAME)
    except ReadError as error:
        if not isinstance(error.__cause__, FileNotFoundError | NotADirectoryError):
            raise
        names: list[str] = []
        if isinstance(error.__cause__, FileNotFoundError):
            with read_errors(path):
                names = await storage.list_files(checkpoint_id)
        if problem := _other_format(names):
            raise FormatError(checkpoint_id, problem) from error.__cause__
        raise NotACheckpointError(checkpoint_id) from error.__cause__


def _other_format(names: Sequence[str]) -> str:
    """Say of what other format these files are, if it is one that is known; else nothing."""
    if any(_RANK_METADATA.fullmatch(name) for name in names):
        return (
            "was saved with use_collectives=False, with a metadata file for each rank (__0.metadata) and no .metadata; "
            "aiodcp cannot read this yet: load it with dcp.load, and save it again"
        )
    if any(name.endswith((".safetensors", ".safetensors.index.json")) for name in names):
        return (
            "holds safetensors files, as Hugging Face's save_pretrained writes them, and no .metadata; aiodcp "
            "cannot read these yet: load them with safetensors.torch.load_file or from_pretrained"
        )
    return ""

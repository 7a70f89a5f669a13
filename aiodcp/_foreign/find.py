"""What lies at a checkpoint's id: DCP's `.metadata`, or a checkpoint of another format, said in the same terms."""

from __future__ import annotations

import posixpath
from collections.abc import Sequence

from .._engine.threads import Threads, in_thread, in_thread_if_long
from .._format.dcp import Metadata
from .._format.extension import foreign_layout, is_ours
from .._format.index_reader import MAGIC as INDEX_MAGIC
from .._format.index_reader import index_of_end, read_index, without_pickle
from .._format.metadata_reader import read_sealed
from .._format.naming import METADATA_NAME, is_leftover
from .._format.seal import Seal, seal_and_outline_nbytes
from ..errors import CorruptError, FormatError, NotACheckpointError, ReadError
from ..storage.base import Storage
from ..storage.error_mapping import read_errors
from .dcp_safetensors import find_safetensors_items
from .index import MAGIC, ForeignIndex
from .metadata_file import read_end, read_whole
from .rank_metadata import join_rank_metadata, prefer_own, rank_metadata_names
from .safetensors_files import (
    INDEX_SUFFIX,
    SUFFIX,
    choose_files,
    looks_like_safetensors,
    read_safetensors,
    read_weight_map,
)
from .torch_file import looks_like_old_torch_file, looks_like_torch_file, read_torch_file

LARGE_NBYTES = 4 << 20
"""Of a `.metadata` from which loads read the end alone. Of a smaller one they compare the pickle's checksum, too."""

SHORT_METADATA_NBYTES = 16 << 10  # that are read in less than a millisecond

_START_NBYTES = 16  # of a file: enough to know its format

_OLD_TORCH = "is a pickle, as torch.save wrote before torch 1.6: load it with torch.load, and save it again"


async def find_metadata(
    storage: Storage, checkpoint_id: str, threads: Threads, *, weights_only: bool, whole: bool = False
) -> bytes:
    """Return the content of `.metadata`, or what stands for it where a checkpoint of another format is.

    Args:
        storage, checkpoint_id: where to look.
        threads: to unpickle in.
        weights_only: whether a file of `torch.save` may only have plain data.
        whole: with its pickle, also where this library's columns say the same.

    Raises:
        NotACheckpointError: there is neither.
        FormatError: there is one that cannot be read; says why.
        CorruptError, UnsafeError: there is one that is damaged, or needs more than plain data.
        ReadError: storage failed.
    """
    path = storage.describe(checkpoint_id, METADATA_NAME)
    try:
        with read_errors(path):
            async with storage.open(checkpoint_id, METADATA_NAME) as reader:
                if not whole and reader.nbytes > LARGE_NBYTES:
                    end = await read_end(reader, seal_and_outline_nbytes)
                    if (index := await in_thread(threads.compute, index_of_end, end)) is not None:
                        return index
                data = await read_whole(reader)
    except ReadError as error:
        if not isinstance(error.__cause__, FileNotFoundError | NotADirectoryError):
            raise
        found = await _find_foreign(storage, checkpoint_id, threads, weights_only=weights_only)
        if found is None:
            raise NotACheckpointError(checkpoint_id) from error.__cause__
        return found
    if data.startswith((MAGIC, INDEX_MAGIC)):
        raise CorruptError(path, "", "not a checkpoint's metadata")
    if whole:
        return data
    return await in_thread_if_long(len(data) <= SHORT_METADATA_NBYTES, threads.compute, without_pickle, data)


async def _find_foreign(storage: Storage, checkpoint_id: str, threads: Threads, *, weights_only: bool) -> bytes | None:
    try:
        with read_errors(storage.describe(checkpoint_id)):
            names = await storage.list_files(checkpoint_id)
    except ReadError as error:
        if not isinstance(error.__cause__, NotADirectoryError):
            raise
        names = []
    if rank_names := rank_metadata_names(names):
        return await join_rank_metadata(storage, checkpoint_id, rank_names)
    if names:
        index = await _read_folder(storage, checkpoint_id, names, threads, weights_only=weights_only)
    else:
        index = await _read_file(storage, checkpoint_id, threads, weights_only=weights_only)
    return None if index is None else index.pack()


async def _read_folder(
    storage: Storage, folder: str, names: Sequence[str], threads: Threads, *, weights_only: bool
) -> ForeignIndex | None:
    if any(name.endswith(SUFFIX) for name in names):
        indices = [name for name in names if name.endswith(INDEX_SUFFIX)]
        if len(indices) > 1:
            problem = f"has several indices of safetensors files: {', '.join(indices)}; name the one file that is meant"
            raise FormatError(storage.describe(folder), problem)
        with read_errors(storage.describe(folder)):
            index = await storage.get(folder, indices[0]) if indices else None
        try:
            weight_map = read_weight_map(index) if index is not None else None
            files = choose_files(names, weight_map)
        except ValueError as error:
            raise CorruptError(storage.describe(folder, indices[0] if indices else ""), "", str(error)) from error
        return await read_safetensors(storage, folder, files, weight_map=weight_map)
    if "pytorch_model.bin" in names:
        return await read_torch_file(storage, folder, "pytorch_model.bin", threads, weights_only=weights_only)
    if any(name.endswith(".bin.index.json") for name in names):
        problem = (
            "holds a model in several files of torch.save (pytorch_model.bin.index.json), which aiodcp does not read: "
            "load it with from_pretrained, and save it as safetensors"
        )
        raise FormatError(storage.describe(folder), problem)
    return None


async def _read_file(
    storage: Storage, checkpoint_id: str, threads: Threads, *, weights_only: bool
) -> ForeignIndex | None:
    """Return what the one file of that name holds; None if there is none."""
    folder, file = split_file(checkpoint_id)
    path = storage.describe(folder, file)
    if not file or is_leftover(file):  # data of a checkpoint is none
        return None
    try:
        async with storage.open(folder, file) as reader:
            first = bytearray(min(_START_NBYTES, reader.nbytes))
            await reader.read_into(0, [memoryview(first)])
            start = bytes(first)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None
    except OSError as error:
        raise ReadError(path, str(error)) from error
    if looks_like_torch_file(start):
        return await read_torch_file(storage, folder, file, threads, weights_only=weights_only, in_parent=True)
    if looks_like_safetensors(start):
        return await read_safetensors(storage, folder, [file], in_parent=True)
    if looks_like_old_torch_file(start):
        raise FormatError(path, _OLD_TORCH)
    raise FormatError(path, "is a file of no format that aiodcp reads: DCP, safetensors, or torch.save")


def split_file(checkpoint_id: str) -> tuple[str, str]:
    """Return the folder and the name of a file that is given as a checkpoint's id."""
    folder, file = posixpath.split(checkpoint_id)
    return folder, file


def read_found(data: bytes, path: str) -> tuple[Metadata, Seal]:
    """Return what `find_metadata` has found.

    Raises:
        CorruptError, UnsafeError: see `read_metadata`.
    """
    if data.startswith(MAGIC):
        return ForeignIndex.unpack(data).to_metadata(), Seal()
    return read_index(data, path) if data.startswith(INDEX_MAGIC) else read_sealed(data, path)


async def complete(storage: Storage, checkpoint_id: str, metadata: Metadata, rank: int) -> None:
    """Find out, for one rank, what only the data files say, where there is such a thing.

    Raises:
        CorruptError: they do not say what they should.
        ReadError: storage failed.
    """
    if foreign_layout(metadata) is None and not is_ours(metadata):
        await prefer_own(storage, checkpoint_id, metadata, rank)
        await find_safetensors_items(storage, checkpoint_id, metadata)


def folder_of(checkpoint_id: str, metadata: Metadata) -> str:
    """Return where the files of a checkpoint are: in it, or beside it if it is a file itself."""
    layout = foreign_layout(metadata)
    return split_file(checkpoint_id)[0] if layout is not None and layout.in_parent else checkpoint_id

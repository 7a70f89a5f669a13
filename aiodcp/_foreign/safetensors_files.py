"""Files of safetensors, by their headers: Hugging Face's folders, single files, and what DCP's writer for them writes.

A file is the length of a JSON header (eight bytes, little endian), the header, and the tensors, bare.
Source: https://huggingface.co/docs/safetensors/index#format; `torch.distributed.checkpoint.hf_storage`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any

import anyio
import torch

from .._engine.task_groups import single_error
from .._format.extension import Stamp
from ..errors import CorruptError, FormatError
from ..storage.base import Reader, Storage, object_limits
from ..storage.error_mapping import read_errors
from .index import ForeignChunk, ForeignIndex, stamp_of

SUFFIX = ".safetensors"

INDEX_SUFFIX = ".safetensors.index.json"

WRITTEN_BY = "safetensors"

HEADER_NBYTES = 100_000_000
"""At most, as safetensors has it."""

_NOTES = "__metadata__"

_SHARDING, _OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"

_FIRST_NBYTES = 64 << 10  # read at first: the header of a file with some hundreds of tensors

_FILES_AT_ONCE = 8

DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
}


def looks_like_safetensors(start: bytes) -> bool:
    """Whether a file that begins so may be one of safetensors: a length, and JSON."""
    return start[8:9] == b"{" and int.from_bytes(start[:8], "little") < HEADER_NBYTES


def choose_files(names: Sequence[str], weight_map: Mapping[str, str] | None) -> list[str]:
    """Return which files of a folder hold its tensors: what its index names, else its one model, else all there are.

    Raises:
        ValueError: files are missing; says which.
    """
    if weight_map is not None:
        files = sorted(set(weight_map.values()))
        missing = [file for file in files if file not in names]
        if missing:
            raise ValueError(f"names {', '.join(missing[:3])}, which is not in the folder")
        return files
    if f"model{SUFFIX}" in names:
        return [f"model{SUFFIX}"]
    files = [name for name in names if name.endswith(SUFFIX)]
    for file in files:
        if (found := _ONE_OF_SEVERAL.search(file)) and not _has_all(file, found, files):
            raise ValueError(f"{file} is one of {int(found[2])}, and the others are not all there")
    return files


_ONE_OF_SEVERAL = re.compile(r"-(\d{1,9})-of-(\d{1,9})\.safetensors$")


def _has_all(file: str, found: re.Match[str], files: Sequence[str]) -> bool:
    """Return whether all of a model's files are among `files`, by the numbers in the name of one."""
    stem, of_all = file[: found.start()], int(found[2])
    others = ((other, _ONE_OF_SEVERAL.search(other)) for other in files)
    numbers = {int(n[1]) for other, n in others if n is not None and other[: n.start()] == stem and int(n[2]) == of_all}
    return len(numbers) >= of_all


def read_weight_map(text: bytes) -> dict[str, str]:
    """Return the file of each tensor, as an index says it.

    Raises:
        ValueError: it is no index; says so.
    """
    try:
        weight_map = json.loads(text)["weight_map"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError("is no index of files: it has no weight_map") from error
    if not isinstance(weight_map, dict) or not all(type(file) is str for file in weight_map.values()):
        raise ValueError(f"is no index of files: its weight_map is {weight_map!r:.80}")
    return weight_map


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What a file says at its beginning.

    Attributes:
        entries: dtype, shape and bytes, by fqn; not checked yet.
        sharding: of tensors of which the file has a part, as DCP notes it.
        notes: anything else, as text.
        start: bytes, where in the file the tensors begin.
        nbytes: how many there are from there on.
    """

    entries: dict[str, Any]
    sharding: dict[str, Any]
    notes: dict[str, str]
    start: int
    nbytes: int


async def read_safetensors(
    storage: Storage,
    folder: str,
    files: Sequence[str],
    *,
    weight_map: Mapping[str, str] | None = None,
    in_parent: bool = False,
) -> ForeignIndex:
    """Return what some files of a folder hold.

    Args:
        storage, folder, files: which.
        weight_map: the file of each tensor, where an index says it.
        in_parent: whether the checkpoint's id is the one file's.

    Raises:
        CorruptError: a file is damaged, or cut off.
        FormatError: two files have a tensor of one name, or one has a dtype that torch does not.
        ReadError: storage failed.
    """
    headers: dict[str, Header] = {}
    stamps: dict[str, Stamp] = {}
    limits = object_limits(storage, folder)
    limit = anyio.Semaphore(limits.reads_at_once if limits else _FILES_AT_ONCE)

    async def read_one(file: str) -> None:
        path = storage.describe(folder, file)
        async with limit:
            with read_errors(path):
                async with storage.open(folder, file) as reader:
                    stamps[file] = stamp_of(reader)
                    headers[file] = await read_header(reader, 0, path)

    with single_error():
        async with anyio.create_task_group() as group:
            for file in files:
                group.start_soon(read_one, file)
    index = ForeignIndex(written_by=WRITTEN_BY, in_parent=in_parent, stamps=stamps)
    for file in files:
        index.notes |= headers[file].notes
        for fqn, dtype, chunk in chunks_of(headers[file], file, storage.describe(folder, file)):
            held = index.tensors.setdefault(fqn, (dtype, []))
            if held[0] is not dtype or any(each.offsets == chunk.offsets for each in held[1]):
                problem = f"{fqn} is in {held[1][0].file} and in {file}: load the one file that is meant"
                raise FormatError(storage.describe(folder), problem)
            held[1].append(chunk)
    for fqn, file in (weight_map or {}).items():
        if fqn not in headers[file].entries:
            raise CorruptError(storage.describe(folder, file), fqn, "is in the index of the files, and not in this one")
    index.tensors = dict(sorted(index.tensors.items()))
    return index


async def read_header(reader: Reader, offset: int, path: str) -> Header:
    """Return the header of what begins at `offset`.

    Raises:
        CorruptError: there is none.
    """
    room = min(_FIRST_NBYTES, reader.nbytes - offset)
    if room < 8:
        raise CorruptError(path, "", "truncated: too short for the header of safetensors")
    first = bytearray(room)
    await reader.read_into(offset, [memoryview(first)])
    nbytes = int.from_bytes(first[:8], "little")
    if not looks_like_safetensors(bytes(first[:9])):
        raise CorruptError(path, "", "does not begin with a header of safetensors")
    start = offset + 8 + nbytes
    if start > reader.nbytes:
        raise CorruptError(path, "", f"truncated: {reader.nbytes} bytes, its header ends at {start}")
    text = bytes(first[8 : 8 + nbytes])
    if len(text) < nbytes:
        rest = bytearray(nbytes - len(text))
        await reader.read_into(offset + 8 + len(text), [memoryview(rest)])
        text += bytes(rest)
    try:
        entries = json.loads(text, object_pairs_hook=_without_duplicates)
        notes = entries.pop(_NOTES, None) or {}
        sharding = json.loads(notes.pop(_SHARDING, "{}"))
        return Header(
            entries=entries,
            sharding=sharding,
            notes={str(key): str(value) for key, value in notes.items()},
            start=start,
            nbytes=reader.nbytes - start,
        )
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptError(path, "", f"its header of safetensors is malformed: {type(error).__name__}") from error


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name that is there twice")
    return found


def _sizes(values: Any) -> tuple[int, ...]:
    """Return sizes or offsets, that a tensor of torch may have.

    Raises:
        ValueError, TypeError: they are none.
    """
    if not isinstance(values, list) or not all(type(each) is int and 0 <= each < _TOO_MANY for each in values):
        raise ValueError("no sizes")
    if prod(max(each, 1) for each in values) >= _TOO_MANY:
        raise ValueError("too many elements")
    return tuple(values)


_TOO_MANY = 1 << 62


def chunks_of(header: Header, file: str, path: str) -> Iterator[tuple[str, torch.dtype, ForeignChunk]]:
    """Return what a header says is in its file.

    Raises:
        CorruptError: it is malformed, or the file is too short.
        FormatError: a dtype is not known to torch.
    """
    ends: list[tuple[int, int, str]] = []
    for fqn, entry in header.entries.items():
        try:
            name, shape, (first, last) = entry["dtype"], _sizes(entry["shape"]), _sizes(entry["data_offsets"])
            noted = header.sharding.get(fqn)
            offsets = _sizes(noted[_OFFSETS]) if noted is not None else (0,) * len(shape)
            dtype = DTYPES.get(name)
            is_sound = first <= last and len(offsets) == len(shape)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CorruptError(path, fqn, "its entry in the header of safetensors is malformed") from error
        if dtype is None:
            raise FormatError(path, f"{fqn} is of dtype {name!r:.40}, which this torch does not have")
        if not is_sound or last - first != prod(shape) * dtype.itemsize:
            raise CorruptError(path, fqn, "its entry in the header of safetensors contradicts itself")
        if last > header.nbytes:
            end = header.start + header.nbytes
            raise CorruptError(path, fqn, f"truncated: {end} bytes, the tensor ends at {header.start + last}")
        ends.append((first, last, fqn))
        yield fqn, dtype, ForeignChunk(offsets, shape, file, header.start + first, last - first)
    ends.sort()
    for (_, end, before), (start, last, fqn) in pairwise(ends):
        if start < end and start < last:
            raise CorruptError(path, fqn, f"its elements are {before}'s, too")

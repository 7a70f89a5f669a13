"""`aiodcp show`, `verify` and `diff`: what is in a checkpoint, whether it is whole, and how two differ."""

from __future__ import annotations

import io
import os
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ._chunks import is_whole
from ._decode import Check
from ._names import METADATA_NAME, step_of, step_place
from ._note import decode_note
from ._tables import number, plural, size, table
from .checkpointer import Checkpointer
from .errors import ArgumentError, CorruptError, LoadError, NotACheckpointError, UnsafeError
from .metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageInfo,
    TensorStorageMetadata,
    read_metadata,
)

MISSING = "the file is missing"
PIECE_NBYTES = 256 << 20  # of tensors held in memory at a time, from each of two checkpoints


def read(checkpoint_id: str) -> tuple[Metadata, dict[str, Any]]:
    """Return what a checkpoint of the local file system holds, and what is noted of it.

    Raises:
        NotACheckpointError: there is none.
        CorruptError, UnsafeError: see `read_metadata`.
    """
    path = os.path.join(checkpoint_id, METADATA_NAME)
    try:
        data = Path(path).read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        complete = Path(checkpoint_id).glob(f"step-*/{METADATA_NAME}")
        steps = [step for each in complete if (step := step_of(each.parent.name)) is not None]
        if steps:
            newest = step_place(checkpoint_id, max(steps))
            problem = f"{checkpoint_id} is a directory of steps, such as {newest}: see `aiodcp ls`"
            raise ArgumentError("checkpoint", problem) from error
        raise NotACheckpointError(checkpoint_id) from error
    metadata = read_metadata(data, path)
    try:
        wrong = [fqn for fqn, entry in metadata.state_dict_metadata.items() if not _is_sound(entry)]
    except (AttributeError, TypeError) as error:
        raise CorruptError(path, "", f"not a checkpoint's metadata: {error}") from error
    if wrong:
        raise CorruptError(path, wrong[0], "the metadata does not say what it is")
    return metadata, decode_note(data)


def _is_sound(entry: object) -> bool:
    """Whether an entry has the fields that it must have: a damaged pickle may give anything."""
    if not isinstance(entry, TensorStorageMetadata):
        return isinstance(entry, BytesStorageMetadata)
    fields: list[tuple[Any, type]] = [(entry.properties.dtype, torch.dtype), (entry.size, torch.Size)]
    fields += [(part, torch.Size) for chunk in entry.chunks for part in (chunk.offsets, chunk.sizes)]
    return all(isinstance(value, kind) for value, kind in fields)


# --- show


def show(checkpoint_id: str, fqn: str | None = None) -> dict[str, Any]:
    """Return what a checkpoint holds: all of it, or what is named `fqn` or lies below it.

    Raises:
        ArgumentError: there is nothing of that name.
    """
    metadata, note = read(checkpoint_id)
    stored: dict[str, list[tuple[MetadataIndex, StorageInfo]]] = {}
    for index, info in metadata.storage_data.items():
        stored.setdefault(index.fqn, []).append((index, info))
    names = [name for name in metadata.state_dict_metadata if fqn is None or name == fqn or name.startswith(f"{fqn}.")]
    if not names and fqn is not None:
        raise ArgumentError("fqn", f"{checkpoint_id} holds nothing that is named {fqn!r}")
    rows = [_describe(name, metadata.state_dict_metadata[name], stored.get(name, [])) for name in names]
    result = {"checkpoint_id": checkpoint_id, "custom_metadata": note, "values": rows}
    if names == [fqn] and isinstance(metadata.state_dict_metadata[names[0]], BytesStorageMetadata):
        [(_, info)] = stored[names[0]]
        result["value"] = repr(_decode(checkpoint_id, names[0], info))
    return result


def _describe(
    fqn: str, entry: TensorStorageMetadata | BytesStorageMetadata, stored: list[tuple[MetadataIndex, StorageInfo]]
) -> dict[str, Any]:
    chunks = [
        {
            "offsets": None if index.offset is None else list(index.offset),
            "file": info.relative_path,
            "offset": info.offset,
            "nbytes": info.length,
        }
        for index, info in stored
    ]
    if isinstance(entry, BytesStorageMetadata):
        return {
            "fqn": fqn,
            "shape": None,
            "dtype": None,
            "nbytes": sum(each["nbytes"] for each in chunks),
            "chunks": chunks,
        }
    for chunk, (index, _) in zip(chunks, stored, strict=True):
        chunk["sizes"] = next((list(each.sizes) for each in entry.chunks if each.offsets == index.offset), None)
    dtype = entry.properties.dtype
    nbytes = prod(entry.size) * dtype.itemsize
    return {"fqn": fqn, "shape": list(entry.size), "dtype": _name(dtype), "nbytes": nbytes, "chunks": chunks}


def _decode(checkpoint_id: str, fqn: str, info: StorageInfo) -> Any:
    with open(os.path.join(checkpoint_id, info.relative_path), "rb") as file:
        file.seek(info.offset)
        data = file.read(info.length)
    check = Check(locate=partial(os.path.join, checkpoint_id), crc32=None, weights_only=True)
    return check.value(fqn, info.relative_path, data)


def format_show(result: Mapping[str, Any], *, chunks: bool) -> str:
    """Return the table of `aiodcp show`."""
    rows = []
    every = sorted({chunk["file"] for row in result["values"] for chunk in row["chunks"]})
    for row in result["values"]:
        shape = "" if row["shape"] is None else str(tuple(row["shape"]))
        files = sorted({chunk["file"] for chunk in row["chunks"]})
        where = "" if len(every) == 1 else files[0] if len(files) == 1 else f"{len(files)} files"
        rows.append([row["fqn"], shape, row["dtype"] or "value", size(row["nbytes"]), where])
        if chunks and row["shape"] is not None:
            rows += [
                [
                    f"  at {tuple(chunk['offsets'])}",
                    str(tuple(chunk["sizes"] or ())),
                    "",
                    size(chunk["nbytes"]),
                    f"{where or files[0]} from {chunk['offset']}"
                    if len(every) == 1
                    else f"{chunk['file']} from {chunk['offset']}",
                ]
                for chunk in row["chunks"]
            ]
    lines = [table(["name", "shape", "dtype", ">size", "file"], rows)]
    if "value" in result:
        lines.append(f"\n{result['value']}")
    tensors = [row for row in result["values"] if row["shape"] is not None]
    others = len(result["values"]) - len(tensors)
    nbytes = size(sum(row["nbytes"] for row in tensors))
    where = every[0] if len(every) == 1 else plural(len(every), "file")
    lines.append(f"{plural(len(tensors), 'tensor')}, {nbytes}; {plural(others, 'other value')}; in {where}")
    if result["custom_metadata"]:
        lines.append(", ".join(f"{name}: {value}" for name, value in result["custom_metadata"].items()))
    return "\n".join(lines)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- verify


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What is wrong with a value, or with a file if `fqn` is empty."""

    fqn: str
    file: str
    problem: str


def verify(checkpoint_id: str, advance: Callable[[int], None], total: Callable[[int], None]) -> list[Problem]:
    """Read all of a checkpoint and return all that is wrong with it.

    Checked are: that the chunks of every tensor make it up, and are stored; that every item lies in its file, is an
    archive of `torch.save`, has the payload that it should have, and that every record has its CRC32.

    Args:
        checkpoint_id: the directory.
        advance: called with bytes that have been read.
        total: called before, with how many there are.

    Raises:
        NotACheckpointError: there is none.
    """
    try:
        metadata, _ = read(checkpoint_id)
    except (CorruptError, UnsafeError) as error:
        return [Problem(fqn="", file=METADATA_NAME, problem=error.problem)]
    problems = list(_uncovered(metadata))
    items = sorted(metadata.storage_data.items(), key=lambda item: (item[1].relative_path, item[1].offset))
    total(sum(info.length for _, info in items))

    def check(item: tuple[MetadataIndex, StorageInfo]) -> Problem | None:
        index, info = item
        problem = _damage(os.path.join(checkpoint_id, info.relative_path), info, _payload_nbytes(metadata, index))
        advance(info.length)
        return Problem(fqn=index.fqn, file=info.relative_path, problem=problem) if problem else None

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:  # a CRC32 of much data lets go of the GIL
        problems += [problem for problem in pool.map(check, items) if problem is not None]
    return _by_file(problems)


def _by_file(problems: Sequence[Problem]) -> list[Problem]:
    """Tell once of a file what would be told of every value in it."""
    values = Counter(problem.file for problem in problems if problem.problem == MISSING)
    told = [
        Problem(fqn="", file=file, problem=f"{MISSING}, and with it {plural(count, 'value')}")
        for file, count in values.items()
    ]
    return [*told, *(problem for problem in problems if problem.problem != MISSING)]


def _uncovered(metadata: Metadata) -> Iterator[Problem]:
    stored = {(index.fqn, index.offset) for index in metadata.storage_data}
    for fqn, entry in metadata.state_dict_metadata.items():
        offsets: list[torch.Size | None] = [None]
        if isinstance(entry, TensorStorageMetadata):
            offsets = [chunk.offsets for chunk in entry.chunks]
            if not is_whole(entry):
                problem = f"its {len(offsets)} chunks do not make up its shape {tuple(entry.size)}"
                yield Problem(fqn=fqn, file="", problem=problem)
        for offset in offsets:
            if (fqn, offset) not in stored:
                where = "it" if offset is None else f"its chunk at {tuple(offset)}"
                yield Problem(fqn=fqn, file="", problem=f"the metadata does not say where {where} is stored")


def _payload_nbytes(metadata: Metadata, index: MetadataIndex) -> int | None:
    """Return how many bytes a tensor's item must hold at least; None if it is no tensor's."""
    entry = metadata.state_dict_metadata.get(index.fqn)
    if not isinstance(entry, TensorStorageMetadata):
        return None
    for chunk in entry.chunks:
        if chunk.offsets == index.offset:
            return prod(chunk.sizes) * entry.properties.dtype.itemsize
    return None


def _damage(path: str, info: StorageInfo, payload_nbytes: int | None) -> str:
    """Say what is wrong with an item; empty if nothing is."""
    if getattr(info, "transform_descriptors", None):
        return f"is stored through the extensions {info.transform_descriptors}, which this reader has not"
    try:
        with open(path, "rb") as file:
            nbytes = os.fstat(file.fileno()).st_size
            if info.offset + info.length > nbytes:
                return f"the file has {nbytes} bytes, the value ends at {info.offset + info.length}"
            with zipfile.ZipFile(_Window(file, info.offset, info.length)) as archive:
                damaged = archive.testzip()
                if damaged is not None:
                    return f"the CRC32 of {damaged} is not the one it was saved with"
                sizes = {each.filename.partition("/")[2]: each.file_size for each in archive.infolist()}
    except FileNotFoundError:
        return MISSING
    except OSError as error:
        return f"cannot be read: {error}"
    except Exception as error:  # a damaged archive can raise almost anything
        return f"is not an archive of torch.save: {error!r}"
    if "data.pkl" not in sizes:
        return "is an archive without data.pkl, which torch.save writes"
    held = sum(nbytes for name, nbytes in sizes.items() if name.startswith("data/"))
    if payload_nbytes is not None and held < payload_nbytes:
        return f"holds {held} bytes, its shape and dtype ask for {payload_nbytes}"
    return ""


class _Window(io.RawIOBase):
    """A stretch of a file, as a file of its own."""

    def __init__(self, file: BinaryIO, start: int, nbytes: int) -> None:
        self._file = file
        self._start = start
        self._nbytes = nbytes
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._nbytes}[whence]
        return self._position

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._nbytes - self._position)
        self._file.seek(self._start + self._position)
        data = self._file.read(left if size < 0 else min(size, left))
        self._position += len(data)
        return data


# --- diff


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """How a value differs between two checkpoints.

    Attributes:
        fqn: the value.
        change: in words: "only in A", "other shape", "other values" and so on.
        count: elements that differ; None where that cannot be said.
        largest, mean: of the absolute differences, likewise.
    """

    fqn: str
    change: str
    count: int | None = None
    largest: float | None = None
    mean: float | None = None


def diff(a: str, b: str, advance: Callable[[int], None], total: Callable[[int], None]) -> list[Difference]:
    """Compare all values of two checkpoints, and return those that differ, by name.

    Args:
        a, b: the directories.
        advance, total: as for `verify`, with the bytes of one of the two.

    Raises:
        LoadError: one of them cannot be read.
    """
    entries = [read(each)[0].state_dict_metadata for each in (a, b)]
    found = [Difference(fqn=fqn, change="only in A") for fqn in entries[0].keys() - entries[1].keys()]
    found += [Difference(fqn=fqn, change="only in B") for fqn in entries[1].keys() - entries[0].keys()]
    alike: list[str] = []
    for fqn in sorted(entries[0].keys() & entries[1].keys()):
        change = _change_of_kind(entries[0][fqn], entries[1][fqn])
        if change:
            found.append(Difference(fqn=fqn, change=change))
        else:
            alike.append(fqn)
    total(sum(_nbytes(entries[0][fqn]) for fqn in alike))
    with Checkpointer(no_dist=True) as checkpointer:
        for names in pieces(entries[0], alike):
            states = [load(checkpointer, each, {fqn: entries[0][fqn] for fqn in names}) for each in (a, b)]
            for fqn in names:
                difference = _compare(fqn, states[0][fqn], states[1][fqn])
                if difference is not None:
                    found.append(difference)
            advance(sum(_nbytes(entries[0][fqn]) for fqn in names))
    return sorted(found, key=lambda each: each.fqn)


def _change_of_kind(one: Any, other: Any) -> str:
    tensors = [isinstance(each, TensorStorageMetadata) for each in (one, other)]
    if tensors[0] is not tensors[1]:
        return f"a tensor in {'A' if tensors[0] else 'B'}, another kind of value in {'B' if tensors[0] else 'A'}"
    if not tensors[0]:
        return ""
    if one.size != other.size:
        return f"shape {tuple(one.size)} in A, {tuple(other.size)} in B"
    if one.properties.dtype is not other.properties.dtype:
        return f"{_name(one.properties.dtype)} in A, {_name(other.properties.dtype)} in B"
    return ""


def _nbytes(entry: TensorStorageMetadata | BytesStorageMetadata) -> int:
    return prod(entry.size) * entry.properties.dtype.itemsize if isinstance(entry, TensorStorageMetadata) else 0


def pieces(
    entries: Mapping[str, TensorStorageMetadata | BytesStorageMetadata], names: list[str], nbytes: int = PIECE_NBYTES
) -> Iterator[list[str]]:
    """Cut names into groups whose tensors have together at most `nbytes`, or are one."""
    piece: list[str] = []
    held = 0
    for fqn in names:
        if piece and held + _nbytes(entries[fqn]) > nbytes:
            yield piece
            piece, held = [], 0
        piece.append(fqn)
        held += _nbytes(entries[fqn])
    if piece:
        yield piece


def load(
    checkpointer: Checkpointer,
    checkpoint_id: str,
    entries: Mapping[str, TensorStorageMetadata | BytesStorageMetadata],
) -> dict[str, Any]:
    """Load values by their names, as they are stored.

    Raises:
        LoadError: they cannot be read, or are of a kind that cannot be loaded into a plain tensor.
    """
    state: dict[str, Any] = {
        fqn: torch.empty(entry.size, dtype=entry.properties.dtype) if isinstance(entry, TensorStorageMetadata) else None
        for fqn, entry in entries.items()
    }
    try:
        checkpointer.load_sync(state, checkpoint_id, strict=False)
    except RuntimeError as error:
        raise LoadError(f"{checkpoint_id}: holds a tensor that is not a plain one: {error}") from error
    return state


def _compare(fqn: str, one: Any, other: Any) -> Difference | None:
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
        same = type(one) is type(other) and _archive_of(one) == _archive_of(other)
        return None if same else Difference(fqn=fqn, change=_short(one) + " in A, " + _short(other) + " in B")
    if not one.numel() or torch.equal(_bytes_of(one), _bytes_of(other)):
        return None
    try:
        differs = (one != other) & ~((one != one) & (other != other))  # what is not itself is NaN
        count = int(differs.sum())
        if not count:
            return Difference(fqn=fqn, change="other bits, the same values", count=0, largest=0.0, mean=0.0)
        apart = _apart(one[differs], other[differs])
    except RuntimeError:  # dtypes that torch does not compute with
        return Difference(fqn=fqn, change="other bits")
    mean = float(apart.sum()) / one.numel()
    return Difference(fqn=fqn, change="other values", count=count, largest=float(apart.max()), mean=mean)


def _apart(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return the absolute differences, in float64; of integers computed as such, where that is exact."""
    if one.is_complex():
        return (one.to(torch.complex128) - other.to(torch.complex128)).abs()
    if one.is_floating_point() or one.dtype is torch.uint64:
        return (one.double() - other.double()).abs()
    return (one.long() - other.long()).abs().double()


def _archive_of(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def format_diff(differences: list[Difference]) -> str:
    """Return the table of `aiodcp diff`."""
    if not differences:
        return "the same, bit for bit"
    rows = [
        [
            each.fqn,
            each.change,
            "" if each.count is None else str(each.count),
            "" if each.largest is None else number(each.largest),
            "" if each.mean is None else number(each.mean),
        ]
        for each in differences
    ]
    verb = "differs" if len(differences) == 1 else "differ"
    titles = ["name", "change", ">elements", ">largest", ">mean"]
    return f"{table(titles, rows)}\n{plural(len(differences), 'value')} {verb}"

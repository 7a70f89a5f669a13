"""`aiodcp show`: what is in a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import anyio

from .._format.custom_metadata import decode_custom_metadata
from .._format.dcp import BytesStorageMetadata, MetadataIndex, StorageInfo, TensorStorageMetadata
from .._load.decode import ItemDecoder
from ..errors import ArgumentError
from ..storage.base import Storage
from ..storage.error_mapping import read_errors
from .locations import locate
from .reading import name_of, nbytes_of, read_from
from .text_tables import plural, size, table


def show(checkpoint_id: str, fqn: str | None = None) -> dict[str, Any]:
    """Return what a checkpoint holds: all of it, or what is named `fqn` or lies below it.

    Raises:
        ArgumentError: there is nothing of that name.
    """
    return anyio.run(_show, *locate(checkpoint_id), fqn)


async def _show(storage: Storage, checkpoint_id: str, fqn: str | None) -> dict[str, Any]:
    metadata, seal = await read_from(storage, checkpoint_id)
    stored: dict[str, list[tuple[MetadataIndex, StorageInfo]]] = {}
    for index, info in metadata.storage_data.items():
        stored.setdefault(index.fqn, []).append((index, info))
    names = [name for name in metadata.state_dict_metadata if fqn is None or name == fqn or name.startswith(f"{fqn}.")]
    if not names and fqn is not None:
        raise ArgumentError("fqn", f"{checkpoint_id} contains no value named {fqn!r}")
    rows = [_describe(name, metadata.state_dict_metadata[name], stored.get(name, [])) for name in names]
    result = {
        "checkpoint_id": checkpoint_id,
        "custom_metadata": decode_custom_metadata(seal.custom_metadata),
        "values": rows,
    }
    if names == [fqn] and isinstance(metadata.state_dict_metadata[names[0]], BytesStorageMetadata):
        [(_, info)] = stored[names[0]]
        result["value"] = repr(await _decode(storage, checkpoint_id, names[0], info))
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
    return {
        "fqn": fqn,
        "shape": list(entry.size),
        "dtype": name_of(dtype),
        "nbytes": nbytes_of(entry),
        "chunks": chunks,
    }


async def _decode(storage: Storage, checkpoint_id: str, fqn: str, info: StorageInfo) -> Any:
    data = bytearray(info.length)
    with read_errors(storage.describe(checkpoint_id, info.relative_path)):
        async with storage.open(checkpoint_id, info.relative_path) as reader:
            await reader.read_into(info.offset, [memoryview(data)])
    decoder = ItemDecoder(describe=partial(storage.describe, checkpoint_id), crc32=None, weights_only=True)
    return decoder.value(fqn, info.relative_path, bytes(data))


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

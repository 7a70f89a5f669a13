"""`aiodcp show`: what is in a checkpoint."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .._load.name_hints import near
from ..errors import ArgumentError, CheckpointError
from ..reader.stored_checkpoint import StoredCheckpoint
from ..reader.stored_values import StoredTensor, StoredValue, name_of
from ..storage.base import Storage
from .reading import opened
from .text_tables import plural, size, table

SMALL_NBYTES = 2 << 10  # of a value's archive that is shown in the table, and of a tensor with one element

SMALL_VALUES = 1000  # that are read for the table

SHOWN = 60  # characters of a value in the table


async def show(checkpoint_id: str, fqn: str | None = None, *, storage: Storage | None = None) -> dict[str, Any]:
    """Return what a checkpoint holds: all of it, or what is named `fqn` or lies below it.

    Raises:
        ArgumentError: there is nothing of that name.
        LoadError: it cannot be read.
    """
    async with opened(checkpoint_id, storage) as checkpoint:
        names = [name for name in checkpoint if fqn is None or name == fqn or name.startswith(f"{fqn}.")]
        if not names and fqn is not None:
            close = near(fqn, list(checkpoint))
            hint = f"; did you mean {' or '.join(close)}?" if close else ""
            raise ArgumentError("fqn", f"{checkpoint_id} contains no value named {fqn!r}{hint}")
        stored = [checkpoint[name] for name in names]
        values = await _read_small(checkpoint, stored)
        result = {
            "checkpoint_id": checkpoint_id,
            "written_by": checkpoint.written_by,
            "custom_metadata": checkpoint.custom_metadata,
            "values": [_describe(each, values.get(each.fqn)) for each in stored],
        }
        if names == [fqn] and isinstance(stored[0], StoredValue):
            result["value"] = repr(await checkpoint.read(names[0]))
    return result


async def _read_small(checkpoint: StoredCheckpoint, stored: Sequence[StoredTensor | StoredValue]) -> dict[str, str]:
    """Return what the small values are, as text; nothing for those that cannot be read: `verify` says why."""
    small = [
        each.fqn
        for each in stored
        if (isinstance(each, StoredValue) and each.nbytes <= SMALL_NBYTES)
        or (isinstance(each, StoredTensor) and not each.shape)
    ][:SMALL_VALUES]
    found: dict[str, str] = {}
    if not small:
        return found
    try:
        found = {fqn: _short(value) for fqn, value in (await checkpoint.read(small)).items()}
    except CheckpointError:  # one of them: each by itself
        for fqn in small:
            try:
                found[fqn] = _short(await checkpoint.read(fqn))
            except CheckpointError as error:
                found[fqn] = f"({type(error).__name__})"
    return found


def _short(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        value = value.item()
    if isinstance(value, io.BytesIO):
        return f"{len(value.getvalue())} bytes"
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


def _describe(stored: StoredTensor | StoredValue, value: str | None) -> dict[str, Any]:
    small = {} if value is None else {"value": value}
    if isinstance(stored, StoredValue):
        chunk = {"offsets": None, "file": stored.file, "nbytes": stored.nbytes}
        return {
            "fqn": stored.fqn,
            "shape": None,
            "dtype": None,
            "nbytes": stored.nbytes,
            "chunks": [chunk] if stored.file else [],
            **small,
        }
    return {
        "fqn": stored.fqn,
        "shape": list(stored.shape),
        "dtype": name_of(stored.dtype),
        "nbytes": stored.nbytes,
        "chunks": [
            {
                "offsets": list(each.offsets),
                "sizes": list(each.sizes),
                "file": each.file,
                "offset": each.offset,
                "nbytes": each.nbytes,
            }
            for each in stored.chunks
        ],
        **small,
    }


def format_show(result: Mapping[str, Any], *, chunks: bool) -> str:
    """Return the table of `aiodcp show`."""
    rows = []
    every = sorted({chunk["file"] for row in result["values"] for chunk in row["chunks"]})
    for row in result["values"]:
        shape = "" if row["shape"] is None else str(tuple(row["shape"]))
        files = sorted({chunk["file"] for chunk in row["chunks"]})
        where = "" if len(every) <= 1 or not files else files[0] if len(files) == 1 else f"{len(files)} files"
        rows.append([row["fqn"], shape, row["dtype"] or "value", size(row["nbytes"]), row.get("value", ""), where])
        if chunks and row["shape"] is not None:
            rows += [
                [
                    f"  at {tuple(chunk['offsets'])}",
                    str(tuple(chunk["sizes"] or ())),
                    "",
                    size(chunk["nbytes"]),
                    "",
                    f"{where or files[0]} from {chunk['offset']}"
                    if len(every) == 1
                    else f"{chunk['file']} from {chunk['offset']}",
                ]
                for chunk in row["chunks"]
            ]
    lines = [table(["name", "shape", "dtype", ">size", "value", "file"], rows)]
    if "value" in result:
        lines.append(f"\n{result['value']}")
    tensors = [row for row in result["values"] if row["shape"] is not None]
    others = len(result["values"]) - len(tensors)
    nbytes = size(sum(row["nbytes"] for row in tensors))
    where = every[0] if len(every) == 1 else plural(len(every), "file")
    lines.append(f"{plural(len(tensors), 'tensor')}, {nbytes}; {plural(others, 'other value')}; in {where}")
    if result["written_by"] != "aiodcp":
        lines.append(f"written by {result['written_by']}")
    if result["custom_metadata"]:
        lines.append(", ".join(f"{name}: {value}" for name, value in result["custom_metadata"].items()))
    return "\n".join(lines)

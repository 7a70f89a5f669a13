"""`aiodcp export`: a checkpoint as one file of `torch.save`, or as safetensors, sharded as Hugging Face's."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .._format.dcp import KeyPath, Metadata, TensorStorageMetadata
from .._format.extension import containers_of
from .._state.structure import int_keys_of, rebuild
from ..errors import ArgumentError, WriteError
from ..storage.object_urls import scheme_of
from .reading import load, make_checkpointer, nbytes_of, pieces, read

SHARD_NBYTES = 5_000_000_000
"""Of one file of safetensors at most, unless a tensor is larger. Source: Hugging Face's `save_pretrained`."""

INDEX_NAME = "model.safetensors.index.json"


def export_torch(checkpoint_id: str, out: str) -> dict[str, Any]:
    """Write a checkpoint as `torch.save` writes the nested state dict that was saved; return what was written.

    Raises:
        LoadError: the checkpoint cannot be read.
        WriteError: the file exists, or cannot be written.
    """
    _refuse_url(out)
    metadata, _ = read(checkpoint_id)
    _refuse_existing(Path(out))
    with make_checkpointer(checkpoint_id) as checkpointer:
        flat = load(checkpointer, checkpoint_id, metadata.state_dict_metadata)
    state = nest(flat, metadata)
    temporary = f"{out}.tmp"
    try:
        torch.save(state, temporary)
        os.replace(temporary, out)
    except (OSError, RuntimeError) as error:  # torch raises either when the disk is full
        Path(temporary).unlink(missing_ok=True)
        raise WriteError(out, str(error)) from error
    return {"files": [out], "tensors": sum(isinstance(each, torch.Tensor) for each in flat.values()), "left_out": []}


def nest(flat: dict[str, Any], metadata: Metadata) -> dict[str, Any]:
    """Return the nested state dict of flat values: with lists, empty dicts and int keys as they were saved."""
    paths: dict[str, KeyPath] = {fqn: tuple((metadata.planner_data or {}).get(fqn, (fqn,))) for fqn in flat}
    containers = containers_of(metadata)
    empty = containers.empty if containers is not None else []
    items = [(paths[fqn], value) for fqn, value in flat.items()]
    nested: dict[str, Any] = rebuild((), items, None, empty, int_keys_of(containers, paths.values()))
    return nested


def export_safetensors(
    checkpoint_id: str,
    out: str,
    *,
    prefix: str,
    shard_nbytes: int,
    advance: Callable[[int], None],
    total: Callable[[int], None],
) -> dict[str, Any]:
    """Write the tensors of a checkpoint as safetensors, with Hugging Face's index if it is more than one file.

    Args:
        checkpoint_id: the directory.
        out: a directory, which is made.
        prefix: only what lies below this name, and without it: "model" or "model.".
        shard_nbytes: of one file at most, unless a tensor is larger.
        advance, total: called with bytes that are written, and before with how many there are.

    Raises:
        ArgumentError: safetensors is not installed, or no tensor has the prefix.
        LoadError: the checkpoint cannot be read.
        WriteError: a file exists, or cannot be written.
    """
    try:
        from safetensors import SafetensorError
        from safetensors.torch import save_file
    except ImportError as error:
        raise ArgumentError("to", "safetensors is not installed: pip install 'aiodcp[export]'") from error
    _refuse_url(out)
    metadata, _ = read(checkpoint_id)
    if prefix and not prefix.endswith("."):
        prefix += "."
    entries, left_out = _tensors_of(metadata, prefix)
    if not entries:
        raise ArgumentError("prefix", f"{checkpoint_id} holds no tensor whose name begins with {prefix!r}")
    shards = list(pieces(entries, sorted(entries), shard_nbytes))
    names = (
        ["model.safetensors"]
        if len(shards) == 1
        else [f"model-{number + 1:05}-of-{len(shards):05}.safetensors" for number in range(len(shards))]
    )
    folder = Path(out)
    for name in [*names, INDEX_NAME]:
        _refuse_existing(folder / name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WriteError(out, f"cannot create the directory: {error.strerror}") from error
    weight_map: dict[str, str] = {}
    nbytes = {fqn: nbytes_of(entry) for fqn, entry in entries.items()}
    total(sum(nbytes.values()))
    with make_checkpointer(checkpoint_id) as checkpointer:
        for name, fqns in zip(names, shards, strict=True):
            state = load(checkpointer, checkpoint_id, {fqn: entries[fqn] for fqn in fqns})
            tensors = {fqn.removeprefix(prefix): state.pop(fqn) for fqn in fqns}
            try:
                save_file(tensors, folder / name, metadata={"format": "pt"})
                (folder / name).chmod(0o666 & ~_umask())  # safetensors makes it the owner's alone
            except (OSError, SafetensorError, KeyError) as error:
                raise WriteError(str(folder / name), f"{error!r}") from error
            weight_map.update(dict.fromkeys(tensors, name))
            advance(sum(nbytes[fqn] for fqn in fqns))
    files = [str(folder / name) for name in names]
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(nbytes.values())}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")
        files.append(str(folder / INDEX_NAME))
    return {"files": files, "tensors": len(weight_map), "left_out": left_out}


def _tensors_of(metadata: Metadata, prefix: str) -> tuple[dict[str, TensorStorageMetadata], list[str]]:
    """Return the tensors below a prefix, and the names of the other values there, which safetensors cannot hold."""
    entries: dict[str, TensorStorageMetadata] = {}
    left_out = []
    for fqn, entry in metadata.state_dict_metadata.items():
        if not fqn.startswith(prefix):
            continue
        if isinstance(entry, TensorStorageMetadata):
            entries[fqn] = entry
        else:
            left_out.append(fqn)
    return entries, sorted(left_out)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _refuse_url(out: str) -> None:
    if scheme_of(out) is not None:
        raise ArgumentError("out", f"{out} is a URL: export to a directory, and copy it from there")


def _refuse_existing(path: Path) -> None:
    if path.exists():
        raise WriteError(str(path), "the file exists, and will not be overwritten")

"""A checkpoint in another format: safetensors as Hugging Face's, one file of `torch.save`, or DCP's own."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from anyio import to_thread

from .._engine.sync_bridge import sync_function
from .._load.options import Rename
from .._load.stored_names import renaming
from .._state.name_patterns import Matcher, Names
from .._telemetry.progress_bar import Bar, NoBar
from ..checkpointer.arguments import CheckpointId
from ..checkpointer.checkpointer import Checkpointer
from ..checkpointer.snapshot import Snapshot
from ..errors import ArgumentError, NotACheckpointError, WriteError
from ..storage.base import Storage
from ..storage.object_urls import scheme_of
from .read_targets import check_dtype
from .stored_checkpoint import StoredCheckpoint, open_checkpoint
from .stored_values import StoredTensor, StoredValue

SHARD_NBYTES = 5_000_000_000
"""Of one file of safetensors at most, unless a tensor is larger. Source: Hugging Face's `save_pretrained`."""

INDEX_NAME = "model.safetensors.index.json"

Format = Literal["safetensors", "torch"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """What `export` has written.

    Attributes:
        files: their paths.
        tensors: how many.
        left_out: fqns of values that are no tensors, which safetensors cannot hold.
    """

    files: list[str]
    tensors: int
    left_out: list[str]


class _Source(Protocol):
    """What is exported: a checkpoint, or a snapshot."""

    @property
    def checkpoint_id(self) -> str: ...
    def __iter__(self) -> Iterator[str]: ...
    def __getitem__(self, fqn: str, /) -> StoredTensor | StoredValue: ...
    async def read(self, what: Callable[[str], bool], /, *, dtype: torch.dtype | None = None) -> Any: ...


class _Staged:
    """A snapshot, as a source."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        self.checkpoint_id = snapshot.checkpoint_id

    def __iter__(self) -> Iterator[str]:
        return iter(self._snapshot)

    def __getitem__(self, fqn: str) -> StoredTensor:
        shape, tensor = self._snapshot.shape(fqn), self._snapshot[fqn]
        if tensor.shape != shape:
            problem = f"{fqn} is sharded, and only a part of it is staged on this rank: export the checkpoint instead"
            raise ArgumentError("source", problem)
        return StoredTensor(fqn=fqn, shape=shape, dtype=tensor.dtype, nbytes=tensor.nbytes)

    async def read(self, what: Callable[[str], bool], *, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
        tensors = {fqn: self._snapshot[fqn] for fqn in self._snapshot if what(fqn)}
        if dtype is None:
            return tensors
        return await to_thread.run_sync(
            lambda: {fqn: each.to(dtype) if each.is_floating_point() else each for fqn, each in tensors.items()}
        )


async def export(
    source: CheckpointId | StoredCheckpoint | Snapshot,
    out: str | os.PathLike[str],
    *,
    format: Format = "safetensors",  # noqa: A002
    include: Names | None = None,
    exclude: Names | None = None,
    rename: Rename | None = None,
    dtype: torch.dtype | None = None,
    tied: Mapping[str, str] | None = None,
    shard_nbytes: int = SHARD_NBYTES,
    storage: Storage | None = None,
    bar: Bar | None = None,
) -> Exported:
    """Write a checkpoint as safetensors that `from_pretrained` opens, or as one file of `torch.save`.

        await aiodcp.export("run/step-100", "hf", include="model", rename={"model": ""}, dtype=torch.bfloat16)
        model.config.save_pretrained("hf")

    or, while the checkpoint is still uploaded:

        async with ckpt.snapshot() as view:
            await aiodcp.export(view, "hf", include="model", rename={"model": ""})

    Nothing is seen under its name before it is whole, and an index comes last.

    Args:
        source: a checkpoint, by its id as for `aiodcp.open`, or open; or a snapshot of which this rank has all.
        out: a directory, which is made; for "torch" a file.
        format: "safetensors", with Hugging Face's index if it is more than one file; or "torch", nested as saved.
        include, exclude: see `Checkpointer.load`; of the names that are stored.
        rename: stored names to those in the files, as for `Checkpointer.load`: `{"model": ""}` leaves out "model.".
        dtype: to which floating-point tensors are converted.
        tied: names in the files of tied weights, to those of the weights that they are tied to, such as
            `{"lm_head.weight": "model.embed_tokens.weight"}`: left out, once they are seen to be equal.
        shard_nbytes: of one file of safetensors at most, unless a tensor is larger.
        storage: where the checkpoint is; by default where its id says.
        bar: told how many bytes there are, by `total`, and are written, by `advance`.

    Raises:
        ArgumentError: safetensors is not installed; nothing is included; two names become one; or weights that are
            said to be tied differ.
        LoadError: the checkpoint cannot be read.
        WriteError: a file exists, or cannot be written.

    Cancellation: takes effect when the file under way is written; nothing stays.
    """
    target = os.fspath(out)
    check_dtype(dtype)
    if not target or "\0" in target:
        raise ArgumentError("out", f"{target!r} is not a path")
    if scheme_of(target) is not None:
        raise ArgumentError("out", f"{target} is a URL: export to a directory, and copy it from there")
    if format not in ("safetensors", "torch"):
        raise ArgumentError("format", f'must be "safetensors" or "torch", got {format!r}')
    if type(shard_nbytes) is not int or shard_nbytes < 1:
        raise ArgumentError("shard_nbytes", f"must be a positive integer, got {shard_nbytes!r}")
    async with AsyncExitStack() as stack:
        found: StoredCheckpoint | _Staged
        if isinstance(source, StoredCheckpoint):
            found = source
        elif isinstance(source, Snapshot):
            found = _Staged(source)
        else:
            found = await stack.enter_async_context(open_checkpoint(source, storage=storage))
        names = _names(found, include, exclude, rename, format)
        if format == "torch":
            if rename is not None or tied:
                raise ArgumentError("rename" if tied is None else "tied", "is for safetensors, whose names are flat")
            if isinstance(found, _Staged):
                raise ArgumentError("format", "a snapshot has only tensors: export it as safetensors")
            return await _export_torch(found, list(names), target, dtype)
        writer = _Safetensors(found, Path(target), names, dtype, dict(tied or {}), bar or NoBar())
        return await writer.write(shard_nbytes)


def _names(
    checkpoint: _Source,
    include: Names | None,
    exclude: Names | None,
    rename: Rename | None = None,
    format: Format = "torch",  # noqa: A002
) -> dict[str, str]:
    """Return the names in the files, by stored ones."""
    is_in = Matcher(include, "include") if include is not None else lambda fqn: True
    is_out = Matcher(exclude, "exclude") if exclude is not None else lambda fqn: False
    renamed = renaming(rename) if rename is not None else lambda fqn: fqn
    names: dict[str, str] = {}
    taken: dict[str, str] = {}
    for fqn in checkpoint:
        if not is_in(fqn) or is_out(fqn):
            continue
        name = renamed(fqn)
        if not name or name in taken:
            problem = f"makes {name!r} of {fqn!r}" + (f", and of {taken[name]!r}" if name in taken else "")
            raise ArgumentError("rename", problem)
        names[fqn], taken[name] = name, fqn
    if format == "safetensors" and "__metadata__" in taken:
        raise ArgumentError("rename", f"{taken['__metadata__']!r} cannot have the name '__metadata__' in safetensors")
    if not names:
        meant = f" that {include!r} means" if include is not None else ""
        raise ArgumentError("include", f"{checkpoint.checkpoint_id} has nothing{meant}, or all of it is excluded")
    return names


async def _export_torch(checkpoint: StoredCheckpoint, fqns: list[str], out: str, dtype: torch.dtype | None) -> Exported:
    _refuse_existing(Path(out))
    state = await checkpoint.state_dict(_exactly(fqns, checkpoint), dtype=dtype)
    await to_thread.run_sync(_save, state, out)
    tensors = sum(isinstance(checkpoint[fqn], StoredTensor) for fqn in fqns)
    return Exported(files=[out], tensors=tensors, left_out=[])


def _exactly(fqns: Collection[str], checkpoint: StoredCheckpoint) -> Callable[[str], bool] | None:
    """Return what means these names, none below them, and takes no name for a pattern; None for all that there are."""
    return None if len(fqns) == len(checkpoint) else frozenset(fqns).__contains__


def _save(state: Any, out: str) -> None:
    temporary = f"{out}.tmp"
    try:
        torch.save(state, temporary)
        os.replace(temporary, out)
    except (OSError, RuntimeError) as error:  # torch raises either when the disk is full
        Path(temporary).unlink(missing_ok=True)
        raise WriteError(out, str(error)) from error


class _Safetensors:
    """Writes the files of one export."""

    def __init__(
        self,
        checkpoint: _Source,
        folder: Path,
        names: Mapping[str, str],
        dtype: torch.dtype | None,
        tied: dict[str, str],
        bar: Bar,
    ) -> None:
        self._checkpoint = checkpoint
        self._folder = folder
        self._dtype = dtype
        self._tied = tied
        self._bar = bar
        stored = {fqn: checkpoint[fqn] for fqn in names}
        self._tensors = {names[fqn]: each for fqn, each in stored.items() if isinstance(each, StoredTensor)}
        self._left_out = sorted(fqn for fqn, each in stored.items() if not isinstance(each, StoredTensor))

    async def write(self, shard_nbytes: int) -> Exported:
        try:
            from safetensors.torch import save_file
        except ImportError as error:
            problem = "safetensors is not installed: pip install 'aiodcp[export]'"
            raise ArgumentError("format", problem) from error
        if not self._tensors:
            raise ArgumentError("include", f"{self._checkpoint.checkpoint_id} has no tensor of these names")
        await self._leave_out_tied()
        sizes = {name: self._nbytes(each) for name, each in self._tensors.items()}
        shards = list(_cut(sizes, shard_nbytes))
        files = (
            ["model.safetensors"]
            if len(shards) == 1
            else [f"model-{number + 1:05}-of-{len(shards):05}.safetensors" for number in range(len(shards))]
        )
        for file in [*files, INDEX_NAME]:
            _refuse_existing(self._folder / file)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise WriteError(str(self._folder), f"cannot create the directory: {error.strerror}") from error
        self._bar.total(sum(sizes.values()))
        try:
            await self._write_files(save_file, files, shards, sizes)
            paths = [str(self._folder / file) for file in files]
            if len(shards) > 1:
                paths.append(self._write_index(sizes, dict(zip(files, shards, strict=True))))
        except BaseException:  # a part of a model is none
            for file in files:
                (self._folder / file).unlink(missing_ok=True)
            raise
        return Exported(files=paths, tensors=len(self._tensors), left_out=self._left_out)

    async def _write_files(
        self, save_file: Any, files: list[str], shards: list[list[str]], sizes: Mapping[str, int]
    ) -> None:
        for file, names in zip(files, shards, strict=True):
            fqns = [self._tensors[name].fqn for name in names]
            values = await self._checkpoint.read(frozenset(fqns).__contains__, dtype=self._dtype)
            tensors = {name: values.pop(fqn) for name, fqn in zip(names, fqns, strict=True)}
            await to_thread.run_sync(partial(_write, save_file, tensors, self._folder / file))
            self._bar.advance(sum(sizes[name] for name in names))

    def _nbytes(self, stored: StoredTensor) -> int:
        if self._dtype is None or not stored.dtype.is_floating_point:
            return stored.nbytes
        return stored.nbytes // stored.dtype.itemsize * self._dtype.itemsize

    async def _leave_out_tied(self) -> None:
        for name, other in self._tied.items():
            if name not in self._tensors or other not in self._tensors:
                missing = name if name not in self._tensors else other
                raise ArgumentError("tied", f"{missing!r} is not among the names in the files")
            one, two = self._tensors[name].fqn, self._tensors[other].fqn
            values = await self._checkpoint.read({one, two}.__contains__)
            if values[one].shape != values[two].shape or not torch.equal(values[one], values[two]):
                raise ArgumentError("tied", f"{name!r} and {other!r} are not equal: they are not tied")
            del self._tensors[name]

    def _write_index(self, sizes: Mapping[str, int], shards: Mapping[str, list[str]]) -> str:
        weight_map = {name: file for file, names in shards.items() for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(weight_map.items()))}
        path = self._folder / INDEX_NAME
        temporary = path.with_suffix(".tmp")
        try:
            temporary.write_text(json.dumps(index, indent=2) + "\n")
            temporary.replace(path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise WriteError(str(path), str(error)) from error
        return str(path)


def _write(save_file: Any, tensors: dict[str, torch.Tensor], path: Path) -> None:
    from safetensors import SafetensorError

    temporary = path.with_suffix(".tmp")
    try:
        save_file(tensors, temporary, metadata={"format": "pt"})
        temporary.chmod(0o666 & ~_umask())  # safetensors makes it the owner's alone
        temporary.replace(path)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        temporary.unlink(missing_ok=True)
        raise WriteError(str(path), f"{error!r}") from error


def _cut(sizes: Mapping[str, int], nbytes: int) -> Any:
    """Cut names, sorted, into groups whose tensors have together at most `nbytes`, or are one."""
    group: list[str] = []
    held = 0
    for name in sorted(sizes):
        if group and held + sizes[name] > nbytes:
            yield group
            group, held = [], 0
        group.append(name)
        held += sizes[name]
    if group:
        yield group


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _refuse_existing(path: Path) -> None:
    if path.exists():
        raise WriteError(str(path), "the file exists, and will not be overwritten")


async def convert(
    checkpoint_id: CheckpointId,
    out: CheckpointId,
    *,
    include: Names | None = None,
    exclude: Names | None = None,
    dtype: torch.dtype | None = None,
    storage: Storage | None = None,
) -> str:
    """Write any checkpoint that `aiodcp.open` reads as one of DCP's, nested as it was; return where it is.

        await aiodcp.convert("hf-folder", "checkpoints/base")

    All of it is in memory for as long as it takes. Custom metadata stays behind: what a manager has written there is of
    the root that it was written in.

    Args:
        checkpoint_id: which.
        out: where to; must not be a checkpoint yet.
        include, exclude: see `Checkpointer.load`; of the names that are stored.
        dtype: to which floating-point tensors are converted.
        storage: where both are; by default where their ids say.

    Raises:
        ArgumentError: nothing is included.
        LoadError: the checkpoint cannot be read.
        WriteError: there is a checkpoint at `out`, or it cannot be written.

    Cancellation: leaves nothing at `out`.
    """
    check_dtype(dtype)
    async with Checkpointer(storage=storage, no_dist=True, keep_buffers=False, check_torn=False) as checkpointer:
        try:
            await checkpointer.read_custom_metadata(out)
        except NotACheckpointError:
            pass
        else:
            raise WriteError(os.fspath(out), "there is a checkpoint, which will not be overwritten")
        async with open_checkpoint(checkpoint_id, storage=storage) as checkpoint:
            names = _names(checkpoint, include, exclude)
            state = await checkpoint.state_dict(_exactly(names, checkpoint), dtype=dtype)
            saved = await checkpointer.save(state, out)
        try:
            await saved.uploaded
        except BaseException:  # leaving would wait for it
            saved.cancel()
            raise
    return saved.checkpoint_id


export_sync = sync_function(export)

convert_sync = sync_function(convert)

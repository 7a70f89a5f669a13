"""A checkpoint that is open for reading, without a state dict that says what is wanted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal

import torch
from torch.distributed.device_mesh import DeviceMesh

from .._engine.sync_bridge import SyncContext, sync_method
from .._format.custom_metadata import decode_custom_metadata
from .._load.name_hints import did_you_mean
from .._load.stored_reader import StoredReader, Wanted
from .._state.name_patterns import Matcher, Names
from ..checkpointer.arguments import CheckpointId
from ..checkpointer.checkpointer import Checkpointer, session_of
from ..checkpointer.load_calls import LoadCalls
from ..errors import ArgumentError, ClosedError
from ..storage.base import Storage
from .nesting import nest
from .read_targets import Placements, ReadTargets, Rows
from .stored_values import StoredTensor, StoredValue

Order = Literal["stored", "saved", "name"]

_IN_FLIGHT_NBYTES = 256 << 20


class StoredCheckpoint(SyncContext, Mapping[str, StoredTensor | StoredValue]):
    """A checkpoint, open for reading: what `aiodcp.open` returns. A mapping of names to what is stored under them."""

    def __init__(
        self, checkpoint_id: CheckpointId, *, storage: Storage | None, weights_only: bool, check_crc: bool
    ) -> None:
        self._id = checkpoint_id
        self._weights_only = weights_only
        self._check_crc = check_crc
        self._checkpointer = Checkpointer(storage=storage, no_dist=True, keep_buffers=False)
        self._opened: StoredReader | None = None

    def __repr__(self) -> str:
        state = f"{len(self)} values, written by {self.written_by}" if self._opened is not None else "closed"
        return f"<StoredCheckpoint {self._id!s}: {state}>"

    async def __aenter__(self) -> StoredCheckpoint:
        await self._checkpointer.__aenter__()
        try:
            self._opened = await self._loads.open_reader(
                self._id, weights_only=self._weights_only, check_crc=self._check_crc
            )
        except BaseException:
            await self._checkpointer.__aexit__(None, None, None)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opened = None
        await self._checkpointer.__aexit__(kind, error, trace)

    @property
    def _loads(self) -> LoadCalls:
        return session_of(self._checkpointer).loads

    @property
    def _reader(self) -> StoredReader:
        if self._opened is None:
            raise ClosedError("the checkpoint is not open: use `async with aiodcp.open(...) as ckpt`")
        return self._opened

    # --- what is there

    @property
    def checkpoint_id(self) -> str:
        """Where it is: a full path or URL."""
        return self._reader.checkpoint_id

    @property
    def written_by(self) -> str:
        """What has written it: "aiodcp", "torch.distributed.checkpoint", "safetensors", "torch.save"."""
        layout = self._reader.layout
        if layout is not None:
            return layout.written_by
        return "aiodcp" if self._reader.is_ours else "torch.distributed.checkpoint"

    @property
    def custom_metadata(self) -> dict[str, Any]:
        """What was saved with it as `custom_metadata`; of safetensors what their headers say."""
        layout = self._reader.layout
        return dict(layout.notes) if layout is not None else decode_custom_metadata(self._reader.seal.custom_metadata)

    def __len__(self) -> int:
        return len(self._reader.outline.tensors)

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names, in the order of the state dict that was saved."""
        return iter(self._reader.outline.tensors)

    def __contains__(self, fqn: object) -> bool:
        return fqn in self._reader.outline.tensors

    def __getitem__(self, fqn: str) -> StoredTensor | StoredValue:
        reader = self._reader
        kind = reader.outline.tensors[fqn]
        if kind is None:
            return StoredValue(fqn=fqn, _reader=reader)
        dtype, shape = kind
        return StoredTensor(fqn=fqn, shape=shape, dtype=dtype, nbytes=reader.outline.nbytes(fqn), _reader=reader)

    # --- reading

    async def read(
        self,
        what: Names,
        rows: Rows | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        device_mesh: DeviceMesh | None = None,
        placements: Placements | None = None,
    ) -> Any:
        """Return the value of a name; of patterns or a predicate a dict of all that they mean, by name.

            weight = await ckpt.read("model.layers.0.weight")
            first = await ckpt.read("model.embed.weight", slice(0, 1000))
            layers = await ckpt.read("model.layers.*.weight")

        Only what is asked for is read: of a tensor's rows those bytes, and as many as 64 KiB around them.

        Args:
            what: a name, whatever is in it; or patterns (`*`, `?`, `[...]`; a name stands for all below it, too), or a
                function of a name.
            rows: which part of the one tensor: of its first dimension, or of each of its first ones.
            device: where tensors are wanted, by default in host memory.
            dtype: to which floating-point tensors are converted.
            device_mesh: over which tensors are sharded: each rank reads its own part, and calls this by itself.
            placements: how, on that mesh; for all tensors, or a function of a `StoredTensor`. One without dimensions is
                replicated where it would be sharded.

        Raises:
            ArgumentError: nothing of that name is stored, `rows` are no part of it, or it cannot be so placed.
            CorruptError: what is stored is not what was saved.
            UnsafeError: a value needs more than plain data.
            LoadError: the checkpoint has been replaced since it was opened, or there is no memory.
            ReadError: storage failed.

        Cancellation: takes effect when the read under way is done.
        """
        make = ReadTargets(self._reader, device, dtype, device_mesh, placements)
        if isinstance(what, str) and what in self:
            return (await self._read([make.target(self, what, rows)], make))[0]
        fqns = self._select(what)
        if rows is not None:
            raise ArgumentError("rows", "are a part of one tensor, and these are patterns of names")
        values = await self._read([make.target(self, fqn, None) for fqn in fqns], make)
        return dict(zip(fqns, values, strict=True))

    async def state_dict(
        self,
        what: Names | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        device_mesh: DeviceMesh | None = None,
        placements: Placements | None = None,
    ) -> dict[str, Any]:
        """Return all values, or those that are meant, nested as they were saved: dicts, lists, int keys.

        Args:
            what: see `read`; by default all.
            device, dtype, device_mesh, placements: see `read`.

        Raises:
            ArgumentError, CorruptError, UnsafeError, LoadError, ReadError: see `read`.

        Cancellation: takes effect when the read under way is done.
        """
        make = ReadTargets(self._reader, device, dtype, device_mesh, placements)
        fqns = list(self) if what is None else self._select(what)
        values = await self._read([make.target(self, fqn, None) for fqn in fqns], make)
        return nest(dict(zip(fqns, values, strict=True)), self._reader.metadata, is_whole=what is None)

    async def stream(
        self,
        what: Names | None = None,
        *,
        order: Order | Sequence[str] = "stored",
        max_bytes: int = _IN_FLIGHT_NBYTES,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        device_mesh: DeviceMesh | None = None,
        placements: Placements | None = None,
    ) -> AsyncGenerator[tuple[str, Any], None]:
        """Iterate over names and values as they arrive: the next ones are read while you have the last.

            async for fqn, tensor in ckpt.stream("model.*"):
                await send(fqn, tensor)

        What is read ahead is given up when the iteration ends, also in the middle; where that must not wait for the
        garbage collector, use `contextlib.aclosing`.

        Args:
            what: see `read`; by default all.
            order: "stored", as the files have them, which is quickest; "saved", as the state dict had them; "name";
                or the names themselves, in their order.
            max_bytes: of tensors read and not yet asked for, at most, unless one is larger.
            device, dtype, device_mesh, placements: see `read`.

        Raises:
            ArgumentError, CorruptError, UnsafeError, LoadError, ReadError: see `read`.

        Cancellation: takes effect when the read under way is done.
        """
        make = ReadTargets(self._reader, device, dtype, device_mesh, placements)
        groups = self._groups(self._in_order(what, order), max_bytes)
        ahead: asyncio.Task[list[Any]] | None = None
        try:
            fqns = next(groups, None)
            while fqns is not None:
                if ahead is None:
                    ahead = self._begin(fqns, make)
                values = await ahead
                following = next(groups, None)
                ahead = self._begin(following, make) if following is not None else None
                for fqn in fqns:
                    yield fqn, values.pop(0)
                fqns = following
        finally:
            if ahead is not None:
                ahead.cancel()
                await asyncio.wait([ahead])

    def stream_sync(
        self,
        what: Names | None = None,
        *,
        order: Order | Sequence[str] = "stored",
        max_bytes: int = _IN_FLIGHT_NBYTES,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        device_mesh: DeviceMesh | None = None,
        placements: Placements | None = None,
    ) -> Iterator[tuple[str, Any]]:
        """Like `stream`, for callers without an event loop; without reading ahead."""
        make = ReadTargets(self._reader, device, dtype, device_mesh, placements)
        for fqns in self._groups(self._in_order(what, order), max_bytes):
            values = self._read_group_sync(fqns, make)
            for fqn in fqns:
                yield fqn, values.pop(0)

    def _begin(self, fqns: Sequence[str], make: ReadTargets) -> asyncio.Task[list[Any]]:
        return asyncio.ensure_future(self._read_group(fqns, make))

    async def _read_group(self, fqns: Sequence[str], make: ReadTargets) -> list[Any]:
        return await self._read([make.target(self, fqn, None) for fqn in fqns], make)

    async def _read(self, wanted: list[Wanted], make: ReadTargets) -> list[Any]:
        values = await self._loads.read(self._reader, wanted, make.devices)
        return [make.finished(each, value) for each, value in zip(wanted, values, strict=True)]

    def _select(self, what: Names) -> list[str]:
        means = Matcher(what, "what")
        fqns = [fqn for fqn in self if means(fqn)]
        if not fqns:
            hint = did_you_mean(what, list(self)) if isinstance(what, str) else ""
            raise ArgumentError("what", f"{self._id} has nothing that {what!r} means{hint}")
        return fqns

    def _in_order(self, what: Names | None, order: Order | Sequence[str]) -> list[str]:
        fqns = list(self) if what is None else self._select(what)
        if order == "saved":
            return fqns
        if order == "name":
            return sorted(fqns)
        if order == "stored":
            return sorted(fqns, key=self._reader.place_of)
        if isinstance(order, str) or not isinstance(order, Sequence):
            raise ArgumentError("order", f'must be "stored", "saved", "name", or names, got {order!r}')
        chosen = set(fqns)
        for fqn in order:
            if fqn not in self:
                raise ArgumentError("order", f"{self._id} has no value named {fqn!r}")
        return [fqn for fqn in order if fqn in chosen]

    def _groups(self, fqns: Sequence[str], max_bytes: int) -> Iterator[list[str]]:
        """Cut names into groups, of which two at a time are in memory."""
        if type(max_bytes) is not int or max_bytes < 1:
            raise ArgumentError("max_bytes", f"must be a positive integer, got {max_bytes!r}")
        outline = self._reader.outline
        group: list[str] = []
        held = 0
        for fqn in fqns:
            nbytes = outline.nbytes(fqn)
            if group and held + nbytes > max_bytes // 2:
                yield group
                group, held = [], 0
            group.append(fqn)
            held += nbytes
        if group:
            yield group

    read_sync = sync_method(read)
    state_dict_sync = sync_method(state_dict)
    _read_group_sync = sync_method(_read_group)


def open_checkpoint(
    checkpoint_id: CheckpointId, *, storage: Storage | None = None, weights_only: bool = True, check_crc: bool = True
) -> StoredCheckpoint:
    """Open a checkpoint for reading, without a state dict that says what is wanted.

        async with aiodcp.open("run/step-100") as ckpt:
            for fqn, stored in ckpt.items():
                print(fqn, getattr(stored, "shape", None))
            weight = await ckpt.read("model.layers.0.weight")

    Names, shapes, dtypes and shards are known without reading data. In programs without an event loop: `with`, and
    `read_sync`, `state_dict_sync`, `stream_sync`.

    Args:
        checkpoint_id: of this library, `torch.distributed.checkpoint`, safetensors (a folder of Hugging Face's, or one
            file), or a file of `torch.save`.
        storage: where; by default where the id says.
        weights_only: see `Checkpointer.load`.
        check_crc: see there; safetensors have no checksums.

    Raises:
        NotACheckpointError: on entering: there is none.
        FormatError, CorruptError, UnsafeError, ReadError: on entering: it cannot be read.
    """
    return StoredCheckpoint(checkpoint_id, storage=storage, weights_only=weights_only, check_crc=check_crc)

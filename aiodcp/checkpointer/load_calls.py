"""Loads as their caller sees them: what is to be filled, the load itself, and handing over what came of it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, MutableMapping, Sequence, Set
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.checkpoint.planner import LoadPlanner

from .._distributed.votes import OperationKind
from .._engine.device_copies import CopyStreams
from .._engine.threads import in_thread_if_long
from .._load.find_targets import Taken, take_targets
from .._load.loader import Loader
from .._load.options import Loaded, LoadOptions
from .._load.read_custom_metadata import read_custom_metadata
from .._load.report import LoadReport
from .._load.stored_reader import StoredReader, Wanted
from .._load.targets import LoadTargets
from .._telemetry.progress_bar import Bar, NoBar
from ..errors import CheckpointError, LoadError
from ..storage.retry import RetryingStorage
from .arguments import CheckpointId, Options, check_id, digest_of
from .capture_call import captured_here
from .flows import Flows


class LoadCalls:
    """The loads of one `Checkpointer`, as they are asked for. Its methods are called from the caller's thread."""

    def __init__(self, flows: Flows, storage: RetryingStorage, options: Options) -> None:
        self._flows = flows
        self._storage = storage
        self._options = options
        self._loader: Loader
        self._streams: CopyStreams

    def open(self, streams: CopyStreams) -> None:
        """Make what is kept from load to load; the engine runs."""
        options = self._options
        self._loader = Loader(
            self._storage, self._flows.engine.threads, checksum=options.checksum, share_reads=options.share_reads
        )
        self._streams = streams

    def close(self) -> None:
        """Let go of it."""
        del self._loader

    async def load(
        self,
        state_dict: MutableMapping[str, Any],
        checkpoint_id: CheckpointId,
        planner: LoadPlanner | None,
        options: LoadOptions,
        bar: Bar,
    ) -> LoadReport:
        """Implement `Checkpointer.load`; the bar shows how far it has come."""
        flows = self._flows
        flows.check_open()

        def take_here() -> tuple[str, Taken]:
            path = self._storage.resolve(check_id(checkpoint_id))
            return path, take_targets(state_dict, flows.rank, planner, self._streams)

        with _load_errors():
            await flows.wait_for_saves()
            taken = captured_here(take_here, is_alone=flows.channel is None)

            async def take() -> tuple[str, LoadTargets]:
                path, (find, is_short) = await taken()
                return path, await in_thread_if_long(is_short, flows.engine.threads.compute, find)

            loaded = await self._load(take, checkpoint_id, options, bar)
            if not options.is_dry:
                loaded.targets.hand_over(state_dict, absent=loaded.absent)
        return loaded.targets.report

    async def _load(
        self,
        take: Callable[[], Awaitable[tuple[str, LoadTargets]]],
        checkpoint_id: CheckpointId,
        options: LoadOptions,
        bar: Bar,
    ) -> Loaded:
        flows = self._flows
        if flows.channel is not None:  # ranks wait for each other's turns
            flows.refuse_inside("load on several ranks")
        operation = flows.operation(OperationKind.LOAD, LoadError("the load was cancelled"))

        async def load() -> Loaded:
            with flows.under_way(operation):
                return await self._loader.load(operation, digest_of(checkpoint_id), take, options, bar)

        async def load_in_turn() -> Loaded:
            async with flows.slot:
                return await load()

        return await flows.run(load_in_turn if flows.channel else load, operation=operation)

    async def open_reader(self, checkpoint_id: CheckpointId, *, weights_only: bool, check_crc: bool) -> StoredReader:
        """Open a checkpoint, until the Checkpointer is closed."""
        self._flows.check_open()
        reader = StoredReader(
            self._storage,
            self._flows.engine.threads,
            self._storage.resolve(check_id(checkpoint_id)),
            checksum=self._options.checksum if check_crc else None,
            weights_only=weights_only,
        )
        with _load_errors():
            await self._flows.keep_until_close(reader.opened())
        return reader

    async def read(self, reader: StoredReader, wanted: Sequence[Wanted], devices: Set[torch.device]) -> list[Any]:
        """Return values of an open checkpoint.

        Args:
            reader: the checkpoint.
            wanted: what of it.
            devices: where the tensors to be filled are.
        """
        self._flows.check_open()
        with _load_errors():
            copies = self._streams.begin(devices, lambda device: wanted[0].fqn)
            return await self._flows.run(reader.read, wanted, copies, NoBar())

    async def read_custom_metadata(self, checkpoint_id: CheckpointId) -> dict[str, Any]:
        """Implement `Checkpointer.read_custom_metadata`."""
        self._flows.check_open()
        path = self._storage.resolve(check_id(checkpoint_id))
        return await self._flows.run(read_custom_metadata, self._storage, path)


@contextmanager
def _load_errors() -> Iterator[None]:
    """Let nothing leave a load that is not of our tree."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise LoadError(f"failed: {error!r}") from error

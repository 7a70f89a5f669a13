"""The `Checkpointer`, which saves and loads."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, overload

import torch
from torch.distributed.checkpoint.planner import LoadPlanner, SavePlanner

from .._engine.sync_bridge import SyncContext, sync_method
from .._format.checksum import Checksum, default_checksum
from .._load.options import LoadOptions, Rename
from .._load.report import LoadReport
from .._log import SafeLogger
from .._save.parts import PartExchange, PartTicket
from .._save.sharing import OnDisagreement
from .._state.name_patterns import Names
from .._telemetry.progress_bar import NoBar
from ..storage.auto import AutoStorage
from ..storage.base import Storage
from ..storage.error_mapping import write_errors
from ..storage.retry import Retry
from .arguments import CheckpointId, OnBusy, Options, default_copy_threads, metadata_encoder
from .checkpoint import Checkpoint
from .optimizer_guard import Guard
from .part import PartSave
from .session import Session

log: SafeLogger = SafeLogger(__name__)


class Checkpointer(SyncContext):
    """Save and load checkpoints in DCP's format from an event loop that stays responsive.

        async with aiodcp.Checkpointer() as checkpointer:
            ckpt = await checkpointer.save({"model": model, "optim": optimizer}, "checkpoints/step-100")
            await ckpt.staged    # the state may change again
            await ckpt.uploaded  # the checkpoint is durable

    One save is in flight at a time. Leaving the block, by an error too, waits for it; a failed save that was not
    awaited is raised there, or by the next `save`. Without an event loop the same calls are `with`, `save_sync`,
    `load_sync`, `check_sync` and `prepare_sync`, and of what they return `staged.wait()` and `uploaded.wait()`.

    Args:
        storage: where checkpoints live; by default where their ids say: a path is a directory, `s3://bucket/...`,
            `gs://`, `az://` and the like are objects.
        process_group: the ranks that save and load together; by default all, if torch.distributed is initialized. Its
            members open the `Checkpointer` together, and call `save`, `load` and `prepare` in the same order. It says
            who they are; its connections are not used.
        coordinator: who plans and commits: a rank of that group, counted in it.
        no_dist: save and load alone, whatever torch.distributed says.
        timeout: seconds after which a rank that has not come, or is not done with a phase, counts as missing.
        heartbeat_timeout: seconds after which one counts as missing that has come and is silent since, though its
            engine answers a few times a second: its process hangs, or a link is cut.
        keep_buffers: keep the staging buffer, which is as large as this rank's part of the checkpoint, from save to
            save. False gives the memory back after each, and the next save takes longer to stage: fresh memory must
            be touched first.
        spare_buffer: take a second staging buffer for a save that begins while a `Checkpoint.snapshot` of the one
            before is read, instead of waiting for the end of that.
        max_host_bytes: of staging memory on this rank. A checkpoint that is larger goes through it in windows, and
            `staged` comes when the last window is copied: when most of it is written. By default as much as it takes.
        check_torn: fail a save whose tensors changed before they were staged, with `TornSnapshotError`. It is seen by
            their version counters, and by optimizers that begin a step; not seen are writes through `.data` and
            `numpy()`. False does not look.
        copy_threads: cores that copy host tensors while a save is staged; by default all, up to four, which is what
            it takes to fill the memory's bandwidth. Under torchrun the ranks of a host share them.
        io_threads: threads that read and write files.
        retry: how often transient storage errors are retried.
        checksum: computes CRC32s, with the arguments of `zlib.crc32`; by default isal's if the extra `fast` is
            installed, else zlib's.
        on_disagreement: what to do where ranks hold different values of what is saved once, such as a random state
            that is not in a `PerRank`: "warn" once a name, and say whose is saved; "raise" `DisagreementError`, and
            commit nothing; or "ignore", and do not compare. Checked at every save: all bytes of values and of
            tensors up to 64 KiB, and a sample of larger ones.
        share_reads: in a load on several ranks, what several of them want alike, such as replicated tensors, is read
            from storage by one of them (of more than 32, by one of each 32), in turns, and passed on to the others over
            their network. By default from object stores, where each rank would download it; not from directories, where
            a host's cache serves all its ranks: there it is worth while if hosts together could read faster than the
            file system answers.
    """

    def __init__(
        self,
        *,
        storage: Storage | None = None,
        process_group: torch.distributed.ProcessGroup | None = None,
        coordinator: int = 0,
        no_dist: bool = False,
        timeout: float = 600.0,
        heartbeat_timeout: float = 60.0,
        keep_buffers: bool = True,
        spare_buffer: bool = False,
        max_host_bytes: int | None = None,
        check_torn: bool = True,
        copy_threads: int | None = None,
        io_threads: int = 4,
        retry: Retry | None = None,
        checksum: Checksum | None = None,
        on_disagreement: OnDisagreement = "warn",
        share_reads: bool | None = None,
    ) -> None:
        self._session = Session(
            Options(
                storage=storage if storage is not None else AutoStorage(),
                process_group=process_group,
                coordinator=coordinator,
                no_dist=no_dist,
                timeout=timeout,
                heartbeat_timeout=heartbeat_timeout,
                keep_buffers=keep_buffers,
                spare_buffer=spare_buffer,
                max_host_bytes=max_host_bytes,
                check_torn=check_torn,
                copy_threads=copy_threads if copy_threads is not None else default_copy_threads(),
                io_threads=io_threads,
                retry=retry if retry is not None else Retry(),
                checksum=checksum if checksum is not None else default_checksum(),
                on_disagreement=on_disagreement,
                share_reads=share_reads,
            )
        )

    def __repr__(self) -> str:
        return f"<Checkpointer on {self._session!r}>"

    async def __aenter__(self) -> Checkpointer:
        await self._session.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        failure = await self._session.close()
        if failure is None:
            return
        if error is None:
            raise failure
        log.error("the save in flight failed while the block was exiting with %s: %s", repr(error), repr(failure))
        if isinstance(error, asyncio.CancelledError):  # of an aborted task group, which collects failures
            raise failure from error
        error.add_note(f"aiodcp: the save in flight also failed: {failure!r}")

    # --- saving

    @overload
    async def save(
        self,
        state_dict: Mapping[str, Any],
        checkpoint_id: CheckpointId,
        *,
        planner: SavePlanner | None = ...,
        custom_metadata: Mapping[str, Any] | None = ...,
        overwrite: bool = ...,
        on_busy: Literal["wait", "raise"] = ...,
    ) -> Checkpoint: ...

    @overload
    async def save(
        self,
        state_dict: Mapping[str, Any],
        checkpoint_id: CheckpointId,
        *,
        planner: SavePlanner | None = ...,
        custom_metadata: Mapping[str, Any] | None = ...,
        overwrite: bool = ...,
        on_busy: OnBusy,
    ) -> Checkpoint | None: ...

    async def save(
        self,
        state_dict: Mapping[str, Any],
        checkpoint_id: CheckpointId,
        *,
        planner: SavePlanner | None = None,
        custom_metadata: Mapping[str, Any] | None = None,
        overwrite: bool = True,
        on_busy: OnBusy = "wait",
    ) -> Checkpoint | None:
        """Begin to save `state_dict`, and return as soon as it is captured.

        Until `staged` is reached the tensors must not change, or the save fails with `TornSnapshotError`; all other
        values are taken as they are now. The values of the top level may be `Stateful` (with `state_dict()` and
        `load_state_dict()`), as in DCP. An existing checkpoint at the same place is replaced when the new one is
        complete, and not before.

        With several ranks all of them call it. Sharded tensors are saved by those who hold their parts, everything
        else by one of its holders, each rank about as many bytes. A failure on one rank, here too, fails the save on
        all of them.

        Args:
            state_dict: nested dicts and lists of tensors and any picklable values.
            checkpoint_id: where to save; locally a directory, created if it is missing. The same on all ranks.
            planner: your own, instead of DCP's. It is asked for a local plan, and for every item's data, here at each
                save; for a global plan when the local ones have changed. The data of an item must have the dtype
                and shape that it planned.
            custom_metadata: small facts as JSON that are committed with the checkpoint; `read_custom_metadata`
                returns them. With several ranks the coordinator's.
            overwrite: replace a checkpoint that is there already; False fails the save with `WriteError` then, but of
                two that commit at one moment both may find none.
            on_busy: what to do while another save is in flight: "wait" for its end, in turn; "skip" this one and
                return None; or "raise" `BusyError`. Of several ranks the coordinator chooses for all.

        Raises:
            CaptureError: a value cannot be saved, or is on a device whose current stream captures a graph; names it.
            BusyError: see `on_busy`.
            SaveError: an earlier save failed and was not awaited.

        Cancellation: withdraws this save, also while it waits for an earlier one.
        """
        encode = metadata_encoder(custom_metadata)
        state = await self._session.saves.save(
            state_dict, checkpoint_id, encode, planner=planner, on_busy=on_busy, overwrite=overwrite
        )
        return None if state is None else Checkpoint(state)

    async def save_part(self, state_dict: Mapping[str, Any], checkpoint_id: CheckpointId) -> PartSave:
        """Begin to save a part of a checkpoint that several processes write, and one commits: see `PartSave`.

        For processes that share no process group, such as a controller, its trainers and its actors, each with a
        `Checkpointer` of its own; one may be several ranks, which all call it. Names must differ between parts: give
        each a name of its own at the top level.

        Raises:
            CaptureError: a value cannot be saved; names it.
            SaveError: an earlier save failed and was not awaited.

        Cancellation: withdraws this save, also while it waits for an earlier one.
        """
        exchange = PartExchange()
        encode = metadata_encoder(None)
        saves = self._session.saves
        state = await saves.save(state_dict, checkpoint_id, encode, planner=None, on_busy="wait", part=exchange)
        assert state is not None, "it waits for its turn"
        return PartSave(state, exchange, self._session.flows)

    async def commit(
        self,
        checkpoint_id: CheckpointId,
        tickets: Sequence[PartTicket],
        *,
        custom_metadata: Mapping[str, Any] | None = None,
        overwrite: bool = True,
    ) -> None:
        """Make the parts that several processes have written one checkpoint, atomically and durably.

        Args:
            checkpoint_id: where they were written.
            tickets: of all parts.
            custom_metadata, overwrite: see `save`.

        Raises:
            ArgumentError: there is no ticket, two parts have a value of one name, or one is of another checkpoint.
            SaveError: a part is gone, or storage failed. Nothing was committed.

        Cancellation: takes effect before the commit has begun.
        """
        encode = metadata_encoder(custom_metadata)
        await self._session.saves.commit(checkpoint_id, tickets, encode, overwrite=overwrite)

    def guard(self, *optimizers: torch.optim.Optimizer) -> Guard:
        """Make optimizers wait, before each step, for the staging that is in flight.

            checkpointer.guard(optimizer)  # from here on `staged` need not be awaited

        Their `step()` then blocks the thread that calls it, for as long as `await ckpt.staged` would have taken; a
        save that fails lets them go on. Works in loops with and without asyncio.

        Args:
            optimizers: which; by default all of the process.

        Returns:
            The guard. It is removed by its `remove()`, on leaving a `with` block of it, and with the Checkpointer.
        """
        return self._session.saves.guard(optimizers)

    def step(self, number: int) -> AbstractContextManager[None]:
        """Record a step of the caller, which `write_trace` shows beside the saves: `with checkpointer.step(n):`."""
        return self._session.saves.trace.step(number)

    def write_trace(self, path: str | os.PathLike[str]) -> None:
        """Write what all saves of this rank have done, and when, as a Chrome trace: https://ui.perfetto.dev opens it.

        The last thousand saves are in it, and the last ten thousand of the caller's steps. Times are the host's wall
        clock's, so that the traces of several ranks fit together. Blocks, for some milliseconds.

        Raises:
            WriteError: the file cannot be written.
        """
        with write_errors(os.fspath(path)):
            Path(path).write_text(self._session.saves.trace.render(self._session.flows.world_rank))

    async def prepare(self, state_dict: Mapping[str, Any], checkpoint_id: CheckpointId | None = None) -> None:
        """Plan for states of this structure and have the host memory ready, so that the first save is quick too.

        Args:
            state_dict: as for `save`.
            checkpoint_id: where it will be saved, or to some other place of its kind: plans for an object store are
                other ones than for a directory, which is the default.

        Raises:
            CaptureError: a value cannot be saved; names it.
            StageError: there is not enough host memory.
            RankError: that happened on some rank.

        Cancellation: takes effect when the step under way is done.
        """
        await self._session.saves.prepare(state_dict, checkpoint_id)

    # --- loading

    async def load(
        self,
        state_dict: MutableMapping[str, Any],
        checkpoint_id: CheckpointId,
        *,
        planner: LoadPlanner | None = None,
        strict: bool = True,
        cast: bool = False,
        rename: Rename | None = None,
        include: Names | None = None,
        exclude: Names | None = None,
        weights_only: bool = True,
        check_crc: bool = True,
    ) -> LoadReport:
        """Load a checkpoint into `state_dict`: tensors in place, other values replaced.

        Names are compared below the names of the top level that are asked for: `load({"model": model}, id)` loads the
        model and leaves the optimizer that is stored beside it alone. What is asked for and not stored, or stored
        below `model` and not asked for on any rank, is an error.

        Tensors are filled in place where one of the right name, shape and dtype is there; the rest of the structure is
        the checkpoint's. An object with `load_state_dict()` at the top level is given its state as it was saved, and
        judges it: modules by the names of their parameters and buffers, optimizers as torch does, by number and shapes
        of parameters (and names, if both have them). Lists have the length that was saved. Numbers become 0-d tensors,
        and the other way round, where the state dict has those. A tensor on the meta device is made.

        Everything that can be known without the data is checked before the first byte of the caller's tensors changes,
        and all other values are read before the first tensor.

        With several ranks all of them call it, and the checkpoint may come from any number of them: each reads its
        own part. The load starts on all ranks or on none, and a failure on one rank fails it on all, except in a
        `load_state_dict()`: those are called last, in the order of their names. It waits for saves in flight, except
        for the joint checkpoint from whose block it is called.

        Args:
            state_dict: what is wanted, with tensors of the right shapes on the devices where they are wanted.
            checkpoint_id: where from: written by this library, by `torch.distributed.checkpoint`, as safetensors (a
                folder of Hugging Face's, or one file), or by `torch.save`.
            planner: your own, instead of this library's planning. It decides what is strict, and how bytes are
                decoded; it is called in threads of the engine. What it adds at the top level is handed over.
            strict: names must agree. False loads those that both have, and reports the others; a whole part that is
                stored under another name at the top level is an error all the same.
            cast: allow lossy conversions, such as float32 to bfloat16; others are always allowed.
            rename: maps stored names to names of the state dict: a mapping of prefixes, the longest match first, or a
                function. Names begin with the name at the top level; `{"": "model"}` puts all names below "model".
            include, exclude: which names of the state dict to load: names, each for all that lies below it, too;
                patterns with `*`, `?` and `[...]`; or a function of a name. The others stay as they are, and are not
                missed; of an optimizer all or nothing.
            weights_only: build plain data and what `torch.serialization.add_safe_globals` allows, nothing else. False
                runs any code in the checkpoint: only for files that you trust like your own programs.
            check_crc: compare each item with its CRC32. An item of which only a part is read cannot be
                compared.

        Returns:
            What was left out or converted; false if nothing was.

        Raises:
            NotACheckpointError: there is no committed checkpoint.
            FormatError: there is one of another format.
            MismatchError: names every value that is missing, unexpected, or does not fit.
            CorruptError: what is stored is not what was saved. Found by its CRC32 after loading began, tensors may
                already have changed.
            UnsafeError: the checkpoint asks for more than data.
            StatefulError: an object's `load_state_dict()` raised.
            RankError: one of these, on some rank.

        Cancellation: takes effect when the read under way is done; tensors may already have changed.
        """
        options = LoadOptions(
            strict=strict,
            cast=cast,
            weights_only=weights_only,
            check_crc=check_crc,
            rename=rename,
            include=include,
            exclude=exclude,
        )
        return await self._session.loads.load(state_dict, checkpoint_id, planner, options, NoBar())

    async def check(
        self,
        state_dict: MutableMapping[str, Any],
        checkpoint_id: CheckpointId,
        *,
        strict: bool = True,
        cast: bool = False,
        rename: Rename | None = None,
        include: Names | None = None,
        exclude: Names | None = None,
        weights_only: bool = True,
    ) -> LoadReport:
        """Return what `load` would report, without loading: nothing of `state_dict` changes.

        Names, shapes and dtypes are compared, files are opened, and all values but tensors are read. Where `load` would
        raise a `MismatchError` the report has it as its `refusal`; other errors are raised, as there.

        Args:
            state_dict, checkpoint_id, strict, cast, rename, include, exclude, weights_only: see `load`.

        Raises:
            NotACheckpointError, FormatError, CorruptError, UnsafeError, RankError: see `load`.

        Cancellation: takes effect when the read under way is done.
        """
        options = LoadOptions(
            strict=strict,
            cast=cast,
            weights_only=weights_only,
            check_crc=True,
            rename=rename,
            include=include,
            exclude=exclude,
            is_dry=True,
        )
        return await self._session.loads.load(state_dict, checkpoint_id, None, options, NoBar())

    async def read_custom_metadata(self, checkpoint_id: CheckpointId) -> dict[str, Any]:
        """Return the custom metadata that a checkpoint was saved with; empty if there is none. Any rank may call it.

        Raises:
            NotACheckpointError: there is no committed checkpoint.
            ReadError: storage failed.
        """
        return await self._session.loads.read_custom_metadata(checkpoint_id)

    # --- without an event loop

    save_sync: Final = sync_method(save)
    prepare_sync: Final = sync_method(prepare)
    load_sync: Final = sync_method(load)
    check_sync: Final = sync_method(check)
    commit_sync: Final = sync_method(commit)
    read_custom_metadata_sync: Final = sync_method(read_custom_metadata)


def session_of(checkpointer: Checkpointer) -> Session:
    """Return what a Checkpointer is made of, for the rest of the library."""
    return checkpointer._session

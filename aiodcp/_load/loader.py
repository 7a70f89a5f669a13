"""The load flow: metadata, plan, open, values, tensors. Runs on the engine's loop.

Planning and reading are each rank's own, but every step succeeds on all of them or on none.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

from torch.distributed.checkpoint.planner import LoadPlanner

from .._distributed.operation import Operation
from .._distributed.votes import Row
from .._engine.gc_pause import gc_paused
from .._engine.threads import Threads, in_thread, in_thread_if_long
from .._foreign.find import SHORT_METADATA_NBYTES, complete, find_metadata, folder_of, read_found
from .._format.checksum import Checksum
from .._format.dcp import Metadata
from .._format.extension import foreign_layout
from .._format.index_reader import MAGIC as INDEX_MAGIC
from .._format.item_tables import ItemTables
from .._format.naming import METADATA_NAME
from .._log import SafeLogger
from .._telemetry.progress_bar import Bar
from ..errors import CorruptError, MismatchError, NotACheckpointError, ReadError
from ..storage.base import Storage, object_limits
from ..storage.error_mapping import read_errors
from .decode import ItemDecoder
from .file_reads import FileReads
from .fill_tensors import ending, fill_tensors
from .find_targets import allocate_optimizers
from .fitting import fill_whole, settle_values
from .local_plan import LocalPlan, LocalPlanning
from .name_union import join_marks, unwanted
from .options import Loaded, LoadOptions
from .plan import ValueRead
from .planner_reads import commit_loaded, plan_local_load, plan_reads
from .read_plan import ReadPlan
from .reading_together import ReadingTogether
from .refuse import note_left_out, raise_or_note, refuse
from .sharing import OpenProposal, agree_on_open
from .start_agreement import (
    FoundMetadata,
    LoadPlanProposal,
    LoadProposal,
    agree_on_load,
    agree_on_load_plan,
    agree_on_metadata,
)
from .targets import LoadTargets

log = SafeLogger(__name__)

REPORTED = 5  # names in one line of the log


class Loader:
    """Reads checkpoints from one storage."""

    def __init__(
        self, storage: Storage, threads: Threads, *, checksum: Checksum, share_reads: bool | None = None
    ) -> None:
        self._storage = storage
        self._threads = threads
        self._checksum = checksum
        self._share_reads = share_reads

    async def load(
        self,
        operation: Operation,
        id_digest: int,
        take: Callable[[], Awaitable[tuple[str, LoadTargets]]],
        options: LoadOptions,
        bar: Bar,
    ) -> Loaded:
        """Fill the tensors that are wanted, and read the other values.

        Args:
            operation: the ranks that load.
            id_digest: of the checkpoint's id, the same on all ranks.
            take: returns the checkpoint, and what this rank wants of it. May raise.
            options: what the caller asked for.
            bar: shows how many bytes of tensors are read.

        Raises:
            LoadError: see `Checkpointer.load`.

        Cancellation: `operation.cancel()` takes effect when the read under way is done.
        """

        async def look(checkpoint_id: str, whole: bool) -> bytes | None:  # one rank asks the file system
            if not operation.is_coordinator:
                return b""
            try:
                return await find_metadata(
                    self._storage, checkpoint_id, self._threads, weights_only=options.weights_only, whole=whole
                )
            except NotACheckpointError:
                return None

        async def get() -> tuple[str, LoadTargets, bytes | None]:
            checkpoint_id, targets = await take()
            return checkpoint_id, targets, await look(checkpoint_id, targets.planner is not None)

        (checkpoint_id, targets, data), row = await operation.run_phase(
            "read metadata",
            get,
            propose=lambda got: LoadProposal(
                found=FoundMetadata.of(got[2]), id_digest=id_digest, has_planner=got[1].planner is not None
            ).to_row(),
            agree=agree_on_load,
        )
        flow = _LoadFlow(
            self._storage,
            self._threads,
            self._checksum,
            operation,
            checkpoint_id,
            options,
            bar,
            share_reads=self._share_reads,
        )
        while True:
            found = FoundMetadata.from_row(row)
            if found.is_absent:
                raise NotACheckpointError(checkpoint_id)  # on every rank: who finds none may begin anew
            metadata = await operation.broadcast(data or b"", found.nbytes)
            async with AsyncExitStack() as stack:
                loaded = await flow.run(stack, targets.fresh(), metadata)
            if loaded is not None:
                for each in (targets, loaded.targets):
                    await in_thread_if_long(targets.is_short, self._threads.compute, each.keep_only_new)
                return loaded
            data, row = await operation.run_phase(  # a save has replaced the checkpoint
                "read metadata",
                partial(look, checkpoint_id, targets.planner is not None),
                propose=lambda got: FoundMetadata.of(got).to_row(),
                agree=agree_on_metadata,
            )


class _LoadFlow:
    """One load, on one rank."""

    def __init__(
        self,
        storage: Storage,
        threads: Threads,
        checksum: Checksum,
        operation: Operation,
        checkpoint_id: str,
        options: LoadOptions,
        bar: Bar,
        *,
        share_reads: bool | None,
    ) -> None:
        self._storage = storage
        self._share_reads = share_reads
        self._threads = threads
        self._operation = operation
        self._checkpoint_id = checkpoint_id
        self._folder = checkpoint_id  # where its files are
        self._options = options
        self._bar = bar
        self._unchecked = False
        self._decoder = ItemDecoder(
            describe=lambda name: storage.describe(self._folder, name),
            crc32=checksum if options.check_crc else None,
            weights_only=options.weights_only,
            note_unchecked=self._note_unchecked,
        )
        self._reads: FileReads

    async def run(self, stack: AsyncExitStack, targets: LoadTargets, data: bytes) -> Loaded | None:
        """Load what the metadata `data` describes; return None if it has been replaced by another one meanwhile."""
        operation = self._operation
        if targets.planner is not None:
            planned = LocalPlan(plan=await self._ask_planner(targets, targets.planner, data))
        else:
            found = await self._plan(stack, targets, data)
            if found is None:
                return None
            planned = found
        plan = planned.plan

        together = ReadingTogether(operation, self._threads, is_wanted=self._shares_reads())

        async def read_values() -> None:
            await self._reads.open(stack, plan)
            with read_errors(self._storage.describe(self._checkpoint_id)):
                await together.look(plan, self._reads)
                targets.loaded |= await self._reads.read_values(plan.values, decoded=targets.planner is None)
            if targets.planner is None:
                problems = settle_values(plan, targets, cast=self._options.cast)
                if problems:
                    error = MismatchError(self._checkpoint_id, problems=problems)
                    raise_or_note(targets, error, is_dry=self._options.is_dry)

        async def read_tensors() -> None:
            with ending(targets.device_copies):
                with read_errors(self._storage.describe(self._checkpoint_id)):
                    shared = await together.connect(stack, plan)
                    copies, stored = targets.device_copies, together.stored
                    await fill_tensors(
                        self._reads, plan, copies, self._threads, self._bar, stored=stored, shared=shared
                    )
                moves_bytes = plan.opaque or plan.fills or targets.device_copies  # in any number
                is_short = targets.is_short and targets.planner is None and not moves_bytes
                await in_thread_if_long(is_short, self._threads.compute, self._finish, plan, targets)

        _, row = await operation.run_phase(  # all of them before the first tensor
            "read values",
            partial(self._unless_replaced, data, read_values),
            propose=together.propose,
            agree=agree_on_open,
        )
        agreed = OpenProposal.from_row(row)
        if agreed.is_replaced:
            return None
        if self._options.is_dry:
            targets.device_copies.end()
            return Loaded(targets=targets, absent=planned.found.absent)
        await together.find(agreed)
        await operation.run_phase("read tensors", read_tensors)
        self._log_report(targets)
        return Loaded(targets=targets, absent=planned.found.absent)

    def _shares_reads(self) -> bool:
        if self._operation.size == 1 or self._options.is_dry:
            return False
        is_store = object_limits(self._storage, self._checkpoint_id) is not None
        return is_store if self._share_reads is None else self._share_reads

    def _finish(self, plan: ReadPlan, targets: LoadTargets) -> None:
        targets.device_copies.enter_thread()
        if targets.planner is not None:
            loaded, targets.loaded = targets.loaded, {}
            commit_loaded(targets.planner, plan, loaded)
        else:
            fill_whole(plan, targets)
            targets.rebuild()
        targets.device_copies.wait_for_thread()

    def _note_unchecked(self) -> None:
        self._unchecked = True

    def _log_report(self, targets: LoadTargets) -> None:
        where = self._storage.describe(self._checkpoint_id)
        if self._unchecked:
            log.warning("%s: some values were saved without checksums: damage to them cannot be detected", where)
        report = targets.report
        for what, names in (
            ("not in the checkpoint", report.missing),
            ("in the checkpoint only", report.unexpected),
            ("converted", report.converted),
        ):
            if names:
                more = f" and {len(names) - REPORTED} more" if len(names) > REPORTED else ""
                level = logging.INFO if names is report.converted else logging.WARNING
                log.log(level, "%s: %s: %s%s", where, what, ", ".join(names[:REPORTED]), more)

    # --- planning

    async def _plan(self, stack: AsyncExitStack, targets: LoadTargets, data: bytes) -> LocalPlan | None:
        operation, options = self._operation, self._options
        planned: list[LocalPlan] = []

        async def plan() -> bool:
            return await self._unless_replaced(data, partial(self._plan_here, stack, targets, data, planned))

        def propose(is_current: bool) -> Row:
            has_unexpected = bool(planned and planned[0].found.unexpected)
            return LoadPlanProposal(is_replaced=not is_current, has_unexpected=has_unexpected).to_row()

        _, row = await operation.run_phase("plan", plan, propose=propose, agree=agree_on_load_plan)
        agreed = LoadPlanProposal.from_row(row)
        if agreed.is_replaced:
            return None
        [mine] = planned
        unexpected: list[str] = mine.found.unexpected
        if agreed.has_unexpected and operation.size > 1:
            everyones = await operation.gather(mine.marks)
            joined = await operation.broadcast(join_marks(everyones) if everyones else b"")
            unexpected = unwanted(mine.names, joined)

        async def refuse_unexpected() -> None:
            error = refuse(targets, mine.found, self._checkpoint_id, strict=options.strict, unexpected=unexpected)
            raise_or_note(targets, error, is_dry=options.is_dry)

        if agreed.has_unexpected:
            await operation.run_phase("plan", refuse_unexpected)
        note_left_out(targets.report, mine.found, unexpected)
        return mine

    async def _plan_here(
        self, stack: AsyncExitStack, targets: LoadTargets, data: bytes, planned: list[LocalPlan]
    ) -> None:
        # The metadata is gone again when the block ends: the collector never sees it.
        compute = partial(in_thread_if_long, self._is_short(targets, data), self._threads.compute)
        operation = self._operation
        with gc_paused(len(targets.fqns)):
            metadata = await self._read_metadata(data)
            planning = LocalPlanning(self._checkpoint_id, metadata, targets, self._options, rank=operation.rank)
            reads = await compute(planning.compare)
            values = await self._read_options(stack, reads) if reads else {}
            planned.append(await compute(partial(planning.find, values, is_alone=operation.size == 1)))
            del metadata, planning

    async def _read_metadata(self, data: bytes) -> Metadata:
        path = self._storage.describe(self._checkpoint_id, METADATA_NAME)
        is_short = len(data) <= SHORT_METADATA_NBYTES
        metadata, seal = await in_thread_if_long(is_short, self._threads.compute, read_found, data, path)
        await complete(self._storage, self._checkpoint_id, metadata, self._operation.rank)
        try:
            tables = ItemTables(metadata, seal.tables if self._options.check_crc else ())
        except ValueError as error:
            raise CorruptError(path, "", "the number of data files is not the number of checksum tables") from error
        self._folder = folder_of(self._checkpoint_id, metadata)
        layout = foreign_layout(metadata)
        self._reads = FileReads(self._storage, self._threads, self._folder, tables, self._decoder, layout)
        return metadata

    def _is_short(self, targets: LoadTargets, data: bytes) -> bool:
        """Whether to plan takes no longer than to ask a thread, and calls nothing of the caller's."""
        options = self._options
        is_plain = options.rename is None and options.include is None and options.exclude is None
        return is_plain and targets.is_short and len(data) <= SHORT_METADATA_NBYTES

    async def _read_options(self, stack: AsyncExitStack, reads: Sequence[ValueRead]) -> dict[str, Any]:
        """Read the options of optimizers, which say what belongs to which parameter."""
        await self._reads.open(stack, ReadPlan(tensors=[], values=[*reads]))
        with read_errors(self._storage.describe(self._checkpoint_id)):
            values = await self._reads.read_values(reads, decoded=True)
        return {read.fqn: values[read.index] for read in reads}

    async def _unless_replaced(self, data: bytes, function: Callable[[], Awaitable[None]]) -> bool:
        """Do what reads files; return False if one is gone because a save has replaced the checkpoint."""
        try:
            await function()
        except (CorruptError, ReadError) as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
            again = await find_metadata(
                self._storage,
                self._checkpoint_id,
                self._threads,
                weights_only=self._options.weights_only,
                whole=not data.startswith(INDEX_MAGIC),
            )
            if again == data:
                raise
            return False
        return True

    async def _ask_planner(self, targets: LoadTargets, planner: LoadPlanner, data: bytes) -> ReadPlan:
        """Plan with the caller's own planner, as DCP does: locally, globally, and locally again."""
        operation = self._operation
        coordinator = operation.is_coordinator

        def plan_local(metadata: Metadata) -> bytes:
            allocate_optimizers(targets, metadata)
            return pickle.dumps(plan_local_load(planner, targets.states, metadata, is_coordinator=coordinator))

        async def plan_here() -> tuple[Metadata, bytes]:
            with gc_paused():
                metadata = await self._read_metadata(data)
            return metadata, await in_thread(self._threads.compute, plan_local, metadata)

        (metadata, message), _ = await operation.run_phase("plan", plan_here)
        messages = await operation.gather(message)

        async def plan_for_all() -> list[bytes]:
            plans = planner.create_global_plan([pickle.loads(each) for each in messages]) if coordinator else []
            return [pickle.dumps(each) for each in plans]

        parts, _ = await operation.run_phase("plan", plan_for_all)
        mine = pickle.loads(await operation.scatter(parts))

        def find_reads() -> ReadPlan:
            finished = planner.finish_plan(mine)
            return plan_reads(planner, finished, metadata, checkpoint_id=self._checkpoint_id, cast=self._options.cast)

        return (await operation.run_phase("plan", partial(in_thread, self._threads.compute, find_reads)))[0]

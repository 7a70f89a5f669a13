"""Reading a plan's tensors into their targets, devices included."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from .._engine.device_copies import DeviceCopies
from .._engine.threads import Threads, in_thread
from .._format.archive_reader import StoredTensor
from .._telemetry.progress_bar import Bar
from ..errors import LoadError, StageError
from .file_reads import FileReads, SharedReads
from .read_plan import ReadPlan


async def fill_tensors(
    reads: FileReads,
    plan: ReadPlan,
    device_copies: DeviceCopies,
    threads: Threads,
    bar: Bar,
    *,
    stored: dict[int, StoredTensor] | None = None,
    shared: Sequence[SharedReads] = (),
) -> None:
    """Read all parts of tensors; in a block of `ending`. See `FileReads.read_tensors`.

    `stored` is what `FileReads.find_stored` has found, if it was asked already.

    Raises:
        CorruptError: what is stored is not what was saved.
        LoadError: there is no memory to read into.
        OSError: storage failed.
    """
    with _memory_errors():
        if stored is None:
            stored = await reads.find_stored(plan.tensors)
        if device_copies:
            await in_thread(threads.compute, _begin, device_copies)
        await reads.read_tensors(plan, stored, device_copies, bar, shared)


@contextmanager
def ending(device_copies: DeviceCopies) -> Iterator[None]:
    """Let go of the devices when the block ends."""
    try:
        yield
    finally:
        device_copies.end()


def _begin(device_copies: DeviceCopies) -> None:
    device_copies.start()
    device_copies.wait_for_marks()  # a copy that the caller queued may be on its way to a host tensor
    device_copies.wait_for_thread()  # and planning may have made tensors in memory that was in use


@contextmanager
def _memory_errors() -> Iterator[None]:
    try:
        yield
    except StageError as error:
        raise LoadError(f"no memory to read into: {error}") from error

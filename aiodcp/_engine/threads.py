"""The executors of one engine, and calls into them that can be awaited."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from functools import partial
from typing import TypeVar, TypeVarTuple

import anyio.lowlevel
import torch
from anyio import CancelScope

from .broadcast import Signal
from .worker_threads import WorkerThreads, call_guarded

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

NAME = "aiodcp"

SHORT_NBYTES = 128 << 10  # that are checksummed, or copied, in a tenth of a millisecond or two

_limiting = threading.Lock()


class Threads:
    """The executors of one engine.

    Attributes:
        staging: one thread, which copies tensors and waits for devices.
        compute: checksums, plans, pickles.
        files: reads and writes.
        given_up: set when what these threads wait for is not waited for any longer.
    """

    def __init__(self, copy_threads: int, compute_threads: int, io_threads: int) -> None:
        self.given_up: threading.Event = threading.Event()
        self.staging: WorkerThreads = WorkerThreads(1, f"{NAME}-stage", partial(_limit_torch, copy_threads))
        self.compute: WorkerThreads = WorkerThreads(compute_threads, f"{NAME}-compute", partial(_limit_torch, 1))
        self.files: WorkerThreads = WorkerThreads(io_threads, f"{NAME}-io")

    def close(self, *, wait: bool = True) -> None:
        """Let the threads end, and wait for that, up to a bound; or, without `wait`, give them up."""
        for each in (self.staging, self.compute, self.files):
            each.shutdown(wait, cancel_futures=not wait)


async def in_thread(executor: Executor, function: Callable[[*Ts], T], *args: *Ts) -> T:
    """Run `function` in a thread of `executor`.

    Cancellation: takes effect when the function has returned; what it works on must not be freed before.
    """
    with CancelScope(shield=True):
        result = await asyncio.get_running_loop().run_in_executor(executor, function, *args)
    return result


async def in_thread_if_long(is_short: bool, executor: Executor, function: Callable[[*Ts], T], *args: *Ts) -> T:
    """Run `function` in a thread, as `in_thread` does; here, if that takes no longer than to ask a thread.

    A turn of another thread costs some 0.3 ms in all, more on a busy machine.
    """
    if is_short:
        await anyio.lowlevel.checkpoint()
        return call_guarded(function, *args)
    return await in_thread(executor, function, *args)


def _limit_torch(threads: int) -> None:
    """Limit torch to so many cores in this thread: the others belong to the training step.

    `torch.set_num_threads` sets the calling thread's own number and, besides, the one with which threads begin that
    have not used torch yet. A second thread puts that back. Source: aten/src/ATen/ParallelOpenMP.cpp.
    """
    with _limiting:  # one at a time: else the second would take the first one's number for the process's
        before = torch.get_num_threads()
        if before == threads:  # as under torchrun
            return
        restore = threading.Thread(target=torch.set_num_threads, args=(before,), name=f"{NAME}-restore", daemon=True)
        torch.set_num_threads(threads)
        try:
            restore.start()
        except RuntimeError:  # no memory for a thread
            torch.set_num_threads(before)
            raise
        restore.join()


def start_thread(name: str, function: Callable[[*Ts], object], *args: *Ts) -> threading.Thread:
    """Start a thread `aiodcp-<name>`, for which the interpreter does not wait when it ends."""
    thread = threading.Thread(target=function, args=args, name=f"{NAME}-{name}", daemon=True)
    thread.start()
    return thread


async def in_own_thread(name: str, function: Callable[[], T], limit_s: float) -> T:
    """Call what may never return, because the other side does not answer, in a thread that is not waited for.

    Raises:
        RuntimeError: there was no answer for `limit_s` seconds.

    Cancellation: leaves the thread behind.
    """
    finished = Signal()
    answer: Future[T] = Future()

    def call() -> None:
        try:
            answer.set_result(function())
        except Exception as error:
            answer.set_exception(error)
        finished.set()

    start_thread(name, call)
    with anyio.move_on_after(limit_s):
        await finished.wait()
    if not finished.is_set():
        raise RuntimeError(f"no answer for {limit_s} s")
    return answer.result()

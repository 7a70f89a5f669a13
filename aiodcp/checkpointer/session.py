"""A `Checkpointer` from the inside: for what saves and loads through it without being its caller."""

from __future__ import annotations

import sys
from collections.abc import Callable
from weakref import WeakSet

from .._distributed.stop_agreement import StopAgreement
from .._engine.device_copies import CopyStreams
from .._engine.interpreter_exit import at_exit
from .._log import SafeLogger
from .._save.commit import is_live
from ..errors import ClosedError
from ..storage.retry import Attempt, RetryingStorage
from .arguments import Options
from .flows import Flows
from .load_calls import LoadCalls
from .save_calls import SaveCalls

log: SafeLogger = SafeLogger(__name__)

RetryListener = Callable[[str, str, Attempt], None]
"""Called with a checkpoint, a path and an attempt that failed, in the engine's thread."""


class Session:
    """What a `Checkpointer` is made of.

    Attributes:
        flows: what is under way.
        storage: the storage, with retries.
        saves, loads: what may be asked.
    """

    def __init__(self, options: Options) -> None:
        self._options = options
        self._listener: RetryListener = _log_retry
        self.flows: Flows = Flows(copy_threads=options.copy_threads, io_threads=options.io_threads)
        self.storage: RetryingStorage = RetryingStorage(
            options.storage,
            options.retry,
            lambda checkpoint_id, path, attempt: self._listener(checkpoint_id, path, attempt),
            self.flows.engine.activity.doing,
        )
        self.saves: SaveCalls = SaveCalls(self.flows, self.storage, options)
        self.loads: LoadCalls = LoadCalls(self.flows, self.storage, options)

    def __repr__(self) -> str:
        channel = self.flows.channel
        ranks = f"rank {channel.rank} of {channel.size}, " if channel else ""
        return f"{self.storage!r}, {self.flows.engine!r}, {ranks}{'busy' if self.saves.is_busy() else 'idle'}"

    async def open(self) -> None:
        """Start the engine, and connect with the other ranks.

        Raises:
            ArgumentError: there is no such process group.
            ClosedError: it is open already.
            RankError: not all ranks came in time.
        """
        options = self._options
        try:
            await self.flows.open(
                options.find_group(),
                coordinator=options.coordinator,
                timeout_s=float(options.timeout),
                silence_s=float(options.heartbeat_timeout),
            )
            self._make_ready()
        except BaseException:  # Ctrl-C, too
            if self.flows.is_open:
                await self.flows.close()
            raise
        _open.add(self)

    def _make_ready(self) -> None:
        engine = self.flows.engine
        streams = CopyStreams(engine.activity, engine.threads.given_up)
        self.saves.open(streams)
        self.loads.open(streams)

    async def close(self) -> Exception | None:
        """Wait for all that was asked for, and stop; return the failure that was not retrieved.

        Raises:
            DeadlockError: the caller is in the block of a joint checkpoint.

        Cancellation: gives up what is under way.
        """
        self.flows.refuse_inside("leave the Checkpointer")
        self.saves.give_up_part()
        stuck: ClosedError | None = None
        try:
            await self.flows.close()
        except ClosedError as error:
            stuck = error
        finally:
            if self in _open:  # else another task has closed it meanwhile
                _open.discard(self)
                self.saves.close()  # and with it the host memory
                self.loads.close()
        failure = self.saves.take_unretrieved() or stuck
        self.saves.last = None
        return failure

    def stop_agreement(self, name: str = "preempt") -> StopAgreement | None:
        """Return what the ranks agree with on the step at which they stop, if there are several; while it is open.

        Several agreements, each on a step, go by their names.
        """
        channel = self.flows.channel
        if channel is None:
            return None
        return StopAgreement(store=channel.store, rank=channel.rank, size=channel.size, root=channel.root, name=name)

    def finish_at_exit(self) -> None:
        """Finish what is under way, as the interpreter ends, and report a failure that was not retrieved."""
        self.flows.finish_at_exit()
        failure = self.saves.take_unretrieved()
        if failure is not None:
            text = f"the last save failed, and its error was never retrieved: {failure!r}"
            log.error("%s", text)
            if log.has_handlers():  # else the log is standard error
                sys.stderr.write(f"aiodcp: {text}\n")

    def on_retry(self, listener: RetryListener | None) -> None:
        """Have `listener` called with what is retried, instead of a line in the log; None for the log again."""
        self._listener = listener if listener is not None else _log_retry

    @staticmethod
    def is_saving(name: str) -> bool:
        """Whether a file of this name belongs to a save that is under way in this process."""
        return is_live(name)


_open: WeakSet[Session] = WeakSet()  # entered, and not left


def _finish_all() -> None:
    for session in list(_open):
        try:
            session.finish_at_exit()
        except Exception:
            log.exception("%r could not be finished", session)


at_exit(_finish_all)


def _log_retry(checkpoint_id: str, path: str, attempt: Attempt) -> None:
    log.warning("%s: %s", path, attempt)

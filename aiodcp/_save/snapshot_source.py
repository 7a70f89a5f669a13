"""What a save has staged, and who still reads it: the staging buffer is not used again before."""

from __future__ import annotations

import threading

from .._engine.broadcast import Signal
from ..errors import SaveError
from .plan import WritePlan
from .staging import Staging


class SnapshotSource:
    """The staging buffer of one save, as long as it holds what that save has staged. From any thread.

    Attributes:
        owner: whose buffer it is: whose next save waits for the readers.
    """

    def __init__(self, owner: object) -> None:
        self.owner = owner
        self._lock = threading.Lock()
        self._staged: tuple[WritePlan, Staging] | None = None
        self._problem = ""  # why there is nothing to be read, once that is known
        self._holders = 0
        self._free: Signal | None = None
        self._is_given_up = False

    @property
    def is_held(self) -> bool:
        """Whether someone reads it, or waits to."""
        return self._holders > 0

    def hold(self) -> None:
        """Keep what the save has staged, or will stage, until `release`.

        Raises:
            SaveError: it is gone, or will never be there.
        """
        with self._lock:
            self._refuse()
            self._holders += 1

    def release(self) -> None:
        """Stop reading."""
        with self._lock:
            self._holders -= 1
            if self._holders == 0:
                if self._is_given_up:
                    self._staged = None
                if self._free is not None:
                    self._free.set()

    def staged(self) -> tuple[WritePlan, Staging]:
        """Return what is to be read, once the save is staged; by who holds it.

        Raises:
            SaveError: there is nothing.
        """
        with self._lock:
            if self._staged is None:
                self._refuse()
            assert self._staged is not None, "it is staged"
            return self._staged

    def _refuse(self) -> None:
        if self._problem:
            raise SaveError(self._problem)

    # --- of the pipeline, on the engine's loop

    def offer(self, plan: WritePlan, staging: Staging) -> None:
        """Say where the save is staged."""
        with self._lock:
            self._staged = plan, staging

    def refuse(self, problem: str) -> None:
        """Say that there is nothing to be read, and why."""
        with self._lock:
            self._problem = problem

    async def take_back(self, *, waits: bool) -> bool:
        """Take the buffer back for the next save; return False if it is still read, and is not to be waited for."""
        while True:
            with self._lock:
                if not self._holders or not waits:
                    self._problem = self._problem or "a later save has taken the staging buffer: its snapshot is gone"
                    is_free = self._holders == 0
                    if is_free:
                        self._staged = None
                    else:
                        self._is_given_up = True
                    return is_free
                self._free = free = Signal()
            await free.wait()

    def let_go(self) -> None:
        """Keep the buffer no longer than it is read: nobody needs it for another save."""
        with self._lock:
            self._problem = self._problem or "the staging buffer has been given back: its snapshot is gone"
            self._is_given_up = True
            if not self._holders:
                self._staged = None

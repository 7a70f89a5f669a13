"""At which step all ranks stop.

One rank may hear of it and the others not, and ranks that train in step must not wait for each other at different
steps. So they agree, by way of torch.distributed's store, without the threads that train:

    a rank hears     sets the flag
    every rank       sees it within a second (of thousands, within some), says which step it has last been asked about,
                     and freezes: whoever is asked about a later step waits
    coordinator      when all have said theirs: the step after the latest of them is the one
    every rank       hears of it, and thaws; asked about that step, or a later one, it says yes

The frozen wait for no rank's training, so nothing can wait for them in turn.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from .._log import SafeLogger
from .store_pace import pace

log = SafeLogger(__name__)

AGREE_TIMEOUT_S = 30.0  # after which a rank that is asked waits no longer for the others: some of them are gone
LOOK_S = 1.0  # between two looks whether another rank stops

_POLL_S = 0.1


class StopAgreement:
    """One rank's view. `stops_at` is called by the training, all else by the thread that listens.

    Attributes:
        look_s: how often to look at `reason_of_others`.
    """

    def __init__(self, *, store: Any, rank: int, size: int, root: int, name: str = "preempt") -> None:
        """Begin.

        Args:
            store: shared by the ranks.
            rank, size, root: this rank, how many there are, the coordinator.
            name: of this agreement, under which nothing else is in the store.
        """
        self.look_s: float = pace(LOOK_S, size)
        self._store = store
        self._name = name
        self._rank, self._size, self._root = rank, size, root
        self._lock = threading.Lock()
        self._answered = -1  # up to which step the answer was no
        self._is_frozen = False
        self._decided = threading.Event()
        self._at = 0

    def reason_of_others(self) -> str:
        """Return why another rank stops; empty if none does.

        Raises:
            RuntimeError: the process that holds the store is gone.
        """
        return self._store.get(self._key("reason")).decode() if self._store.check([self._key("reason")]) else ""

    def freeze(self) -> None:
        """From now on answer no more questions about later steps before the ranks have agreed."""
        with self._lock:
            self._is_frozen = True

    def agree(self, reason: str, sleep: Callable[[float], bool]) -> bool:
        """Agree with the other ranks; return whether to stop at once, since no rank asks about steps.

        Args:
            reason: why this rank stops.
            sleep: sleeps for some seconds; false if the agreement is not wanted any more.
        """
        try:
            self._store.set(self._key("reason"), reason)
            self._store.set(self._key(f"step/{self._rank}"), str(self._answered))
            if self._rank == self._root:
                keys = [self._key(f"step/{rank}") for rank in range(self._size)]
                if self._wait_for(keys, sleep):
                    latest = max(int(self._store.get(key)) for key in keys)
                    self._store.set(self._key("at"), str(latest + 1))
            if self._wait_for([self._key("at")], sleep):
                self._at = int(self._store.get(self._key("at")))
                self._decided.set()
                return self._at == 0
        except RuntimeError as error:
            log.warning("the ranks cannot agree on a step to stop at: %s", error)
            self._decided.set()
        return False

    def _key(self, part: str) -> str:
        return f"{self._name}/{part}"

    def _wait_for(self, keys: list[str], sleep: Callable[[float], bool]) -> bool:
        while not self._store.check(keys):
            if not sleep(pace(_POLL_S, self._size)):
                return False
        return True

    def stops_at(self, step: int) -> bool:
        """Whether to stop at a step, or at one before. Waits for the ranks to agree, once it is frozen."""
        with self._lock:
            if not self._is_frozen and step > self._answered:
                self._answered = step
                return False
            if not self._decided.is_set() and step <= self._answered:
                return False
        if not self._decided.wait(AGREE_TIMEOUT_S):
            log.error("stopping at step %d: the ranks have not agreed on one within %.0f s", step, AGREE_TIMEOUT_S)
            self._at = step
        return step >= self._at

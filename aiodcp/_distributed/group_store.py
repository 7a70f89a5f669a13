"""The store of a process group, used beside the training: no call of ours waits in it for other ranks.

A connection to a store answers one call after the other, and who waits in it for a key keeps all other users of it
waiting. So keys are looked for again and again instead, also on behalf of gloo. To make another connection is left
until there is need to: torch asks the name server for the other end's name each time, and that takes 5 s where it does
not answer.
"""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any

from torch._C._distributed_c10d import PrefixStore, Store

from .._engine.interpreter_exit import finish_at_exit
from .._engine.threads import start_thread
from .._log import SafeLogger

log = SafeLogger(__name__)

LOOKS_A_SECOND = 10_000  # of all ranks: a store answers some tens of thousands

_FIRST_LOOK_S, _LAST_LOOK_S = 0.0005, 0.02


class GroupStore(Store):
    """A store as torch's groups take it, on a connection that others use, too, until there is one of its own."""

    def __init__(self, shared: Any, size: int) -> None:
        """Begin on the connection of a process group's store, which torch does not type; `size` ranks do so."""
        super().__init__()
        self._shared = shared
        self._size = size
        self._own: Any = None
        self._lock = threading.Lock()
        self._connecting: threading.Thread | None = None

    @property
    def underlying_store(self) -> Any:
        """The process group's."""
        return self._shared

    def under(self, prefix: str) -> PrefixStore:
        """Return it under a prefix."""
        return _Prefixed(prefix, self)

    def take_own_connection(self) -> None:
        """Connect, in a thread, unless that is done: from then on no call waits for the training's."""
        with self._lock, suppress(RuntimeError):  # no memory for a thread: the next call tries again
            if self._connecting is None:
                self._connecting = start_thread("ranks", self._connect)
                finish_at_exit(self._connecting)

    def _connect(self) -> None:
        try:
            self._own = self._shared.clone()
        except RuntimeError as error:
            log.debug("no connection of its own to the store: %s", error)

    @property
    def _connection(self) -> Any:
        return self._own if self._own is not None else self._shared

    def set(self, key: str, value: str | bytes) -> None:
        self._connection.set(key, value)

    def get(self, key: str) -> bytes:
        self.wait([key])
        value: bytes = self._connection.get(key)
        return value

    def add(self, key: str, value: int) -> int:
        count: int = self._connection.add(key, value)
        return count

    def check(self, keys: list[str]) -> bool:
        found: bool = self._connection.check(keys)
        return found

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        value: bytes = self._connection.compare_set(key, expected, desired)
        return value

    def multi_get(self, keys: list[str]) -> list[bytes]:
        """Return what is under keys that are there: for others it would wait in the store."""
        values: list[bytes] = self._connection.multi_get(keys)
        return values

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """Wait until keys are there.

        Raises:
            RuntimeError: some are not, after `timeout`; by default after the store's own.
        """
        limit_s = (timeout if timeout is not None else self._shared.timeout).total_seconds()
        until = time.monotonic() + limit_s
        look_s = _FIRST_LOOK_S
        while not self.check(keys):
            if time.monotonic() > until:
                raise RuntimeError(f"not in the store after {limit_s} s: {', '.join(keys)}")
            time.sleep(look_s)
            look_s = min(2 * look_s, max(_LAST_LOOK_S, self._size / LOOKS_A_SECOND))


class Rendezvous(Store):
    """Where the ranks of a gloo group leave their addresses, each under its number: all are fetched together.

    gloo asks for one after the other, and each time looks, waits and gets: four round trips a rank.
    """

    def __init__(self, store: Any, rank: int, size: int) -> None:
        """Begin for one of `size` ranks; `store` is a `PrefixStore`, of which torch types the constructor only."""
        super().__init__()
        self._store = store
        self._rank = rank
        self._size = size
        self._keys: list[str] = []  # of all ranks, once this one has set its own
        self._found: dict[str, bytes] = {}

    def set(self, key: str, value: str | bytes) -> None:
        self._store.set(key, value)
        stem, slash, number = key.rpartition("/")
        if number == str(self._rank):
            self._keys = [f"{stem}{slash}{rank}" for rank in range(self._size)]

    def get(self, key: str) -> bytes:
        self.wait([key])
        value: bytes = self._found[key] if key in self._found else self._store.get(key)
        return value

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """As `GroupStore.wait`, for all ranks as soon as for one of them."""
        limit = () if timeout is None else (timeout,)
        if not {*keys} <= {*self._keys}:
            self._store.wait(keys, *limit)
        elif not self._found:
            self._store.wait(self._keys, *limit)
            self._found = dict(zip(self._keys, self._store.multi_get(self._keys), strict=True))


class _Prefixed(PrefixStore):
    """Keeps what it is a prefix of: torch keeps only the C++ part of that."""

    def __init__(self, prefix: str, store: GroupStore) -> None:
        super().__init__(prefix, store)
        self._store = store

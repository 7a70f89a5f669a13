"""The handshake of a save: its turn comes from the engine, and the captured state goes to it."""

from __future__ import annotations

from enum import Enum
from typing import Generic, TypeVar

from .._engine.milestone import MilestoneSource
from .caller_loop import HandOver

T = TypeVar("T")


class HandshakeState(Enum):
    """Where a handshake stands."""

    WAITING = "waiting for its turn"
    HAS_TURN = "being captured"
    CAPTURED = "captured"
    FAILED = "failed"


class Handshake(Generic[T]):
    """One save between the caller's event loop, on which this is made, and the engine's.

        waiting --give_turn--> has turn --hand_over--> captured
             \\                       \\
              `--------- fail ---------`-------------> failed
    """

    def __init__(self) -> None:
        self._turn = MilestoneSource("turn")
        self._captured: HandOver[T] = HandOver()
        self._is_captured = False

    def __repr__(self) -> str:
        return f"<Handshake {self.state.value}>"

    @property
    def state(self) -> HandshakeState:
        """Where it stands; may be another one a moment later."""
        if self._captured.is_over():
            return HandshakeState.CAPTURED if self._is_captured else HandshakeState.FAILED
        return HandshakeState.HAS_TURN if self._turn.done() else HandshakeState.WAITING

    # --- on the caller's loop

    async def wait_for_turn(self) -> None:
        """Wait until the engine gives the turn.

        Raises:
            Exception: the error of `fail`.

        Cancellation: ends the wait; whoever is cancelled calls `fail`.
        """
        await self._turn.reached()

    def hand_over(self, captured: T) -> bool:
        """Give the engine what was captured; return False if it has failed meanwhile."""
        self._is_captured = self._captured.give(captured)
        return self._is_captured

    # --- on the engine's loop

    def give_turn(self) -> None:
        """Let the caller capture its state."""
        self._turn.reach()

    async def wait_for_capture(self) -> T:
        """Wait for what the caller captures.

        Raises:
            SaveError: the caller's event loop is gone.
            Exception: the error of `fail`.
        """
        return await self._captured.wait()

    # --- from any thread

    def fail(self, error: Exception) -> None:
        """Raise `error` on both sides, where they wait or will wait. After the capture it does nothing."""
        self._turn.fail(error)
        self._captured.fail(error)

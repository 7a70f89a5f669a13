"""A staging copy that takes its time."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from aiodcp._save.staging import Staging


class SlowCopy:
    """Holds the copy of the last segment of every save until it is let go, as a large one would take its time."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.reached = threading.Event()
        self.let_go = threading.Event()
        copy = Staging.copy

        def held(stage: Staging, number: int, *args: Any) -> Any:
            if number == len(stage.layout.segments) - 1:
                self.reached.set()
                assert self.let_go.wait(30)
            return copy(stage, number, *args)

        patch.setattr(Staging, "copy", held)

"""The cycle collector held off."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def gc_paused() -> Iterator[None]:
    """Hold off the cycle collector while many objects are made that all stay.

    Measured, 10,000 tensors: 0.04 s, against 0.16-0.34 s with full collections in between, each of which would
    also hold the GIL.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()

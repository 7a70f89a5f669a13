"""Where payloads and segments begin in a data file, in bytes."""

from __future__ import annotations

ALIGNMENT = 64
"""Bytes: where payloads begin, in the file as in the arena. `torch.load(mmap=True)` and vector copies want it."""

BLOCK = 4096
"""Bytes: where segments begin; what O_DIRECT asks for."""


def round_up(nbytes: int, multiple: int) -> int:
    return -(-nbytes // multiple) * multiple

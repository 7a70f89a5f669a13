"""The collector held off, and what it looks at afterwards."""

from __future__ import annotations

import gc

import pytest

from aiodcp._engine.gc_pause import LONG, MANY, gc_paused


@pytest.mark.parametrize(("frozen", "is_told"), [(0, True), (375, True), (200_000, False)])
def test_many_new_objects_count_as_old_afterwards_unless_the_caller_has_frozen_his_own(
    frozen: int, is_told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gc, "get_freeze_count", lambda: frozen)
    froze: list[int] = []
    monkeypatch.setattr(gc, "freeze", lambda: froze.append(gc.get_count()[0]))
    with gc_paused():
        made = [[number] for number in range(2 * MANY)]
        assert gc.get_count()[0] > MANY
    assert len(froze) == is_told
    assert len(made) == 2 * MANY


@pytest.mark.parametrize("length", [0, LONG, LONG + 1])
def test_long_lists_count_as_old_afterwards(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    froze: list[bool] = []
    monkeypatch.setattr(gc, "freeze", lambda: froze.append(True))
    with gc_paused(length):
        pass
    assert len(froze) == (length > LONG)

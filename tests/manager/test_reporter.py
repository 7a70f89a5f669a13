"""What a manager tells besides its events: spans for OpenTelemetry, bars on a terminal."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from aiodcp import Checkpointer, CheckpointManager, NotACheckpointError, WriteError
from aiodcp._telemetry import progress_bar
from aiodcp._telemetry.otel import SpanExporter
from aiodcp._telemetry.progress_bar import NoBar, RichBar, bar
from aiodcp.testing import FaultyStorage

from ..support.states import blank, make_state


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    return exporter


async def test_saves_and_loads_are_spans_below_the_callers(spans: InMemorySpanExporter, faulty: FaultyStorage) -> None:
    tracer = trace.get_tracer("test")
    async with CheckpointManager("root", checkpointer=Checkpointer(storage=faulty), history=False) as manager:
        with tracer.start_as_current_span("training step"):
            ckpt = await manager.save(3, make_state(3))
        assert ckpt is not None
        await ckpt
        await manager.restore(blank(make_state(3)))
        faulty.fail_once = OSError(28, "No space left on device")
        ckpt = await manager.save(4, make_state(4))
        assert ckpt is not None
        with pytest.raises(WriteError):
            await ckpt
        async with manager.checkpoint(5) as joint:
            joint.add("a", make_state(1))
            joint.add("b", make_state(2))
        with pytest.raises(NotACheckpointError):
            await manager.restore({}, 99)
    found: dict[str, list[Any]] = {}
    for span in spans.get_finished_spans():
        found.setdefault(span.name, []).append(span)
    saved, failed, joined = found["aiodcp.save"]
    [step] = found["training step"]
    assert saved.parent.span_id == step.context.span_id
    assert saved.attributes["aiodcp.step"] == 3
    assert saved.attributes["aiodcp.nbytes"] > 0
    assert saved.status.is_ok or saved.status.is_unset
    assert not failed.status.is_ok
    assert "No space left" in failed.status.description
    assert joined.attributes["aiodcp.nbytes"] > saved.attributes["aiodcp.nbytes"]
    for phase in ("capture", "plan", "stage", "checksum", "write", "vote", "commit"):
        child = found[f"aiodcp.save.{phase}"][0]
        assert child.parent.span_id == saved.context.span_id
        assert saved.start_time <= child.start_time <= child.end_time <= saved.end_time
    restored, missed = found["aiodcp.restore"]
    assert restored.attributes["aiodcp.step"] == 3
    assert "no committed checkpoint" in missed.status.description


def test_without_opentelemetry_nothing_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    telemetry = SpanExporter()
    assert telemetry.here() is None
    telemetry.export("aiodcp.save", None, 0.0, {})


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


async def test_a_bar_is_shown_on_a_terminal_for_what_takes_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress_bar, "SHOWN_AFTER_S", 0.0)
    for progress, terminal in ((True, Terminal()), (False, Terminal()), (True, io.StringIO())):
        monkeypatch.setattr(sys, "stderr", terminal)
        async with CheckpointManager(tmp_path, progress=progress) as manager:
            await manager.save(3, make_state(3))
        async with CheckpointManager(tmp_path, progress=progress) as manager:
            await manager.restore(blank(make_state(3)))
        for text in ("saving step 3", "loading step 3"):
            assert (text in terminal.getvalue()) is (progress and isinstance(terminal, Terminal))


def test_what_is_over_soon_needs_no_bar_and_a_terminal_has_room_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with bar("quick") as shown:
        shown.total(10)
        shown.advance(10)
    assert terminal.getvalue() == ""
    monkeypatch.setattr(progress_bar, "SHOWN_AFTER_S", 0.0)
    with bar("first") as first, bar("second") as second:
        assert isinstance(first, RichBar)
        first.total(10)
        first.advance(5)
        second.advance(5)
    assert "first" in terminal.getvalue()
    assert "second" not in terminal.getvalue()
    with bar("third") as third:
        third.advance(5)
    assert "third" in terminal.getvalue()


def test_without_rich_there_is_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setitem(sys.modules, "rich", None)
    with bar("none") as shown:
        assert isinstance(shown, NoBar)
        shown.total(1)
        shown.advance(1)

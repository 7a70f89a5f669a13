"""Each save tells what it did and when; all of them together are a trace."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from aiodcp import Checkpointer, Span, Timeline, WriteError
from aiodcp._telemetry.trace import KEPT_STEPS, Trace
from aiodcp.testing import FaultyStorage, Gate

from ..support.ranks import World
from ..support.states import make_state


def _timeline(*spans: tuple[str, float, float]) -> Timeline:
    made = Timeline()
    made._spans += [Span(name=name, began_s=began, ended_s=ended) for name, began, ended in spans]
    return made


async def test_a_timeline_holds_every_phase_in_its_place(tmp_path: Path) -> None:
    state = {f"w{n}": torch.ones(3 << 20) for n in range(8)}
    async with Checkpointer() as checkpointer:
        for _ in range(2):
            before = time.perf_counter()
            ckpt = await checkpointer.save(state, tmp_path)
            assert ckpt.timeline.between("commit") is None
            await ckpt.uploaded
            after = time.perf_counter()
            at: dict[str, tuple[float, float]] = {}
            for name in ("capture", "plan", "stage", "checksum", "write", "vote", "commit"):
                span = ckpt.timeline.between(name)
                assert span is not None, name
                at[name] = span
                assert before <= span[0] <= span[1] <= after
            assert at["capture"][1] <= at["plan"][0]
            assert at["plan"][1] <= at["stage"][0]
            assert at["stage"][0] <= at["checksum"][0] <= at["write"][0]
            assert at["stage"][1] <= at["write"][1] <= at["vote"][0]
            assert at["vote"][1] <= at["commit"][0]
            parts = [span for span in ckpt.timeline.spans if span.name == "stage"]
            written = [span for span in ckpt.timeline.spans if span.name == "write"]
            assert len(written) == len(parts) + 1 > 3  # the last is the table of all items
            assert ckpt.timeline.held_s == pytest.approx(at["capture"][1] - at["capture"][0])
            assert "commit" in repr(ckpt.timeline)


async def test_a_fence_counts_as_held(faulty: FaultyStorage) -> None:
    async with Checkpointer(storage=faulty) as checkpointer:
        ckpt = await checkpointer.save(make_state(), "a")
        ckpt.fence()
        assert ckpt.staged.done()
        await ckpt.uploaded
        held = {span.name: span.ended_s - span.began_s for span in ckpt.timeline.spans}
        assert ckpt.timeline.held_s == pytest.approx(held["capture"] + held.get("fence", 0.0))
        count = len(ckpt.timeline.spans)
        ckpt.fence()  # nothing to wait for
        assert len(ckpt.timeline.spans) == count


async def test_a_failed_save_reports_how_far_it_came(faulty: FaultyStorage) -> None:
    async with Checkpointer(storage=faulty) as checkpointer:
        gate = Gate("write")
        faulty.gate = gate
        ckpt = await checkpointer.save(make_state(), "a")
        await gate.wait_reached()
        ckpt.cancel()
        gate.open()
        with pytest.raises(Exception, match="cancelled"):
            await ckpt.uploaded
        assert ckpt.timeline.between("stage")
        assert ckpt.timeline.between("vote") is None
        assert ckpt.timeline.between("commit") is None


def test_times_that_overlap_are_counted_once() -> None:
    timeline = _timeline(("write", 1.0, 3.0), ("write", 2.0, 4.0), ("write", 6.0, 7.0), ("stage", 0.0, 1.0))
    assert timeline.seconds("write") == 4.0
    assert timeline.between("write") == (1.0, 7.0)
    assert timeline.under("write", [(0.0, 2.0), (1.5, 2.5), (6.5, 9.0)]) == (1.5 + 0.5) / 4.0
    assert timeline.under("write", []) == 0.0
    assert timeline.under("commit", []) == 1.0
    assert [span.name for span in timeline.spans] == ["stage", "write", "write", "write"]


def _check_trace(path: Path, rank: int) -> list[dict[str, Any]]:
    """What a viewer asks of a trace: known phases, times that are not negative, spans of a lane that do not overlap."""
    events: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
    ended: dict[int, float] = {}
    assert {event["ph"] for event in events} == {"M", "X"}
    assert {event["pid"] for event in events} == {rank}
    for event in events:
        if event["ph"] == "X":
            assert event["dur"] >= 0
            assert abs(event["ts"] / 1e6 - time.time()) < 600
            assert event["ts"] >= ended.get(event["tid"], 0.0) - 0.001
            ended[event["tid"]] = event["ts"] + event["dur"]
    return events


async def test_a_trace_shows_saves_and_steps(tmp_path: Path) -> None:
    state = {f"w{n}": torch.ones(3 << 20) for n in range(8)}
    async with Checkpointer() as checkpointer:
        for number in range(3):
            with checkpointer.step(number):
                state["w0"] += 1
            await (await checkpointer.save(state, tmp_path / str(number))).uploaded
        checkpointer.write_trace(tmp_path / "trace.json")
    events = _check_trace(tmp_path / "trace.json", rank=0)
    names = [event["name"] for event in events if event["ph"] == "X"]
    assert [name for name in names if name.startswith("step")] == ["step 0", "step 1", "step 2"]
    for phase in ("capture", "plan", "vote", "commit"):
        assert names.count(phase) == 3
    assert names.count("stage") + 3 == names.count("write") > 9
    rows = [event["args"]["name"] for event in events if event["name"] == "thread_name"]
    assert rows[:2] == ["step", "capture"]
    places = {event["args"]["checkpoint_id"] for event in events if event["name"] == "commit"}
    assert places == {str(tmp_path / str(number)) for number in range(3)}


def test_spans_that_overlap_lie_in_lanes_of_their_own() -> None:
    trace = Trace()
    trace.add("a", _timeline(("write", 1.0, 3.0), ("write", 2.0, 4.0), ("write", 3.0, 5.0)))
    events = json.loads(trace.render(rank=0))["traceEvents"]
    lanes = [event["tid"] for event in events if event["ph"] == "X"]
    assert sorted(lanes) == [0, 0, 1]


def test_a_trace_forgets_the_oldest_steps() -> None:
    trace = Trace()
    for number in range(KEPT_STEPS + 5):
        with trace.step(number):
            pass
    names = [event["name"] for event in json.loads(trace.render(rank=0))["traceEvents"] if event["ph"] == "X"]
    assert len(names) == KEPT_STEPS
    assert names[0] == "step 5"


def _trace_of(rank: int, size: int, folder: Path) -> None:
    async def main() -> None:
        async with Checkpointer() as checkpointer:
            await (await checkpointer.save(make_state(), folder / "ckpt")).uploaded
            checkpointer.write_trace(folder / f"trace-{rank}.json")

    asyncio.run(main())


def test_every_rank_has_a_trace_of_its_own(world: World, tmp_path: Path) -> None:
    world.run(2, _trace_of, tmp_path)
    for rank in range(2):
        events = _check_trace(tmp_path / f"trace-{rank}.json", rank)
        assert events[0]["args"]["name"] == f"rank {rank}"
        assert any(event["name"] == "commit" for event in events)


async def test_a_trace_that_cannot_be_written_is_reported_with_its_path(faulty: FaultyStorage, tmp_path: Path) -> None:
    async with Checkpointer(storage=faulty) as checkpointer:
        with pytest.raises(WriteError, match=r"no-such-folder/trace\.json"):
            checkpointer.write_trace(tmp_path / "no-such-folder" / "trace.json")

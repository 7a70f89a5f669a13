"""A host memory budget smaller than the checkpoint: the same file, through a few windows."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from aiodcp import ArgumentError, Checkpointer, SaveCancelled, StageError, TornSnapshotError, WriteError
from aiodcp._engine.device_copies import DeviceCopies
from aiodcp._engine.host_memory import Arena
from aiodcp._format.alignment import BLOCK
from aiodcp._format.layout import Layout, lay_out
from aiodcp._save import pipeline
from aiodcp._save.bounded_staging import MIN_NBYTES, BoundedStaging
from aiodcp._save.staging import Staging
from aiodcp._save.window_plan import plan_windows
from aiodcp._state.element_views import element_views
from aiodcp.testing import FaultyStorage, Gate

from ..support.ranks import World
from ..support.states import assert_equal, blank, make_state

SLOT = 16 * BLOCK


def _tensors(*nbytes: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(nbytes))
    return [torch.randint(256, (size,), generator=generator, dtype=torch.uint8) for size in nbytes]


def _layout(tensors: list[torch.Tensor]) -> Layout:
    return lay_out([(tensor.dtype, tuple(tensor.shape)) for tensor in tensors])


def _whole(layout: Layout, tensors: list[torch.Tensor]) -> bytes:
    """The file as it is made where memory holds all of it."""
    stage = Staging(layout, range(len(tensors)), 0)
    for number in range(len(layout.segments)):
        stage.copy(number, tensors, DeviceCopies())
        stage.checksum(number, zlib.crc32)
    return bytes(stage.arena.memory[: layout.tail])


def _in_windows(layout: Layout, tensors: list[torch.Tensor], *, late: int) -> bytes:
    """The same file from windows, each written and let go `late` windows after it was sealed."""
    windows = BoundedStaging(layout, range(len(tensors)), MIN_NBYTES, largest=SLOT)
    assert windows.arena.nbytes <= MIN_NBYTES
    windows.arena.memory[:] = b"\xff" * windows.arena.nbytes  # what nobody wrote is seen
    file = bytearray(b"\xee" * layout.tail)
    written = bytearray(layout.tail)
    waiting: list[tuple[int, Any]] = []
    for number in range(len(windows)):
        windows.copy(number, tensors, DeviceCopies())
        waiting.append((number, windows.seal(number, zlib.crc32)))
        while len(waiting) > (late if number < len(windows) - 1 else 0):
            done, ranges = waiting.pop(0)
            for offset, data in ranges:
                assert offset % BLOCK == 0
                assert data.nbytes % BLOCK == 0
                file[offset : offset + data.nbytes] = data
                for block in range(offset, offset + data.nbytes, BLOCK):
                    assert not written[block], "a block is written once"
                    written[block] = 1
            windows.release(done)
    assert sum(windows.nbytes(number) for number in range(len(windows))) == layout.tail
    return bytes(file)


SHAPES = {
    "small": [100] * 700,
    "one that fits": [SLOT - 2 * BLOCK],
    "one that just does not": [SLOT - BLOCK],
    "one large": [10 * SLOT + 77],
    "large ones": [3 * SLOT, 2 * SLOT + 1, 5 * SLOT - 999],
    "large at the end of a window": [SLOT - 5000, 3 * SLOT, 10, SLOT - 1500, 4 * SLOT],
    "mixed": [10, 3 * SLOT, 5, 5, SLOT // 2, SLOT // 2, 7 * SLOT, 0, 1, 64, 4096, 0],
    "empty": [0, 0, 0],
    "several segments": [20 << 20, 3, 20 << 20, 5],
}


@pytest.mark.parametrize("late", [0, 3])
@pytest.mark.parametrize("nbytes", SHAPES.values(), ids=SHAPES)
def test_windows_make_the_same_file(nbytes: list[int], late: int) -> None:
    tensors = _tensors(*nbytes)
    layout = _layout(tensors)
    assert _in_windows(layout, tensors, late=late) == _whole(layout, tensors)


def test_windows_make_the_same_file_whatever_the_sizes() -> None:
    generator = torch.Generator().manual_seed(5)
    for _ in range(40):
        count = int(torch.randint(1, 60, (1,), generator=generator))
        sizes = (2 ** (torch.rand(count, generator=generator) * 18)).long().tolist()
        tensors = _tensors(*sizes)
        layout = _layout(tensors)
        assert _in_windows(layout, tensors, late=3) == _whole(layout, tensors), sizes


def test_a_window_is_never_larger_than_its_slot() -> None:
    for nbytes in SHAPES.values():
        position = 0
        for window in plan_windows(_layout(_tensors(*nbytes)), SLOT):
            assert window.start % BLOCK == 0
            assert window.start <= window.first == position
            assert window.stop - window.start <= SLOT
            position = window.stop


def _views() -> Iterator[torch.Tensor]:
    whole = torch.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    yield whole
    yield whole.transpose(0, 3)
    yield whole.permute(2, 0, 3, 1)
    yield whole[:, 1:, ::2]
    yield whole[:, :1].expand(2, 6, 4, 5)
    yield torch.arange(7)[::2]
    yield torch.tensor(3)
    yield torch.zeros(0, 4).t()


def test_strips_are_the_elements_in_order() -> None:
    for tensor in _views():
        flat = tensor.reshape(-1)
        for start in range(len(flat) + 1):
            for stop in range(start, len(flat) + 1, 7):
                strips = list(element_views(tensor, start, stop))
                assert torch.equal(torch.cat([flat[:0], *(each.reshape(-1) for each in strips)]), flat[start:stop])
                assert all(each.numel() == 0 or each.data_ptr() >= tensor.data_ptr() for each in strips)
                assert len(strips) <= 2 * tensor.dim() + 1


@pytest.fixture
def budgets(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of all arenas that a test takes."""
    taken: list[int] = []
    real = Arena.__init__

    def init(arena: Arena, nbytes: int) -> None:
        taken.append(nbytes)
        real(arena, nbytes)

    monkeypatch.setattr(Arena, "__init__", init)
    return taken


def _large_state() -> dict[str, Any]:
    """Four times `MIN_NBYTES`, in what real states are made of."""
    generator = torch.Generator().manual_seed(3)
    return {
        **make_state(3),
        "small": [torch.randn(50 + n, generator=generator) for n in range(600)],
        "many": [torch.randn(80_000 + n, generator=generator) for n in range(12)],  # each larger than a slot
        "large": torch.randn(500, 1000, generator=generator),
        "turned": torch.randn(300, 500, generator=generator).t(),
        "half": torch.randn(4, 100_000, generator=generator).to(torch.bfloat16)[:, ::2],
        "complex": torch.view_as_complex(torch.randn(60_000, 2, generator=generator)).conj(),
        "notes": "x" * 300_000,
    }


@pytest.mark.parametrize("prepare", [False, True])
async def test_a_state_of_four_times_the_budget_is_saved_and_loaded_equal(
    tmp_path: Path, budgets: list[int], prepare: bool
) -> None:
    state = _large_state()
    async with Checkpointer(max_host_bytes=MIN_NBYTES) as checkpointer:
        if prepare:
            await checkpointer.prepare(state)
        for number in range(2):
            state["large"] += 1
            ckpt = await checkpointer.save(state, tmp_path / str(number))
            await ckpt.staged
            kept = state["large"].clone()
            state["large"] += 1
            await ckpt.uploaded
            assert ckpt.progress.bytes_total > 4 * MIN_NBYTES
            assert ckpt.progress.bytes_staged == ckpt.progress.bytes_written == ckpt.progress.bytes_total
            assert sum(budgets) <= MIN_NBYTES
            state["large"] = kept
    budgets.clear()
    async with Checkpointer() as checkpointer:
        target = blank(state)
        await checkpointer.load(target, tmp_path / "1")
    assert_equal(state, target)
    plain = {"large": torch.zeros(500, 1000), "turned": torch.zeros(500, 300)}
    dcp.load(plain, checkpoint_id=tmp_path / "1")
    assert_equal(plain, {"large": state["large"], "turned": state["turned"].contiguous()})


async def test_a_budget_that_is_enough_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "BoundedStaging", None)
    async with Checkpointer(max_host_bytes=1 << 20) as checkpointer:
        await (await checkpointer.save(make_state(), tmp_path)).uploaded


async def test_staged_comes_when_the_last_window_is_copied(faulty: FaultyStorage) -> None:
    gate = Gate("write")
    async with Checkpointer(storage=faulty, max_host_bytes=MIN_NBYTES) as checkpointer:
        faulty.gate = gate
        ckpt = await checkpointer.save(_large_state(), "a")
        await gate.wait_reached()
        async for progress in ckpt.events():
            if progress.bytes_staged >= MIN_NBYTES // 2:
                break
        assert not ckpt.staged.done()
        gate.open()
        await ckpt.staged
        await ckpt.uploaded


def _no_space(call: str) -> None:
    if call == "write":
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("how", ["cancel", "fail", "torn"])
async def test_a_save_that_ends_among_its_windows_leaves_nothing_and_the_next_one_works(
    faulty: FaultyStorage, how: str
) -> None:
    state = _large_state()
    errors = {"cancel": SaveCancelled, "fail": WriteError, "torn": TornSnapshotError}
    async with Checkpointer(storage=faulty, max_host_bytes=MIN_NBYTES) as checkpointer:
        for _ in range(9):  # more often than there are blocks to hold back
            gate = Gate("write")
            faulty.gate = gate
            ckpt = await checkpointer.save(state, "a")
            await gate.wait_reached()
            if how == "cancel":
                ckpt.cancel()
            elif how == "torn":
                state["small"][0].add_(1)
            else:
                faulty.gate = _no_space
            gate.open()
            with pytest.raises(errors[how]):
                await ckpt.uploaded
            assert not faulty.files.get("a")
        faulty.gate = lambda call: None
        await (await checkpointer.save(state, "a")).uploaded
        target = blank(state)
        await checkpointer.load(target, "a")
        assert_equal(state, target)


@pytest.mark.parametrize("value", [0, -1, MIN_NBYTES - 1, 1e9, True])
def test_a_budget_too_small_to_be_one_is_refused(value: Any) -> None:
    with pytest.raises(ArgumentError, match="max_host_bytes"):
        Checkpointer(max_host_bytes=value)


async def test_memory_that_cannot_be_had_is_an_error_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aiodcp._engine.host_memory.free_nbytes", lambda: 1000)
    monkeypatch.setattr("aiodcp._engine.host_memory.SMALL_NBYTES", 0)
    async with Checkpointer() as checkpointer:
        ckpt = await checkpointer.save(_large_state(), tmp_path / "ckpt")
        with pytest.raises(StageError, match=r"cannot stage \d{7} bytes: only 1000 bytes of host memory are free"):
            await ckpt.staged
        with pytest.raises(StageError):
            await ckpt.uploaded
    assert not (tmp_path / "ckpt").exists()


def _save_with_a_budget_on_one_rank(rank: int, size: int, path: Path) -> int:
    async def main() -> int:
        state = {f"w{n}": torch.full((1 << 20,), float(n)) for n in range(4)}
        async with Checkpointer(max_host_bytes=MIN_NBYTES if rank == 1 else None) as checkpointer:
            ckpt = await checkpointer.save(state, path)
            await ckpt.uploaded
            target = blank(state)
            await checkpointer.load(target, path)
            assert_equal(state, target)
            return ckpt.progress.bytes_total

    return asyncio.run(main())


def test_each_rank_has_a_budget_of_its_own(world: World, tmp_path: Path) -> None:
    totals = world.run(2, _save_with_a_budget_on_one_rank, tmp_path / "ckpt")
    assert min(totals) > 4 * MIN_NBYTES

"""On a CUDA device; skipped without one."""

import logging
from pathlib import Path

import pytest
import torch

import aiodcp._arena
from aiodcp import Checkpointer, TornSnapshotError
from aiodcp._stage import Stage
from aiodcp._windows import MIN_NBYTES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


async def test_tensors_on_a_device_come_back_bit_for_bit(tmp_path: Path) -> None:
    state = {f"w{n}": torch.randn(1000 + n, 300, device="cuda") for n in range(20)}
    target = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    async with Checkpointer() as checkpointer:
        checkpoint = await checkpointer.save(state, tmp_path)
        await checkpoint.staged
        kept = {name: tensor.clone() for name, tensor in state.items()}
        for tensor in state.values():
            tensor.zero_()
        await checkpoint.uploaded
        await checkpointer.load(target, tmp_path)
    for name, tensor in kept.items():
        assert torch.equal(tensor, target[name])


async def test_what_was_computed_on_a_side_stream_before_the_save_is_saved(tmp_path: Path) -> None:
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    tensor = torch.zeros(1 << 20, device="cuda")
    torch.cuda.synchronize()
    async with Checkpointer() as checkpointer:
        await checkpointer.prepare({"w": tensor})
        with torch.cuda.stream(stream):
            torch.cuda._sleep(200_000_000)  # type: ignore[no-untyped-call] # a tenth of a second of nothing
            tensor.fill_(7.0)
            checkpoint = await checkpointer.save({"w": tensor}, tmp_path)
        await checkpoint.uploaded
        target = {"w": torch.zeros(1 << 20)}
        await checkpointer.load(target, tmp_path)
    assert torch.equal(target["w"], torch.full((1 << 20,), 7.0))


async def test_a_checkpoint_moves_between_devices(tmp_path: Path) -> None:
    state = {"w": torch.randn(500, 500, device="cuda")}
    async with Checkpointer() as checkpointer:
        await (await checkpointer.save(state, tmp_path)).uploaded
        on_cpu = {"w": torch.zeros(500, 500)}
        await checkpointer.load(on_cpu, tmp_path)
        back = {"w": torch.zeros(500, 500, device="cuda")}
        await checkpointer.load(back, tmp_path)
    assert torch.equal(on_cpu["w"], state["w"].cpu())
    assert torch.equal(back["w"], state["w"])


async def test_a_fence_lets_the_next_step_be_queued_behind_the_copy(tmp_path: Path) -> None:
    state = {f"w{n}": torch.zeros(4 << 20, device="cuda") for n in range(8)}
    async with Checkpointer() as checkpointer:
        await checkpointer.prepare(state)
        for number in range(5):
            ckpt = await checkpointer.save(state, tmp_path / str(number))
            ckpt.fence()
            for tensor in state.values():
                tensor.add_(1)
            await ckpt.uploaded
        for number in range(5):
            target = {name: torch.full_like(tensor, -1.0) for name, tensor in state.items()}
            await checkpointer.load(target, tmp_path / str(number))
            assert all(bool((tensor == number).all()) for tensor in target.values())


async def test_a_guarded_optimizer_steps_behind_the_copy(tmp_path: Path) -> None:
    model = torch.nn.Linear(2000, 2000, device="cuda")
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    async with Checkpointer() as checkpointer:
        checkpointer.guard(optimizer)
        for number in range(4):
            model(torch.randn(8, 2000, device="cuda")).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            ckpt = await checkpointer.save({"model": model, "optim": optimizer}, tmp_path / str(number))
            model(torch.randn(8, 2000, device="cuda")).square().mean().backward()
            optimizer.step()
            await ckpt.uploaded
            target = {"model": {name: torch.zeros_like(tensor) for name, tensor in kept.items()}}
            await checkpointer.load(target, tmp_path / str(number), strict=False)
            assert all(torch.equal(target["model"][name], tensor) for name, tensor in kept.items())


async def test_a_step_without_a_fence_is_torn(tmp_path: Path) -> None:
    tensor = torch.zeros(64 << 20, device="cuda")
    async with Checkpointer() as checkpointer:
        await checkpointer.prepare({"w": tensor})
        torch.cuda._sleep(1_000_000_000)  # type: ignore[no-untyped-call] # the copy waits half a second for its turn
        ckpt = await checkpointer.save({"w": tensor}, tmp_path)
        tensor.add_(1)
        with pytest.raises(TornSnapshotError):
            await ckpt.uploaded


async def test_many_small_tensors_cross_together(tmp_path: Path) -> None:
    state = {f"w{n}": torch.full((1000 + n % 7,), float(n), device="cuda" if n % 10 else "cpu") for n in range(3000)}
    async with Checkpointer() as checkpointer:
        await checkpointer.prepare(state)
        for number in range(3):
            ckpt = await checkpointer.save(state, tmp_path / str(number))
            ckpt.fence()
            torch._foreach_add_([tensor for tensor in state.values() if tensor.is_cuda], 1)
            await ckpt.uploaded
        room = checkpointer._saver._transfers[""]._room
        assert room is not None
        assert isinstance(room[1], Stage)
        assert room[1]._mirror is not None
        for number in range(3):
            target = {name: torch.full_like(tensor, -1.0) for name, tensor in state.items()}
            await checkpointer.load(target, tmp_path / str(number))
            for n, tensor in enumerate(target.values()):
                assert bool((tensor == n + (number if n % 10 else 0)).all())


async def test_memory_freed_right_after_the_fence_is_not_used_again_too_soon(tmp_path: Path) -> None:
    async with Checkpointer() as checkpointer:
        await checkpointer.prepare({"w": torch.zeros(16 << 20, device="cuda")})
        for number in range(5):
            state = {"w": torch.full((16 << 20,), float(number), device="cuda")}
            ckpt = await checkpointer.save(state, tmp_path)
            ckpt.fence()
            del state
            junk = [torch.full((16 << 20,), -1.0, device="cuda") for _ in range(4)]
            await ckpt.uploaded
            del junk
            target = {"w": torch.zeros(16 << 20)}
            await checkpointer.load(target, tmp_path)
            assert bool((target["w"] == number).all())


async def test_the_arena_is_pinned_and_let_go(tmp_path: Path) -> None:
    state = {"w": torch.randn(1 << 20, device="cuda")}
    for _ in range(3):  # to register again what was not released would be an error
        async with Checkpointer() as checkpointer:
            await checkpointer.prepare(state)
            room = checkpointer._saver._transfers[""]._room
            assert room is not None
            assert room[1].arena.tensor.is_pinned()
            del room
            await (await checkpointer.save(state, tmp_path)).uploaded


async def test_memory_that_cannot_be_pinned_is_told_once_and_used_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Refusing:
        def cudaHostRegister(self, *_: int) -> int:  # noqa: N802
            return 2

    monkeypatch.setattr(torch.cuda, "cudart", Refusing)
    monkeypatch.setattr(aiodcp._arena, "_warned", False)
    state = {"w": torch.randn(1 << 20, device="cuda")}
    with caplog.at_level(logging.WARNING, "aiodcp"):
        for _ in range(2):
            async with Checkpointer() as checkpointer:
                await (await checkpointer.save(state, tmp_path)).uploaded
                target = {"w": torch.zeros(1 << 20, device="cuda")}
                await checkpointer.load(target, tmp_path)
                assert torch.equal(target["w"], state["w"])
    assert len([record for record in caplog.records if "could not be pinned" in record.message]) == 1


async def test_windows_from_a_device(tmp_path: Path) -> None:
    state = {"large": torch.randn(3 << 20, device="cuda"), "turned": torch.randn(900, 1100, device="cuda").t()}
    target = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    async with Checkpointer(max_host_bytes=4 * MIN_NBYTES) as checkpointer:
        await (await checkpointer.save(state, tmp_path)).uploaded
        await checkpointer.load(target, tmp_path)
    assert all(torch.equal(target[name], tensor) for name, tensor in state.items())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
async def test_every_device_of_a_state_is_copied_in_its_own_order(tmp_path: Path) -> None:
    devices = [torch.device("cuda", n) for n in range(torch.cuda.device_count())]
    state = {str(device): torch.zeros(4 << 20, device=device) for device in devices}
    async with Checkpointer() as checkpointer:
        for number in range(3):
            ckpt = await checkpointer.save(state, tmp_path / str(number))
            ckpt.fence()
            for tensor in state.values():
                tensor.add_(1)
            await ckpt.uploaded
            target = {name: torch.full_like(tensor, -1.0) for name, tensor in state.items()}
            await checkpointer.load(target, tmp_path / str(number))
            assert all(bool((tensor == number).all()) for tensor in target.values())

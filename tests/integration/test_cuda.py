"""On a CUDA device; skipped without one."""

import asyncio
import gc
import logging
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from aiodcp import CaptureError, Checkpointer, SaveError, TornSnapshotError
from aiodcp._engine import device_copies, host_memory
from aiodcp._engine.device_copies import DeviceCopies
from aiodcp._save.bounded_staging import MIN_NBYTES
from aiodcp._save.staging import Staging
from aiodcp.checkpointer import drain, flows
from aiodcp.checkpointer.checkpointer import session_of

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
        buffer = session_of(checkpointer).saves._saver._pipelines[None]._buffer
        assert buffer is not None
        assert isinstance(buffer[1], Staging)
        assert buffer[1]._buffer is not None
        for number in range(3):
            target = {name: torch.full_like(tensor, -1.0) for name, tensor in state.items()}
            await checkpointer.load(target, tmp_path / str(number))
            for n, tensor in enumerate(target.values()):
                assert bool((tensor == n + (number if n % 10 else 0)).all())


async def test_small_tensors_of_all_dtypes_are_taken_apart_on_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtypes = [
        torch.float32,
        torch.bfloat16,
        torch.float8_e4m3fn,
        torch.uint16,
        torch.complex64,
        torch.bool,
        torch.int64,
    ]
    state = {
        f"{dtype} {n}": torch.randint(0, 2, (n % 50 + 1, 3), device="cuda").to(dtype)
        for n in range(300)
        for dtype in dtypes
    }
    taken: list[int] = []
    real = DeviceCopies.take_apart

    def take_apart(copies: DeviceCopies, whole: torch.Tensor, parts: Any, buffer: Any) -> list[torch.Event]:
        taken.append(sum(len(part.targets) for part in parts))
        return real(copies, whole, parts, buffer)

    monkeypatch.setattr(DeviceCopies, "take_apart", take_apart)
    target = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    target |= {name: target[name].cpu() for name in list(target)[::5]}
    async with Checkpointer() as checkpointer:
        await (await checkpointer.save(state, tmp_path)).uploaded
        await checkpointer.load(target, tmp_path)
    assert sum(taken) == len(state) - len(list(state)[::5])
    for name, tensor in state.items():
        assert torch.equal(tensor.cpu().view(torch.uint8), target[name].cpu().view(torch.uint8)), name


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
            buffer = session_of(checkpointer).saves._saver._pipelines[None]._buffer
            assert buffer is not None
            assert buffer[1].arena.tensor.is_pinned()
            del buffer
            await (await checkpointer.save(state, tmp_path)).uploaded


async def test_memory_that_cannot_be_pinned_is_reported_once_and_used_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = torch.cuda.cudart()  # type: ignore[no-untyped-call]

    class Refusing:
        def cudaHostRegister(self, *_: int) -> int:  # noqa: N802
            return 2

        def cudaHostUnregister(self, address: int) -> Any:  # noqa: N802
            return real.cudaHostUnregister(address)  # what an earlier test has pinned

    monkeypatch.setattr(torch.cuda, "cudart", Refusing)
    monkeypatch.setattr(host_memory, "_warned", False)
    state = {"w": torch.randn(1 << 20, device="cuda")}
    with caplog.at_level(logging.WARNING, "aiodcp"):
        for _ in range(2):
            async with Checkpointer() as checkpointer:
                await (await checkpointer.save(state, tmp_path)).uploaded
                target = {"w": torch.zeros(1 << 20, device="cuda")}
                await checkpointer.load(target, tmp_path)
                assert torch.equal(target["w"], state["w"])
    assert len([record for record in caplog.records if "could be pinned" in record.message]) == 1


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


async def test_every_stream_that_fences_waits(tmp_path: Path) -> None:
    tensor = torch.zeros(64 << 20, device="cuda")
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    async with Checkpointer() as checkpointer:
        await checkpointer.prepare({"w": tensor})
        torch.cuda._sleep(500_000_000)  # type: ignore[no-untyped-call]
        ckpt = await checkpointer.save({"w": tensor}, tmp_path)
        ckpt.fence()
        with torch.cuda.stream(side):
            ckpt.fence()
            tensor.add_(1)
        await ckpt.uploaded
        target = {"w": torch.ones(64 << 20)}
        await checkpointer.load(target, tmp_path)
    assert float(target["w"].abs().sum()) == 0


async def test_no_core_is_busy_while_a_save_waits_for_the_device(tmp_path: Path) -> None:
    state = {"w": torch.zeros(1 << 20, device="cuda")}
    async with Checkpointer() as checkpointer:
        await (await checkpointer.save(state, tmp_path)).uploaded
        torch.cuda._sleep(2_000_000_000)  # type: ignore[no-untyped-call] # a second of nothing
        ckpt = await checkpointer.save(state, tmp_path)
        began_s, cpu_s = time.perf_counter(), time.process_time()
        await ckpt.staged
        waited_s = time.perf_counter() - began_s
        assert time.process_time() - cpu_s < waited_s / 4
        await ckpt.uploaded


async def test_small_tensors_of_all_dtypes_and_strides_cross_together(tmp_path: Path) -> None:
    dtypes = [torch.float32, torch.bfloat16, torch.int64, torch.uint16, torch.uint32, torch.complex64]
    dtypes += [torch.complex32, torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.bool]
    state: dict[str, torch.Tensor] = {}
    for number in range(1000):
        data = torch.randint(2, (16 * (number % 7 + 1),), dtype=torch.uint8, device="cuda")
        state[f"w{number}"] = data.view(dtypes[number % len(dtypes)])
    state["turned"] = torch.randn(30, 40, device="cuda").t()
    state["conj"] = torch.randn(30, dtype=torch.complex64, device="cuda").conj()
    state["empty"] = torch.zeros(0, 3, device="cuda")
    state["host"] = torch.randn(7)
    async with Checkpointer() as checkpointer:
        for number in range(2):
            await (await checkpointer.save(state, tmp_path / str(number))).uploaded
            target = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
            await checkpointer.load(target, tmp_path / str(number))
            for name, tensor in state.items():
                one, other = (each.resolve_conj().contiguous().view(-1) for each in (tensor, target[name]))
                if one.numel():
                    assert torch.equal(one.view(torch.uint8), other.view(torch.uint8)), name


async def test_memory_is_pinned_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "PIN_NBYTES", 1 << 20)
    state = {f"w{n}": torch.randn(3 << 20, device="cuda") for n in range(8)}
    state |= {f"s{n}": torch.randn(100, device="cuda") for n in range(500)}
    for options in ({}, {"max_host_bytes": 16 << 20}):
        async with Checkpointer(**options) as checkpointer:  # type: ignore[arg-type]
            await (await checkpointer.save(state, tmp_path)).uploaded
            target = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
            await checkpointer.load(target, tmp_path)
        assert all(torch.equal(target[name], tensor) for name, tensor in state.items())


async def test_a_pinned_tensor_is_saved_when_the_copy_to_it_has_come(tmp_path: Path) -> None:
    source = torch.full((1 << 20,), 5.0, device="cuda")
    host = torch.zeros(1 << 20).pin_memory()
    async with Checkpointer() as checkpointer:
        await checkpointer.prepare({"device": source, "host": host})
        torch.cuda._sleep(500_000_000)  # type: ignore[no-untyped-call]
        host.copy_(source, non_blocking=True)
        await (await checkpointer.save({"device": source, "host": host}, tmp_path)).uploaded
        target = {"device": torch.zeros(1 << 20), "host": torch.zeros(1 << 20)}
        await checkpointer.load(target, tmp_path)
    assert float(target["host"].min()) == 5.0


async def test_a_load_pins_a_few_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    pinned: dict[int, int] = {}
    most = 0

    class Counting:
        def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> Any:  # noqa: N802
            nonlocal most
            pinned[address] = nbytes
            most = max(most, sum(pinned.values()))
            return real.cudaHostRegister(address, nbytes, flags)

        def cudaHostUnregister(self, address: int) -> Any:  # noqa: N802
            del pinned[address]
            return real.cudaHostUnregister(address)

    state = {f"w{n}": torch.randn(24 << 20) for n in range(4)}  # 96 MiB each
    async with Checkpointer() as checkpointer:
        await (await checkpointer.save(state, tmp_path)).uploaded
        monkeypatch.setattr(torch.cuda, "cudart", Counting)
        target = {name: torch.zeros(24 << 20, device="cuda") for name in state}
        await checkpointer.load(target, tmp_path)
    gc.collect()
    assert all(torch.equal(target[name].cpu(), tensor) for name, tensor in state.items())
    assert 0 < most <= 3 * (16 << 20)
    assert not pinned


async def test_a_graph_is_captured_as_if_there_were_no_library(tmp_path: Path) -> None:
    state = {"w": torch.zeros(1 << 20, device="cuda")}
    async with Checkpointer() as checkpointer:
        await checkpointer.prepare(state)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            state["w"].add_(1)
            with pytest.raises(CaptureError, match="w: is on cuda:0, whose current stream captures a graph"):
                await checkpointer.save(state, tmp_path)
        graph.replay()
        torch.cuda._sleep(500_000_000)  # type: ignore[no-untyped-call]
        ckpt = await checkpointer.save(state, tmp_path)
        ckpt.fence()
        graph.replay()
        await ckpt.uploaded
        target = {"w": torch.zeros(1 << 20)}
        await checkpointer.load(target, tmp_path)
        assert float(target["w"].min()) == float(target["w"].max()) == 1.0
        assert float(state["w"].max()) == 2.0


async def test_a_fence_in_a_capture_is_refused_and_staging_beside_a_capture_of_its_own_thread_is_not(
    tmp_path: Path,
) -> None:
    state = {"w": torch.zeros(16 << 20, device="cuda")}
    other = torch.zeros(8, device="cuda")
    async with Checkpointer() as checkpointer:
        await (await checkpointer.save(state, tmp_path)).uploaded
        torch.cuda._sleep(1_000_000_000)  # type: ignore[no-untyped-call]
        ckpt = await checkpointer.save(state, tmp_path)
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            graph.capture_begin(capture_error_mode="thread_local")
            other.add_(1)
            with pytest.raises(SaveError, match="captures a graph"):
                ckpt.fence()
            graph.capture_end()
        await ckpt.uploaded
        graph.replay()
        torch.cuda.synchronize()
        assert float(other[0]) == 1.0


async def test_a_child_that_is_forked_leaves_the_pinned_memory_alone(tmp_path: Path) -> None:
    state = {"w": torch.zeros(1 << 20, device="cuda")}
    async with Checkpointer() as checkpointer:
        await (await checkpointer.save(state, tmp_path)).uploaded
        child = os.fork()
        if child == 0:
            try:
                session_of(checkpointer).saves._saver._pipelines.clear()
                gc.collect()
                os._exit(0)
            except BaseException:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        await (await checkpointer.save(state, tmp_path)).uploaded


async def test_closing_gives_up_a_device_that_does_not_come_to_an_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flows, "CHECK_INTERVAL_S", 0.05)
    monkeypatch.setattr(drain, "CANCEL_TIMEOUT_S", 0.2)
    state = {"w": torch.zeros(1 << 20, device="cuda")}
    before = len(device_copies._in_use)
    with pytest.raises(SaveError, match=r"copies on cuda:0"):
        async with Checkpointer(timeout=0.2) as checkpointer:
            await (await checkpointer.save(state, tmp_path)).uploaded
            torch.cuda._sleep(6_000_000_000)  # type: ignore[no-untyped-call] # three seconds
            began_s = time.perf_counter()
            await checkpointer.save(state, tmp_path)
    assert time.perf_counter() - began_s < 2.5
    torch.cuda.synchronize()
    for _ in range(1000):
        if len(device_copies._in_use) > before:
            break
        await asyncio.sleep(0.01)
    staging, sources = device_copies._in_use[before:]
    assert isinstance(staging, Staging)
    assert isinstance(sources, list)
    assert [tensor.data_ptr() for tensor in sources] == [state["w"].data_ptr()]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("aiodcp-stage")]

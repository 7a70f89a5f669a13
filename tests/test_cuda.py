"""On a CUDA device; skipped without one."""

from pathlib import Path

import pytest
import torch

from aiodcp import Checkpointer

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

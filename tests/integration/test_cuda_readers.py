"""Readers of a checkpoint, and ranks, on a CUDA device; skipped without one."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

import aiodcp
from aiodcp import Checkpointer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture
def nccl_rank(tmp_path: Path) -> Iterator[None]:
    """One rank, whose collectives are NCCL's."""
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def make_state() -> dict[str, torch.Tensor]:
    state = {f"large{n}": torch.randn(3 << 20, device="cuda") for n in range(4)}
    state |= {f"small{n}": torch.randn(100 + n, device="cuda", dtype=torch.bfloat16) for n in range(300)}
    return state | {"turned": torch.randn(700, 900, device="cuda").t(), "host": torch.randn(50)}


async def test_what_is_staged_goes_to_a_device_while_the_state_changes(tmp_path: Path) -> None:
    state = make_state()
    kept = {name: tensor.clone() for name, tensor in state.items()}
    async with Checkpointer(spare_buffer=True) as checkpointer:
        for number in range(2):  # the second has other buffers than the first, whose lease has ended by then
            ckpt = await checkpointer.save(state, tmp_path / str(number))
            async with ckpt.snapshot() as view:
                for tensor in state.values():
                    tensor.zero_()
                later = await checkpointer.save(state, tmp_path / f"{number}-zeros")
                await later.staged
                on_device = {name: view[name].to("cuda", non_blocking=True) for name in view}
                torch.cuda.synchronize()
            for name, tensor in kept.items():
                assert torch.equal(on_device[name], tensor.cuda()), name
                state[name].copy_(tensor)
            await later.uploaded
        target = {name: torch.zeros_like(tensor) for name, tensor in kept.items()}
        await checkpointer.load(target, tmp_path / "1")
    assert all(torch.equal(target[name], tensor) for name, tensor in kept.items())


async def test_a_snapshot_of_a_device_is_exported(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    state = make_state()
    async with Checkpointer() as checkpointer:
        ckpt = await checkpointer.save(state, tmp_path / "ckpt")
        async with ckpt.snapshot() as view:
            await aiodcp.export(view, tmp_path / "hf")
    loaded = safetensors.load_file(tmp_path / "hf" / "model.safetensors", device="cuda")
    assert all(torch.equal(loaded[name], tensor.cuda()) for name, tensor in state.items())


async def test_an_open_checkpoint_is_read_to_a_device(tmp_path: Path) -> None:
    state = make_state()
    async with Checkpointer() as checkpointer:
        await (await checkpointer.save(state, tmp_path / "ckpt")).uploaded
    torch.save(state, tmp_path / "state.pt")
    for path in (tmp_path / "ckpt", tmp_path / "state.pt"):
        async with aiodcp.open(path) as stored:
            values = await stored.state_dict(device="cuda")
            assert values.keys() == state.keys()
            for name, tensor in state.items():
                assert values[name].device == torch.device("cuda", 0), name
                assert torch.equal(values[name], tensor.cuda()), name
            rows = await stored.read("turned", slice(10, 20), device="cuda", dtype=torch.float64)
            assert torch.equal(rows, state["turned"][10:20].double())
            streamed = {name: tensor async for name, tensor in stored.stream("small*", device="cuda")}
            assert all(torch.equal(streamed[f"small{n}"], state[f"small{n}"]) for n in range(300))


@pytest.mark.usefixtures("nccl_rank")
async def test_sharded_training_under_nccl_resumes(tmp_path: Path) -> None:
    def make() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        model = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.ReLU(), torch.nn.Linear(96, 32)).cuda()
        fully_shard(model, mesh=init_device_mesh("cuda", (1,)))
        return model, torch.optim.AdamW(model.parameters(), fused=True)

    def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
        torch.manual_seed(seed)
        model(torch.randn(8, 64, device="cuda")).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    model, optimizer = make()
    async with Checkpointer() as checkpointer:
        checkpointer.guard(optimizer)
        step(model, optimizer, 0)
        ckpt = await checkpointer.save({"model": model, "optim": optimizer}, tmp_path / "ckpt")
        step(model, optimizer, 1)
        await ckpt.uploaded
        other, its_optimizer = make()
        await checkpointer.load({"model": other, "optim": its_optimizer}, tmp_path / "ckpt")
    step(other, its_optimizer, 1)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.usefixtures("nccl_rank")
async def test_a_mesh_of_a_device_is_read_into(tmp_path: Path) -> None:
    mesh = init_device_mesh("cuda", (1,))
    whole = torch.randn(400, 300, device="cuda")
    async with Checkpointer() as checkpointer:
        state = {"w": distribute_tensor(whole, mesh, [Shard(0)])}
        await (await checkpointer.save(state, tmp_path / "ckpt")).uploaded
    async with aiodcp.open(tmp_path / "ckpt") as stored:
        read = await stored.read("w", device_mesh=mesh, placements=[Shard(1)])
    assert torch.equal(read.to_local(), whole)

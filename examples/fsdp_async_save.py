"""Save an FSDP model asynchronously: the first program of PyTorch's async-save tutorial, as an async program.

    torchrun --nproc-per-node 2 examples/fsdp_async_save.py

Runs on GPUs if there are any, else on the CPU. Model, optimizer and step are one `Stateful` object, as in the tutorial.
The save of one step goes on while the next steps are computed; before the next save its end is awaited.

Source: https://docs.pytorch.org/tutorials/recipes/distributed_async_checkpoint_recipe.html
"""

from __future__ import annotations

import argparse
import asyncio
import os
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import aiodcp


class Toy(nn.Module):
    """Two layers, large enough that a save takes a while."""

    def __init__(self, width: int = 1024) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.outer = nn.Linear(width, width // 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.outer(torch.relu(self.inner(x)))
        return out


class AppState:
    """What a checkpoint holds. `get_state_dict` knows of FSDP: names as without it, tensors as `DTensor`s."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model = model
        self.optimizer = optimizer
        self.step = 0

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optim": optimizer, "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"])
        self.step = state["step"]


class Trainer:
    """An FSDP model on this rank's device, and random data for it."""

    def __init__(self, seed: int = 0) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        mesh = init_device_mesh(device, (dist.get_world_size(),))
        torch.manual_seed(seed)
        self.model = Toy().to(device)
        for layer in (self.model.inner, self.model.outer, self.model):
            fully_shard(layer, mesh=mesh)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.001)
        self.app = AppState(self.model, self.optimizer)
        self.data = torch.Generator(device).manual_seed(dist.get_rank())
        self.device = device

    def forward_and_backward(self) -> float:
        x = torch.randn(64, 1024, device=self.device, generator=self.data)
        self.optimizer.zero_grad()
        loss = self.model(x).square().mean()
        loss.backward()
        return float(loss.detach())

    def update(self) -> None:
        self.optimizer.step()
        self.app.step += 1

    def weights(self) -> float:
        """A number that differs when the weights do; all ranks compute it together."""
        total = 0.0
        for parameter in self.model.parameters():
            assert isinstance(parameter, DTensor)
            total += float(parameter.full_tensor().detach().double().square().sum())
        return total


def say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)


async def check(checkpointer: aiodcp.Checkpointer, trainer: Trainer, path: Path) -> None:
    """Load the last checkpoint into another model, which then has the same weights."""
    other = Trainer(seed=1)
    await checkpointer.load({"app": other.app}, path)
    say(f"loaded step {other.app.step}: weights {'equal' if other.weights() == trainer.weights() else 'DIFFER'}")


def launch(train: Callable[[Path, int], Coroutine[Any, Any, None]]) -> None:
    """Run `train` on every rank that torchrun has started."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("checkpoints"))
    parser.add_argument("--steps", type=int, default=9)
    args = parser.parse_args()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        asyncio.run(train(args.out, args.steps))
    finally:
        dist.destroy_process_group()


async def train(out: Path, steps: int) -> None:
    trainer = Trainer()
    ckpt: aiodcp.Checkpoint | None = None
    async with aiodcp.Checkpointer() as checkpointer:
        checkpointer.guard(trainer.optimizer)  # its step waits until the weights are staged
        for step in range(1, steps + 1):
            loss = trainer.forward_and_backward()
            trainer.update()
            if step % 3 == 0:
                if ckpt is not None:
                    await ckpt.uploaded  # one save at a time
                ckpt = await checkpointer.save({"app": trainer.app}, out / f"step-{step}")
                say(f"step {step}: loss {loss:.4f}, saving to {ckpt.checkpoint_id}")
        if ckpt is not None:
            await ckpt.uploaded
            await check(checkpointer, trainer, out / f"step-{trainer.app.step}")


if __name__ == "__main__":
    launch(train)

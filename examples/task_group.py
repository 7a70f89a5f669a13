"""Training, evaluation and saving as tasks of one `asyncio.TaskGroup`, and what happens when one of them fails.

    python examples/task_group.py                 # all goes well
    python examples/task_group.py --fail evaluate # evaluation raises: the group is cancelled, the last save is kept
    python examples/task_group.py --fail save     # the disk is full: the group hears of it, the older save is kept

Ctrl-C lets the tasks end by themselves, with a last save.

Whichever way it ends, the checkpoint that is there is whole, and the last lines load it to show that.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import aiodcp

STEPS = 40
SAVE_EVERY = 10


class Run:
    """What the three tasks share: a model, and the news that they send each other."""

    def __init__(self, out: Path) -> None:
        torch.manual_seed(0)
        self.out = out
        self.model = nn.Sequential(nn.Linear(16, 512), nn.ReLU(), nn.Linear(512, 1))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.to_save: asyncio.Queue[int | None] = asyncio.Queue()
        self.saved: asyncio.Queue[int | None] = asyncio.Queue()
        self.may_change = asyncio.Event()  # cleared from the moment a save is wanted until it is staged
        self.may_change.set()
        self.stop = asyncio.Event()  # set by Ctrl-C

    def state(self, step: int) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optim": self.optimizer.state_dict(), "step": step}


def batch(step: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(256, 16, generator=torch.Generator().manual_seed(step))
    return x, x.sin().sum(dim=1, keepdim=True)


async def train(run: Run) -> None:
    for step in range(1, STEPS + 1):
        x, y = batch(step)
        loss = nn.functional.mse_loss(run.model(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        await run.may_change.wait()  # a save under way still reads the weights
        run.optimizer.step()
        run.optimizer.zero_grad()
        stop = run.stop.is_set()
        if step % SAVE_EVERY == 0 or stop:
            print(f"train: step {step}, loss {loss.item():.3f}")
            run.may_change.clear()
            run.to_save.put_nowait(step)
        if stop:
            break
        await asyncio.sleep(0)
    run.to_save.put_nowait(None)


async def save(run: Run, storage: aiodcp.Storage) -> None:
    async with aiodcp.Checkpointer(storage=storage) as checkpointer:
        while (step := await run.to_save.get()) is not None:
            checkpoint = await checkpointer.save(run.state(step), run.out / "latest")
            await checkpoint.staged
            run.may_change.set()
            await checkpoint.uploaded
            print(f"save: step {step} is durable")
            run.saved.put_nowait(step)
    run.saved.put_nowait(None)


async def evaluate(run: Run, *, fail: bool) -> None:
    """Evaluate every checkpoint from storage, as another machine would."""
    async with aiodcp.Checkpointer() as checkpointer:
        while (step := await run.saved.get()) is not None:
            model = nn.Sequential(nn.Linear(16, 512), nn.ReLU(), nn.Linear(512, 1))
            await checkpointer.load({"model": model}, run.out / "latest", strict=False)
            x, y = batch(-1)
            with torch.no_grad():
                print(f"evaluate: step {step}, loss {nn.functional.mse_loss(model(x), y).item():.3f}")
            if fail and step >= 2 * SAVE_EVERY:
                raise RuntimeError("evaluation found something wrong")


class FullDisk(aiodcp.LocalStorage):
    """A disk that is full when the third commit comes."""

    commits = 0

    async def put(self, checkpoint_id: str, name: str, data: bytes) -> None:
        self.commits += 1
        if self.commits == 3:
            raise OSError(28, "No space left on device")
        await super().put(checkpoint_id, name, data)


async def main(fail: str | None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder))
        asyncio.get_running_loop().add_signal_handler(signal.SIGINT, run.stop.set)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(train(run))
                group.create_task(save(run, FullDisk() if fail == "save" else aiodcp.LocalStorage()))
                group.create_task(evaluate(run, fail=fail == "evaluate"))
        except* (RuntimeError, aiodcp.SaveError) as errors:
            for error in errors.exceptions:
                print(f"the group ended: {type(error).__name__}: {error}")
        found: dict[str, Any] = {"model": nn.Sequential(nn.Linear(16, 512), nn.ReLU(), nn.Linear(512, 1)), "step": 0}
        async with aiodcp.Checkpointer() as checkpointer:
            await checkpointer.load(found, run.out / "latest", strict=False)
        print(f"what is there is whole, of step {found['step']}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--fail", choices=["evaluate", "save"], help="let one task fail")
    asyncio.run(main(parser.parse_args().fail))

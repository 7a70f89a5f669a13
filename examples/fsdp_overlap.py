"""Overlap staging with forward and backward: the third program of PyTorch's async-save tutorial, as an async program.

    torchrun --nproc-per-node 2 examples/fsdp_overlap.py

Forward and backward passes only read the weights, so a save may be staged meanwhile. It is awaited where the tutorial
awaits `staging_completion`: before `optimizer.step()`. The upload, its `upload_completion`, goes on under the steps
that follow and is awaited before the next save.
"""

from __future__ import annotations

import time
from pathlib import Path

from fsdp_async_save import Trainer, check, launch, say

import aiodcp


async def train(out: Path, steps: int) -> None:
    trainer = Trainer()
    trainer.forward_and_backward()
    trainer.update()
    ckpt: aiodcp.Checkpoint | None = None
    async with aiodcp.Checkpointer() as checkpointer:
        await checkpointer.prepare({"app": trainer.app})
        while trainer.app.step < steps:
            trainer.forward_and_backward()  # reads the weights, as the staging under way does
            if ckpt is not None:
                began = time.perf_counter()
                await ckpt.staged  # before the weights change
                if trainer.app.step % 3 == 0:
                    waited_ms = 1000 * (time.perf_counter() - began)
                    say(f"step {trainer.app.step + 1}: waited {waited_ms:.1f} ms for staging")
            trainer.update()
            if trainer.app.step % 3 == 0:
                if ckpt is not None:
                    await ckpt.uploaded  # one save at a time
                ckpt = await checkpointer.save({"app": trainer.app}, out / f"step-{trainer.app.step}")
        if ckpt is not None:
            await ckpt.uploaded
            await check(checkpointer, trainer, Path(ckpt.checkpoint_id))


if __name__ == "__main__":
    launch(train)

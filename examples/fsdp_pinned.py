"""Keep the staging buffers between saves: the second program of PyTorch's async-save tutorial, as an async program.

    torchrun --nproc-per-node 2 examples/fsdp_pinned.py

The tutorial asks for it with `FileSystemWriter(cache_staged_state_dict=True)`. Here it is the default: each rank keeps
one buffer as large as what it writes, and `prepare` makes it, touches it and plans before the first save, which
otherwise takes longer than the rest. `--give-back` frees it after each save: compare the lines.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from fsdp_async_save import Trainer, check, launch, say

import aiodcp

GIVE_BACK = "--give-back" in sys.argv


async def train(out: Path, steps: int) -> None:
    trainer = Trainer()
    trainer.forward_and_backward()
    trainer.update()  # the optimizer has its state from here on
    async with aiodcp.Checkpointer(keep_buffers=not GIVE_BACK) as checkpointer:
        if not GIVE_BACK:
            began = time.perf_counter()
            await checkpointer.prepare({"app": trainer.app})
            say(f"prepared in {1000 * (time.perf_counter() - began):.0f} ms")
        ckpt: aiodcp.Checkpoint | None = None
        while trainer.app.step < steps:
            trainer.forward_and_backward()
            trainer.update()
            if trainer.app.step % 3 == 0:
                if ckpt is not None:
                    await ckpt.uploaded
                began = time.perf_counter()
                ckpt = await checkpointer.save({"app": trainer.app}, out / f"step-{trainer.app.step}")
                await ckpt.staged
                kept = "given back after it" if GIVE_BACK else "kept"
                staged_ms = 1000 * (time.perf_counter() - began)
                say(f"step {trainer.app.step}: staged in {staged_ms:.1f} ms, {ckpt.progress.bytes_total} bytes {kept}")
        if ckpt is not None:
            await ckpt.uploaded
            await check(checkpointer, trainer, Path(ckpt.checkpoint_id))


if __name__ == "__main__":
    sys.argv = [argument for argument in sys.argv if argument != "--give-back"]
    launch(train)

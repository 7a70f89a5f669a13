"""The ordinary training loop, without asyncio: the same checkpoints, the same promises.

    python examples/plain_loop.py            # train, saving every 20 steps; go on where the last run was
    python examples/plain_loop.py --fresh    # forget the last run

Ctrl-C, or a SIGTERM of the cluster's, ends it after the step under way with a last checkpoint.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import time
from pathlib import Path

import torch
from torch import nn

import aiodcp


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(512, 16, generator=torch.Generator().manual_seed(step))
    return x, x.square().mean(dim=1, keepdim=True)


def main(options: argparse.Namespace) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 1024), nn.GELU(), nn.Linear(1024, 1024), nn.GELU(), nn.Linear(1024, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    state = {"model": model, "optim": optimizer}

    with aiodcp.CheckpointManager(
        options.out,
        save_interval=options.save_every,
        keep_last=2,
        keep_best=("loss", "min"),
        signals=[signal.SIGINT, signal.SIGTERM],
    ) as manager:
        start = manager.restore_sync(state) or 0
        print(f"steps there are: {manager.steps()}; going on after {start}")
        manager.checkpointer.guard(optimizer)  # its step waits until the weights are staged

        stalled_s = 0.0
        for step in range(start + 1, options.steps + 1):
            x, y = batch(step)
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()  # type: ignore[no-untyped-call] # the save before is staged meanwhile
            optimizer.step()
            optimizer.zero_grad()
            if manager.should_save(step):
                began = time.perf_counter()
                manager.save_sync(step, state, metrics={"loss": loss.item()})
                stalled_s += time.perf_counter() - began
                print(f"step {step}: loss {loss.item():.4f}, saving", flush=True)
            if manager.preempted.done():
                print(f"asked to stop at step {step}", flush=True)
                break

    # Left the block: all is committed, and what is not to be kept is removed.
    saves = manager.stats.saved
    print(f"kept {manager.steps()}, best {manager.best}; the loop was held {1e3 * stalled_s:.1f} ms by {saves} saves")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("checkpoints/plain"), help="where checkpoints go")
    parser.add_argument("--steps", type=int, default=100, help="train up to this step")
    parser.add_argument("--save-every", type=int, default=20, help="steps between saves")
    parser.add_argument("--fresh", action="store_true", help="remove the checkpoints of the last run first")
    options = parser.parse_args()
    if options.fresh:
        shutil.rmtree(options.out, ignore_errors=True)
    main(options)

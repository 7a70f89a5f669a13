"""Checkpoints in an object store: a run is killed and resumed, while an evaluator follows it.

    python examples/object_store.py                        # starts a server of S3 by itself: moto, of the extra `dev`
    python examples/object_store.py s3://bucket/my-run     # your bucket, with the credentials of the environment

The trainer is a process of its own, which is killed with SIGKILL in the middle of the run and begun anew. The evaluator
is a task of this process: it is woken by each commit, reads the step under a lease, and sees each step once.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import sys
import time
import urllib.request
from asyncio.subprocess import Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import torch
from torch import nn

import aiodcp

STEPS, SAVE_EVERY = 40, 4


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 512), nn.GELU(), nn.Linear(512, 512), nn.GELU(), nn.Linear(512, 1))


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(256, 16, generator=torch.Generator().manual_seed(step))
    return x, x.square().mean(dim=1, keepdim=True)


# --- the trainer


async def train(url: str, crash_after: int) -> None:
    """Train to the end, or crash: the process is gone in the middle of a save."""
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    state = {"model": model, "optim": optimizer}
    async with aiodcp.CheckpointManager(url, save_interval=SAVE_EVERY, keep_last=2) as manager:
        start = await manager.restore(state) or 0
        print(f"trainer: going on after step {start}", flush=True)
        manager.checkpointer.guard(optimizer)  # its step waits until the weights are staged
        for step in range(start + 1, STEPS + 1):
            x, y = batch(step)
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()  # type: ignore[no-untyped-call] # the save before is staged and sent meanwhile
            optimizer.step()
            optimizer.zero_grad()
            if manager.should_save(step):
                await manager.save(step, state, metrics={"loss": loss.item()})
                print(f"trainer: step {step}, loss {loss.item():.4f}, saving", flush=True)
            if step == crash_after:
                os.kill(os.getpid(), 9)
            await asyncio.sleep(0.02)  # the loop is yours


async def run_trainer(url: str, *options: str) -> Process:
    return await asyncio.create_subprocess_exec(sys.executable, __file__, url, "--train", *options)


# --- the evaluator


async def evaluate(url: str, last: int) -> list[int]:
    """Evaluate each step as soon as it is committed, up to the last one; return which were seen."""
    model = make_model()
    x, y = batch(10**6)
    seen = []
    async with aiodcp.Checkpointer() as checkpointer:
        async for step in aiodcp.watch(url, poll_s=0.5):
            try:
                async with aiodcp.lease(step) as path:  # the trainer keeps two steps, and this one while it is read
                    await checkpointer.load({"model": model}, path)
            except aiodcp.NotACheckpointError:
                print(f"evaluator: step {step} was removed before it was read")
                continue
            with torch.no_grad():
                loss = nn.functional.mse_loss(model(x), y).item()
            behind_s = time.time() - step.saved_at
            print(f"evaluator: step {step}, loss {loss:.4f}, {behind_s:.1f} s after its commit", flush=True)
            seen.append(int(step))
            if step == last:
                break
    return seen


# --- both


@asynccontextmanager
async def local_server() -> AsyncIterator[str]:
    """Run moto as S3, with one bucket, and have the environment say so."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    endpoint = f"http://127.0.0.1:{port}"
    devnull = asyncio.subprocess.DEVNULL
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = await asyncio.create_subprocess_exec(*command, stdout=devnull, stderr=devnull)
    try:
        request = urllib.request.Request(f"{endpoint}/bucket", method="PUT")
        while server.returncode is None:
            try:
                await asyncio.to_thread(urllib.request.urlopen, request, timeout=10)
                break
            except OSError:
                await asyncio.sleep(0.1)
        else:
            raise SystemExit("moto ended: pip install 'moto[server]'")
        os.environ.update(
            AWS_ENDPOINT_URL=endpoint, AWS_REGION="us-east-1", AWS_ACCESS_KEY_ID="test", AWS_SECRET_ACCESS_KEY="test"
        )
        yield "s3://bucket/run"
    finally:
        server.kill()
        await server.wait()


async def run(url: str) -> None:
    async with asyncio.TaskGroup() as group:
        evaluator = group.create_task(evaluate(url, STEPS))
        crashing = await run_trainer(url, "--crash-after", str(STEPS // 2))
        assert await crashing.wait() < 0
        print("trainer: killed")
        again = await run_trainer(url)
        assert await again.wait() == 0
    print(f"evaluated {evaluator.result()}")


async def main(options: argparse.Namespace) -> None:
    if options.train:
        await train(options.url, options.crash_after)
    elif options.url:
        await run(options.url)
    else:
        async with local_server() as url:
            await run(url)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", nargs="?", help="where to save; by default a server is started")
    parser.add_argument("--train", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--crash-after", type=int, default=0, help=argparse.SUPPRESS)
    asyncio.run(main(parser.parse_args()))

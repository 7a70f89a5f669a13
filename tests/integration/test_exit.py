"""However a process ends, it ends: what is in flight is finished, and what failed is reported on standard error."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

LIMIT_S = 120

_BEGIN = """
import asyncio, os, signal, sys, threading, time
from contextlib import asynccontextmanager
import torch, aiodcp
from aiodcp import Checkpointer, CheckpointManager, LocalStorage
from aiodcp.checkpointer import drain, flows

root, state = sys.argv[1], {"w": torch.arange(1000.0)}
begun = threading.Event()

class Slow(LocalStorage):
    fails = False

    @asynccontextmanager
    async def create(self, checkpoint_id, name):
        begun.set()
        await asyncio.sleep(0.3)
        if self.fails:
            raise OSError(28, "No space left on device")
        async with super().create(checkpoint_id, name) as writer:
            yield writer

class Stuck(LocalStorage):
    async def put(self, checkpoint_id, name, data):
        begun.set()
        await asyncio.to_thread(threading.Event().wait)

def slow():
    return Checkpointer(storage=Slow(), no_dist=True)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A program that leaves a Checkpointer open, and what is to come of it."""

    program: str
    saved: list[str] = field(default_factory=list)
    code: int = 0
    stderr: str = ""


CASES = {
    "idle": Case(program="c = slow().__enter__()"),
    "in flight": Case(program="c = slow().__enter__(); c.save_sync(state, root + '/a')", saved=["a"]),
    "forgotten": Case(program="slow().__enter__().save_sync(state, root + '/a')", saved=["a"]),
    "sys.exit": Case(
        program="c = slow().__enter__(); c.save_sync(state, root + '/a'); sys.exit(3)", saved=["a"], code=3
    ),
    "uncaught": Case(
        program="c = slow().__enter__(); c.save_sync(state, root + '/a'); raise ValueError('mine')",
        saved=["a"],
        code=1,
        stderr="ValueError: mine",
    ),
    "a manager": Case(
        program="m = CheckpointManager(root, checkpointer=slow(), signals=[signal.SIGTERM]).__enter__()\n"
        "m.save_sync(1, state)",
        saved=["step-1"],
    ),
    "failed, unseen": Case(
        program="Slow.fails = True; c = slow().__enter__(); c.save_sync(state, root + '/a')",
        stderr="the last save failed, and its error was never retrieved: WriteError",
    ),
    "on a loop": Case(
        program="""
async def main():
    global manager
    manager = CheckpointManager(root, checkpointer=slow())
    await manager.__aenter__()
    await manager.save(1, state)

asyncio.run(main())
""",
        saved=["step-1"],
    ),
    "an abandoned generator": Case(
        program="""
async def steps():
    async with slow() as c:
        yield await c.save(state, root + "/a")

async def main():
    global kept
    kept = steps()
    async for _ in kept:
        break

asyncio.run(main())
""",
        saved=["a"],
    ),
    "storage that never answers": Case(
        program="""
flows.EXIT_IDLE_S = drain.CANCEL_TIMEOUT_S = flows.CANCEL_TIMEOUT_S = 0.2
c = Checkpointer(storage=Stuck(), no_dist=True).__enter__()
c.save_sync(state, root + "/a")
assert begun.wait(30)
""",
        stderr="cancels the work in flight",
    ),
    "forked": Case(
        program="""
c = slow().__enter__()
ckpt = c.save_sync(state, root + "/a")
child = os.fork()
if not child:
    for wait in (ckpt.wait, ckpt.staged.wait, ckpt.result, ckpt.exception):
        try:
            wait()
        except aiodcp.ClosedError as error:
            assert "forked" in str(error)
        else:
            sys.exit(7)
    ckpt.fence()
    sys.exit(0)  # with the interpreter's whole end
assert os.waitpid(child, 0)[1] == 0
""",
        saved=["a"],
    ),
}


def test_however_a_process_ends_it_ends_and_says_what_failed(tmp_path: Path) -> None:
    running = {}
    for number, (name, case) in enumerate(CASES.items()):  # beside each other: each imports torch
        root = tmp_path / str(number)
        root.mkdir()
        command = [sys.executable, "-W", "ignore", "-c", _BEGIN + case.program, str(root)]
        running[name] = root, subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    wrong = []
    for name, (root, process) in running.items():
        try:
            _, said = process.communicate(timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            wrong.append(f"{name}: does not end")
            continue
        case = CASES[name]
        saved = sorted(path.parent.name for path in root.glob("*/.metadata"))
        if (process.returncode, saved) != (case.code, case.saved) or case.stderr not in said:
            wrong.append(f"{name}: exit {process.returncode}, saved {saved}, said {said}")
        elif not case.stderr and said.strip():
            wrong.append(f"{name}: said {said}")
    if wrong:
        pytest.fail("\n".join(wrong))

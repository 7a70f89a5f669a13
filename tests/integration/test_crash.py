"""Whatever the moment at which a process is killed, what is found afterwards loads whole and equal, or is absent."""

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from aiodcp import Checkpointer, NotACheckpointError

CHILD = """
import asyncio, sys, torch, aiodcp

async def main(path):
    async with aiodcp.Checkpointer() as checkpointer:
        number = 0
        while True:
            number += 1
            state = {f"w{n}": torch.full((1 << 16,), float(number)) for n in range(32)} | {"number": number}
            checkpoint = await checkpointer.save(state, path)
            print("saving", flush=True)
            await checkpoint.uploaded
            print(number, flush=True)

asyncio.run(main(sys.argv[1]))
"""


@pytest.mark.parametrize("seed", range(3))
async def test_killed_at_random_moments_the_checkpoint_is_whole_or_absent(seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path / "ckpt")], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    committed = 0
    kill_after = chance.randrange(3 * seed + 1)  # lines: how many saves go well first
    for line in child.stdout:
        if line.strip() == "saving":
            if committed >= kill_after:
                break
        else:
            committed = int(line)
    time.sleep(chance.uniform(0, 0.03))  # into the middle of a save
    child.kill()
    for line in child.stdout:
        if line.strip().isdigit():
            committed = int(line)
    child.wait()
    child.stdout.close()
    target = {f"w{n}": torch.zeros(1 << 16) for n in range(32)} | {"number": 0}
    async with Checkpointer() as checkpointer:
        try:
            await checkpointer.load(target, tmp_path / "ckpt")
        except NotACheckpointError:
            assert committed == 0
        else:
            number = target["number"]
            assert isinstance(number, int)
            assert number in (committed, committed + 1)
            assert all(torch.equal(target[f"w{n}"], torch.full((1 << 16,), float(number))) for n in range(32))  # type: ignore[arg-type]
        # and the next save clears away what the killed one left
        await (await checkpointer.save(target, tmp_path / "ckpt")).uploaded
    assert len(list((tmp_path / "ckpt").iterdir())) == 2

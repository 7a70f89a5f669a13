"""What an acknowledged save is worth: killed, damaged and refused at random, it loads whole and equal, or says so.

`AIODCP_CAMPAIGN=100 pytest tests/integration/test_campaign.py -s` tries a hundred times as often and prints what came
of them; `AIODCP_CAMPAIGN_SEED` chooses other tries.
"""

from __future__ import annotations

import errno
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import aiodcp
from aiodcp import (
    Checkpointer,
    CheckpointError,
    CheckpointManager,
    CorruptError,
    NotACheckpointError,
    Retry,
)
from aiodcp.testing import FaultyStorage

from ..support.states import assert_equal, blank, make_state

TIMES = int(os.environ.get("AIODCP_CAMPAIGN", "1"))
SEED = int(os.environ.get("AIODCP_CAMPAIGN_SEED", "0"))
LIMIT_S = 120

# --- kills

WORKER = """
import asyncio, os, sys, torch
import torch.distributed as dist
import aiodcp

kind, path = sys.argv[1:3]
rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
if size > 1:
    dist.init_process_group("gloo")

def state(number):
    return {f"w{n}": torch.full((1 << 15,), float(number)) for n in range(32)} | {"number": number}

async def main():
    options = {"max_host_bytes": 1 << 20} if kind == "windows" else {}
    async with aiodcp.Checkpointer(timeout=30, **options) as checkpointer:
        for number in range(1, 1_000_000):
            if kind == "joint":
                async with aiodcp.joint_checkpoint(checkpointer, path) as joint:
                    for name, value in state(number).items():
                        joint.add(name, value)
                    print("saving", flush=True)
            else:
                checkpoint = await checkpointer.save(state(number), path)
                print("saving", flush=True)
                await checkpoint.uploaded
            print(number, flush=True)

asyncio.run(main())
"""
KINDS = {"plain": 1, "windows": 1, "joint": 1, "ranks": 2}


def _start(kind: str, place: Path) -> list[subprocess.Popen[str]]:
    size = KINDS[kind]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    children = []
    for rank in range(size):
        env = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        if size > 1:
            env |= {"RANK": str(rank), "WORLD_SIZE": str(size)}
        command = [sys.executable, "-W", "ignore", "-c", WORKER, kind, str(place)]
        children.append(
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env)
        )
    return children


def _kill(children: list[subprocess.Popen[str]], chance: random.Random) -> int:
    """Kill all at a random moment, one after the other; return the last save that was acknowledged."""
    first = children[0]
    assert first.stdout is not None
    committed, after = 0, chance.randrange(6)
    for line in first.stdout:
        if line.strip().isdigit():
            committed = int(line)
        elif committed >= after:
            break
    time.sleep(chance.uniform(0, 0.05))  # into the middle of a save
    for child in chance.sample(children, len(children)):
        child.send_signal(signal.SIGKILL)
        time.sleep(chance.choice([0, 0.01]))
    for line in first.stdout:
        if line.strip().isdigit():
            committed = int(line)
    for child in children:
        child.wait(LIMIT_S)
        assert child.stdout is not None
        child.stdout.close()
    return committed


@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_random_moments_no_acknowledged_save_is_lost_or_torn(kind: str, tmp_path: Path) -> None:
    chance = random.Random(f"{SEED} {kind}")
    outcomes: Counter[str] = Counter()
    for attempt in range(TIMES):
        place = tmp_path / str(attempt)
        committed = _kill(_start(kind, place), chance)
        target: dict[str, Any] = {f"w{n}": torch.zeros(1 << 15) for n in range(32)} | {"number": 0}
        with Checkpointer(no_dist=True) as checkpointer:
            try:
                checkpointer.load_sync(target, place)
            except NotACheckpointError:
                assert committed == 0
                outcomes["nothing yet"] += 1
                continue
            number = target["number"]
            assert number in (committed, committed + 1)
            for n in range(32):
                assert torch.equal(target[f"w{n}"], torch.full((1 << 15,), float(number)))
            outcomes["as acknowledged" if number == committed else "committed, and not acknowledged yet"] += 1
            checkpointer.save_sync(target, place).wait()  # clears away what the killed one has left
        assert len(list(place.glob("*.distcp"))) == 1
    print(f"\nkills, {kind}: {dict(outcomes)}")


# --- damage


def _edit(data: bytearray, chance: random.Random) -> str:
    """Damage a file's content at random; return how."""
    kind = chance.choice(["bit", "byte", "zeros", "cut", "longer", "swap", "copy"])
    start, length = chance.randrange(len(data)), chance.randrange(1, 600)
    if kind == "bit":
        data[start] ^= 1 << chance.randrange(8)
    elif kind == "byte":
        data[start] = chance.randrange(256)
    elif kind == "zeros":
        data[start : start + length] = bytes(len(data[start : start + length]))
    elif kind == "cut":
        del data[start:]
    elif kind == "longer":
        data += chance.randbytes(length)
    else:
        other = chance.randrange(len(data))
        length = min(length, len(data) - start, len(data) - other)
        one, two = data[start : start + length], data[other : other + length]
        data[other : other + length] = one
        if kind == "swap" and abs(start - other) >= length:
            data[start : start + length] = two
    return kind


def test_edited_at_random_a_checkpoint_loads_equal_or_is_refused(tmp_path: Path) -> None:
    chance = random.Random(SEED)
    place = tmp_path / "ckpt"
    state = make_state(3)
    outcomes: Counter[str] = Counter()
    with Checkpointer(no_dist=True) as checkpointer:
        checkpointer.save_sync(state, place).wait()
        files = {path: path.read_bytes() for path in place.iterdir()}
        for _ in range(150 * TIMES):
            path = chance.choice(sorted(files))
            data = bytearray(files[path])
            kind = _edit(data, chance)
            if data == files[path]:
                continue
            path.write_bytes(data)
            target = blank(state)
            try:
                checkpointer.load_sync(target, place)
            except CheckpointError as error:
                outcomes[f"{kind}: {type(error).__name__}"] += 1
            else:
                assert_equal(state, target)  # what nobody reads is damaged: padding, a second copy of a checksum
                outcomes[f"{kind}: equal"] += 1
            path.write_bytes(files[path])
        assert not aiodcp.verify_sync(place)
    print(f"\nedits: {dict(sorted(outcomes.items()))}")
    assert outcomes["bit: CorruptError"]


def test_every_bit_of_small_metadata_is_found_by_load_and_by_verify(tmp_path: Path) -> None:
    chance = random.Random(SEED)
    place = tmp_path / "ckpt"
    with Checkpointer(no_dist=True) as checkpointer:
        checkpointer.save_sync({"w": torch.ones(2)}, place, custom_metadata={"lr": 0.5}).wait()
        path = place / ".metadata"
        good = path.read_bytes()
        bits = range(8 * len(good))
        for bit in bits if TIMES > 1 else chance.sample(bits, 500):
            data = bytearray(good)
            data[bit // 8] ^= 1 << bit % 8
            path.write_bytes(data)
            with pytest.raises(CorruptError):
                checkpointer.load_sync({"w": torch.zeros(2)}, place)
            assert aiodcp.verify_sync(place)


# --- refusals

ERRORS = [errno.EIO, errno.ENOSPC, errno.EACCES, errno.ESTALE, errno.EROFS, errno.ETIMEDOUT]


def _run(storage: FaultyStorage, refused: Counter[str]) -> tuple[int, int]:
    """Save four steps and restore; return the newest that was acknowledged, and which was restored."""
    acknowledged = 0
    with CheckpointManager(
        "root",
        checkpointer=Checkpointer(storage=storage, no_dist=True, retry=Retry(attempts=1)),
        keep_last=2,
        on_error="warn",
    ) as manager:
        for step in range(1, 5):
            try:
                manager.save_sync(step, make_state(step), metrics={"loss": step}).wait()
            except CheckpointError as error:
                refused[type(error).__name__] += 1
            else:
                acknowledged = step
        storage.gate = lambda call: None
        state = blank(make_state())
        restored = manager.restore_sync(state) or 0
        if restored:
            assert_equal(make_state(int(restored)), state)
    return acknowledged, int(restored)


def test_refused_at_every_call_a_storage_loses_nothing_that_was_acknowledged() -> None:
    chance = random.Random(SEED)
    counted = FaultyStorage()
    assert _run(counted, Counter()) == (4, 4)
    refused: Counter[str] = Counter()
    tries = 0
    for call in range(1, len(counted.calls) + 1):
        for number in chance.sample(ERRORS, min(TIMES, len(ERRORS))):
            storage = FaultyStorage()

            def gate(name: str, storage: FaultyStorage = storage, call: int = call, number: int = number) -> None:
                if len(storage.calls) == call:
                    raise OSError(number, os.strerror(number))

            storage.gate = gate
            tries += 1
            try:
                acknowledged, restored = _run(storage, refused)
            except CheckpointError as error:  # it could not even be entered
                refused[type(error).__name__] += 1
                continue
            assert restored in (acknowledged, acknowledged + 1), f"call {call}: {storage.calls[call - 1]}"
            complete = {place for place, files in storage.files.items() if ".metadata" in files}
            assert len(complete) <= 3
            assert storage.open_files == 0
    print(f"\nrefusals: {tries} tries, {dict(refused)}")
    assert refused["WriteError"]

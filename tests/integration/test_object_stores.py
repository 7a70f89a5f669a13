"""Object stores end to end: DCP's readers and writers, several ranks, processes that are killed, the command line."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from aiodcp import Checkpointer, CheckpointManager, CorruptError, RankError
from aiodcp._cli.main import main
from tests.support.object_servers import KEY_ID, SECRET, FaultProxy, Request, S3Server, nth
from tests.support.ranks import World

KILLS = int(os.environ.get("AIODCP_CAMPAIGN", "2"))


@pytest.fixture
def fsspec_options(s3: S3Server) -> Iterator[dict[str, Any]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of botocore and s3fs, on import and at the end
        yield {
            "key": KEY_ID,
            "secret": SECRET,
            "client_kwargs": {"endpoint_url": s3.endpoint, "region_name": "us-east-1"},
            "skip_instance_cache": True,
        }


def _state() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    return {
        "model": {"weight": torch.randn(700, 1000, generator=generator), "bias": torch.randn(3, generator=generator)},
        "bf16": torch.randn(11, 13, generator=generator).bfloat16(),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 5),
        "step": 7,
    }


def _blank() -> dict[str, Any]:
    return {
        "model": {"weight": torch.zeros(700, 1000), "bias": torch.zeros(3)},
        "bf16": torch.zeros(11, 13, dtype=torch.bfloat16),
        "scalar": torch.tensor(0.0),
        "empty": torch.empty(0, 5),
        "step": 0,
    }


def _assert_loaded(state: dict[str, Any]) -> None:
    torch.testing.assert_close(state, _state(), rtol=0, atol=0)


# --- DCP, with fsspec and s3fs


async def test_dcp_loads_by_s3fs_what_was_saved_here(s3: S3Server, fsspec_options: dict[str, Any]) -> None:
    url = s3.url()
    async with Checkpointer(storage=s3.storage(object_bytes=1 << 20)) as checkpointer:
        await (await checkpointer.save(_state(), url)).uploaded
    assert sum(key.endswith(".distcp") for key in s3.keys(url)) >= 3
    state = _blank()
    await asyncio.to_thread(dcp.load, state, storage_reader=FsspecReader(url, **fsspec_options), no_dist=True)
    _assert_loaded(state)


async def test_what_dcp_has_saved_by_s3fs_is_loaded_here(s3: S3Server, fsspec_options: dict[str, Any]) -> None:
    url = s3.url()
    writer = FsspecWriter(url, **fsspec_options)
    await asyncio.to_thread(dcp.save, _state(), storage_writer=writer, no_dist=True)
    async with Checkpointer(storage=s3.storage()) as checkpointer:
        state = _blank()
        await checkpointer.load(state, url)
    _assert_loaded(state)


# --- several ranks


def _many_ranks(rank: int, size: int, endpoint: str, url: str) -> list[int]:
    async def main() -> list[int]:
        server = S3Server(endpoint)
        mesh = init_device_mesh("cpu", (size,))
        whole = torch.arange(600_000.0).view(600, 1000)
        replicated = torch.arange(500_000.0)
        state: dict[str, Any] = {
            "sharded": distribute_tensor(whole, mesh, [Shard(0)]),
            "replicated": distribute_tensor(replicated, mesh, [Replicate()]),
            "plain": replicated + 1,
            "step": 3,
        }
        storage = server.storage(object_bytes=1 << 18)
        async with CheckpointManager(url, checkpointer=Checkpointer(storage=storage), keep_last=1) as manager:
            for step in (1, 2):
                await (await manager.save(step, state)).uploaded
            into: dict[str, Any] = {
                "sharded": distribute_tensor(torch.zeros(600, 1000), mesh, [Shard(1)]),
                "replicated": distribute_tensor(torch.zeros(500_000), mesh, [Replicate()]),
                "plain": torch.zeros(500_000),
                "step": 0,
            }
            assert await manager.restore(into) == 2
            loaded = into["sharded"]
            assert isinstance(loaded, DTensor)
            assert torch.equal(loaded.full_tensor(), whole)
            assert torch.equal(into["plain"], replicated + 1)
            return manager.steps()

    return asyncio.run(main())


def test_ranks_save_and_load_resharded_in_a_store(world: World, s3: S3Server) -> None:
    url = s3.url()
    assert world.run(2, _many_ranks, s3.endpoint, url) == [[2], [2]]
    names = [key for key in s3.keys(url) if key.endswith(".distcp")]
    assert all(key.startswith("step-2/") for key in names)
    assert {key[len("step-2/__")] for key in names} == {"0", "1"}
    assert len(names) >= 2 * 600_000 * 4 // (1 << 18)


def _load_halves(rank: int, size: int, endpoint: str, url: str) -> int:
    async def main() -> int:
        mesh = init_device_mesh("cpu", (size,))
        blank = {name: torch.zeros_like(whole) for name, whole in _wholes().items()}
        state = {name: distribute_tensor(tensor, mesh, [Shard(0)]) for name, tensor in blank.items()}
        async with Checkpointer(storage=S3Server(endpoint).storage()) as checkpointer:
            await checkpointer.load(state, url)
        for name, whole in _wholes().items():
            assert torch.equal(state[name].to_local(), whole.chunk(size)[rank])
        return sum(tensor.to_local().nbytes for tensor in state.values())

    return asyncio.run(main())


def _wholes() -> dict[str, torch.Tensor]:
    return {f"w{number}": torch.arange(300_000.0).view(1000, 300) + number for number in range(12)}


def test_ranks_that_load_their_parts_read_little_more_than_they_need(world: World, proxy: FaultProxy) -> None:
    url = proxy.server.url()
    with Checkpointer(storage=proxy.upstream.storage(), no_dist=True) as checkpointer:
        checkpointer.save_sync(_wholes(), url).uploaded.wait()
    wanted = sum(world.run(2, _load_halves, proxy.server.endpoint, url))
    read = [_range_nbytes(request) for request in proxy.requests if "range" in request.headers]
    assert sum(read) <= 1.1 * wanted
    assert sum("/.metadata" in request.path for request in proxy.requests) == 1  # one rank reads it, for all


def _range_nbytes(request: Request) -> int:
    first, _, last = request.headers["range"].removeprefix("bytes=").partition("-")
    return int(last) - int(first) + 1 if first else int(last)


def _one_rank_fails(rank: int, size: int, endpoint: str, good: str, url: str) -> str:
    async def main() -> str:
        storage = S3Server(endpoint if rank else good).storage(object_bytes=1 << 18)
        async with Checkpointer(storage=storage) as checkpointer:
            ckpt = await checkpointer.save({"w": torch.full((500_000,), float(rank)), "n": rank}, url)
            try:
                await ckpt.uploaded
            except RankError as error:
                return str(error)
            return ""

    return asyncio.run(main())


def test_a_rank_that_the_store_refuses_fails_all_and_nothing_is_left(world: World, proxy: FaultProxy) -> None:
    url = proxy.server.url()
    proxy.fault = lambda request: "forbid" if request.verb == "PUT" and "__1_0_" in request.path else None
    messages = world.run(2, _one_rank_fails, proxy.server.endpoint, proxy.upstream.endpoint, url)
    assert messages[0] == messages[1]
    assert "rank 1" in messages[0]
    assert "AccessDenied" in messages[0]
    assert proxy.upstream.keys(url) == []


def test_a_coordinator_that_may_not_lock_fails_all_at_once(world: World, proxy: FaultProxy) -> None:
    url = proxy.server.url()
    proxy.fault = lambda request: "forbid" if request.verb == "PUT" and "lease" in request.path else None
    first, second = world.run(2, _one_rank_fails, proxy.server.endpoint, proxy.server.endpoint, url)
    assert first == second
    assert "rank 0" in first
    assert "AccessDenied" in first
    assert proxy.upstream.keys(url) == []


# --- processes that are killed

WRITER = """
import asyncio, sys
sys.path.insert(0, {path!r})
import torch, aiodcp
from tests.support.object_servers import S3Server

async def main() -> None:
    storage = S3Server({endpoint!r}).storage(object_bytes=1 << 18)
    checkpointer = aiodcp.Checkpointer(storage=storage, max_host_bytes={max_host_bytes})
    async with aiodcp.CheckpointManager({url!r}, checkpointer=checkpointer, keep_last=2) as manager:
        state = {{"w": torch.zeros(400_000), "step": 0}}
        step = await manager.restore(state) or 0
        assert (state["w"] == step).all() and state["step"] == step
        print("restored", int(step), flush=True)
        while True:
            step += 1
            state = {{"w": torch.full((400_000,), float(step)), "step": int(step)}}
            await (await manager.save(int(step), state)).uploaded
            print("saved", int(step), flush=True)

asyncio.run(main())
"""


@pytest.mark.parametrize("max_host_bytes", [None, 2 << 20])
def test_no_acknowledged_save_is_lost_when_the_writer_is_killed(s3: S3Server, max_host_bytes: int | None) -> None:
    url, chances = s3.url(), random.Random(7)
    acknowledged = 0
    for _ in range(KILLS):
        program = WRITER.format(path=os.getcwd(), endpoint=s3.endpoint, url=url, max_host_bytes=max_host_bytes)
        with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            verb, restored = writer.stdout.readline().split()
            assert verb == "restored"
            assert int(restored) in (acknowledged, acknowledged + 1)  # a commit may not have been acknowledged yet
            for _ in range(chances.randrange(1, 5)):
                acknowledged = int(writer.stdout.readline().split()[1])
            try:
                writer.wait(timeout=chances.random() * 0.06)
            except subprocess.TimeoutExpired:
                writer.send_signal(signal.SIGKILL)
            for line in writer.stdout:
                acknowledged = int(line.split()[1])
    latest, steps = asyncio.run(_look_after(s3, url))
    assert latest in (acknowledged, acknowledged + 1)
    assert steps == {f"step-{latest}", "step-10000"}  # what was killed has left nothing


async def _look_after(s3: S3Server, url: str) -> tuple[int | None, set[str]]:
    """Return the newest step, and all of which there is something after one more save."""
    async with CheckpointManager(url, checkpointer=Checkpointer(storage=s3.storage()), keep_last=2) as manager:
        latest = manager.latest
        state = {"w": torch.zeros(400_000), "step": -1}
        assert await manager.restore(state) == latest
        assert state["step"] == latest
        await (await manager.save(10_000, state)).uploaded
    return latest, {key.split("/")[0] for key in s3.keys(url)} - {".aiodcp"}


# --- the command line


def test_the_command_line_takes_urls(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    root = s3.url()
    with CheckpointManager(root, checkpointer=Checkpointer(storage=s3.storage(object_bytes=1 << 20))) as manager:
        for step in (1, 2):
            manager.save_sync(step, _state() | {"step": step}, metrics={"loss": 1 / step}).uploaded.wait()

    def run(*arguments: str, status: int = 0) -> str:
        if status:
            with pytest.raises(SystemExit, match=str(status)):
                main(arguments)
        else:
            main(arguments)
        return "".join(capsys.readouterr())

    rows = json.loads(run("ls", root, "--json"))
    assert [(row["step"], row["complete"], row["metrics"]) for row in rows] == [
        (1, True, {"loss": 1.0}),
        (2, True, {"loss": 0.5}),
    ]
    assert "model.weight  (700, 1000)" in run("show", f"{root}/step-2/")
    assert "(700, 1000)" in run("show", f"{root}/step-2", "model", "--chunks")
    assert "intact" in run("verify", f"{root}/step-2")
    assert "step" in run("diff", f"{root}/step-1", f"{root}/step-2", status=1)
    run("export", f"{root}/step-2", "--to", "torch", str(tmp_path / "out.pt"))
    assert "is a URL" in run("export", f"{root}/step-2", "--to", "torch", f"{root}/out.pt", status=2)
    assert "is a checkpoint" in run("ls", f"{root}/step-2", status=2)
    _assert_loaded(torch.load(tmp_path / "out.pt") | {"step": 7})
    assert re.fullmatch(
        r"would remove step 1: 4 files, \d.* MiB; the options do not keep it\n",
        run("gc", root, "--keep-last", "1", "--dry-run"),
    )
    assert run("gc", root, "--keep-last", "1") == "removed step 1\n"
    assert [row["step"] for row in json.loads(run("ls", root, "--json"))] == [2]
    assert "no such bucket" in run("ls", "s3://no-such-bucket/x", status=2)
    damaged = next(key for key in s3.keys(root) if key.endswith("_1.distcp"))
    store, prefix = s3.store(), root.removeprefix("s3://bucket/")
    content = bytearray(store.get(f"{prefix}/{damaged}").bytes())
    content[20_000] ^= 1
    store.put(f"{prefix}/{damaged}", bytes(content))
    assert "CRC32 mismatch" in run("verify", f"{root}/step-2", status=1)
    store.delete(f"{prefix}/{damaged}")
    assert "the file is missing" in run("verify", f"{root}/step-2", status=1)
    last = next(key for key in s3.keys(root) if key.endswith(".distcp") and key.count("_") == 4)
    store.delete(f"{prefix}/{last}")
    assert "the file is missing" in run("verify", f"{root}/step-2", status=1)


async def test_a_step_that_is_damaged_in_a_store_is_passed_over(s3: S3Server) -> None:
    root, storage = s3.url(), s3.storage(object_bytes=1 << 20)
    async with CheckpointManager(root, checkpointer=Checkpointer(storage=storage)) as manager:
        for step in (1, 2):
            await (await manager.save(step, _state())).uploaded
        piece = next(key for key in s3.keys(f"{root}/step-2") if key.endswith("_0.distcp"))
        await storage.remove(manager.path(2), piece)
        state = _blank()
        with pytest.raises(CorruptError, match="the file is missing"):
            await manager.restore(state)
        assert await manager.restore(state, fall_back=True) == 1
    _assert_loaded(state)


async def test_entering_and_restoring_take_few_requests_however_large_the_checkpoint(proxy: FaultProxy) -> None:
    root, server = proxy.server.url(), proxy.server
    async with CheckpointManager(root, checkpointer=Checkpointer(storage=server.storage(object_bytes=1 << 18))) as m:
        for step in range(1, 6):
            await (await m.save(step, _state())).uploaded
    proxy.requests.clear()
    async with CheckpointManager(root, checkpointer=Checkpointer(storage=server.storage())) as manager:
        assert proxy.verbs() == ["LIST", *["GET"] * 5]
        proxy.requests.clear()
        state = _blank()
        proxy.fault = nth(1, "reset", verb="GET", name="_2.distcp")
        assert await manager.restore(state) == 5
    _assert_loaded(state)
    pieces = len({request.path for request in proxy.requests if ".distcp" in request.path})
    # One listing, one read for each step, the metadata, and of each piece its end and its content.
    assert len(proxy.requests) <= 1 + 5 + 1 + 2 * pieces + 4

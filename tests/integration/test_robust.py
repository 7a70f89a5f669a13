"""Hostile files, odd file systems, neighbours, failures at bad moments: each is reported by name, or lived with."""

from __future__ import annotations

import asyncio
import errno
import io
import logging
import multiprocessing
import os
import pickle
import shutil
import stat
import struct
import subprocess
import sys
import warnings
import zipfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from aiodcp import (
    CaptureError,
    Checkpointer,
    CheckpointError,
    CheckpointManager,
    CorruptError,
    LoadError,
    LocalStorage,
    MemoryStorage,
    ReadError,
    Retry,
    SaveError,
    StageError,
    UnsafeError,
    WriteError,
)
from aiodcp._distributed import channel
from aiodcp._format import metadata_pickle, plain_data
from aiodcp._format.metadata_reader import read_metadata
from aiodcp._format.seal import FOOT_NBYTES
from aiodcp.manager.steps import remove_step
from aiodcp.storage import Writer, file_access, file_io, local
from aiodcp.testing import FaultyStorage, Gate

from ..support.commit_gate import CommitGated
from ..support.states import blank, make_state

STATE = {"w": torch.arange(12.0).view(3, 4), "n": 1}


async def _save(place: Path, state: dict[str, Any] = STATE, **options: Any) -> None:
    async with Checkpointer(**options) as checkpointer:
        await (await checkpointer.save(state, place))


def _rewrite(place: Path, change: Callable[[Any], None]) -> None:
    metadata = pickle.loads((place / ".metadata").read_bytes())
    change(metadata)
    (place / ".metadata").write_bytes(pickle.dumps(metadata))


# --- file systems


async def test_a_file_system_that_cannot_sync_a_directory_is_lived_with_and_reported_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    answer = [errno.EINVAL]
    real = os.fsync

    def fsync(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(answer[0], os.strerror(answer[0]))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(file_io, "_cannot_sync", set())
    for name in ("a", "b"):
        await _save(tmp_path / name)
    assert caplog.text.count("does not support fsync on directories") == 1
    answer[0] = errno.EIO
    with pytest.raises(WriteError, match="Input/output error"):
        await _save(tmp_path / "c", retry=Retry(attempts=1))


async def test_a_listing_that_lags_behind_fails_no_save(tmp_path: Path) -> None:
    class Stale(LocalStorage):
        async def list_files(self, checkpoint_id: str) -> list[str]:
            return []

    await _save(tmp_path / "a", storage=Stale())
    assert (tmp_path / "a" / ".metadata").exists()


@pytest.mark.parametrize("name", ["data", ".metadata"])
async def test_what_is_no_regular_file_is_not_opened(name: str, tmp_path: Path) -> None:
    await _save(tmp_path / "a")
    path = next((tmp_path / "a").glob("*.distcp")) if name == "data" else tmp_path / "a" / name
    path.unlink()
    os.mkfifo(path)
    async with Checkpointer() as checkpointer:
        with pytest.raises(ReadError, match="not a regular file"):
            await checkpointer.load(blank(STATE), tmp_path / "a")


async def test_links_are_followed_within_the_checkpoint_and_from_a_snapshot_to_its_blobs(tmp_path: Path) -> None:
    cache = tmp_path / "models--org--name"
    snapshot = cache / "snapshots" / "0123" / "step-1"
    await _save(snapshot)
    (cache / "blobs").mkdir()
    for number, path in enumerate(sorted(snapshot.iterdir())):
        blob = cache / "blobs" / str(number)
        path.rename(blob)
        path.symlink_to(os.path.relpath(blob, snapshot))
    (tmp_path / "latest").symlink_to(snapshot)
    async with Checkpointer() as checkpointer:
        for place in (snapshot, tmp_path / "latest"):
            target = blank(STATE)
            await checkpointer.load(target, place)
            assert torch.equal(target["w"], STATE["w"])  # type: ignore[arg-type]
        await _save(tmp_path / "b")
        for path in (tmp_path / "b").glob("*.distcp"):
            path.rename(tmp_path / "outside")
            path.symlink_to("../outside")
        with pytest.raises(UnsafeError, match=f"resolves to {tmp_path / 'outside'}, which is outside the checkpoint"):
            await checkpointer.load(blank(STATE), tmp_path / "b")


class FailsToClose(LocalStorage):
    """Each file's last write is refused when it is closed, as a full server does; what was begun cannot be removed."""

    async def remove(self, checkpoint_id: str, name: str, *, durable: bool = False) -> None:
        raise OSError(errno.EACCES, "Permission denied")

    @asynccontextmanager
    async def create(self, checkpoint_id: str, name: str) -> AsyncIterator[Writer]:  # type: ignore[override]
        async with super().create(checkpoint_id, name) as writer:
            yield writer
            raise OSError(errno.EIO, "Input/output error, of close")


async def test_the_first_cause_is_reported_and_not_what_it_has_left_behind(tmp_path: Path) -> None:
    with pytest.raises(WriteError, match="Input/output error, of close"):
        await _save(tmp_path / "a", storage=FailsToClose(), retry=Retry(attempts=3, wait_s=0.001))


def _save_as_another_user(root: Path) -> None:
    with CheckpointManager(root.with_name("own")) as manager:  # imports what the other user may not read
        manager.save_sync(1, STATE).wait()
    os.setgid(65534)
    os.setuid(65534)
    with CheckpointManager(root) as manager:
        manager.save_sync(2, STATE).wait()


@pytest.mark.skipif(os.getuid() != 0, reason="becomes another user")
def test_a_second_user_saves_into_a_shared_root(tmp_path: Path) -> None:
    root = tmp_path / "shared"
    root.mkdir()
    for above in (root, *root.parents):
        if str(above) not in ("/", "/tmp"):
            above.chmod(0o777)
    with CheckpointManager(root) as manager:
        manager.save_sync(1, STATE).wait()
    assert stat.S_IMODE((root / ".aiodcp.lock").stat().st_mode) & 0o022 == 0
    # Not forked from this process, whose threads and torch's a child does not have.
    child = multiprocessing.get_context("forkserver").Process(target=_save_as_another_user, args=(root,))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    with CheckpointManager(root) as manager:
        assert manager.steps() == [1, 2]


def test_the_soft_limit_of_open_files_is_raised_and_the_hard_one_named(monkeypatch: pytest.MonkeyPatch) -> None:
    limits, given = [(64, 4096)], []
    monkeypatch.setattr("resource.getrlimit", lambda which: limits[0])
    monkeypatch.setattr("resource.setrlimit", lambda which, limit: given.append(limit))
    channel._ensure_descriptors(1000)
    [(soft, hard)] = given
    assert 1000 < soft < 2000
    assert hard == 4096
    limits[0] = (64, 128)
    with pytest.raises(
        CheckpointError, match=r"Too many open files: .* takes 1\d\d\d descriptors, and RLIMIT_NOFILE allows 128"
    ):
        channel._ensure_descriptors(1000)
    limits[0] = (100_000, 100_000)
    given.clear()
    channel._ensure_descriptors(1000)
    assert not given


# --- hostile files


def _chain_of_indices() -> bytes:
    """Each index is the name and the offset of the next: to hash the last takes 2^60 calls. Nothing else is odd."""
    begin = b"\x80\x02ctorch.distributed.checkpoint.metadata\nMetadataIndex\nq\x00X\x03\x00\x00\x00fqnq\x01"
    begin += b"X\x06\x00\x00\x00offsetq\x02X\x05\x00\x00\x00indexq\x03"
    begin += b"X\x01\x00\x00\x00aq\x04X\x01\x00\x00\x00bq\x05"
    links = b""
    for number in range(6, 66):
        before = b"h%c" % (number - 1)
        links += b"h\x00)\x81q%c}(h\x01%sh\x02%sh\x03Nub" % (number, before, before)
    return begin + links.replace(b"h\x00", b"0h\x00", 0) + b"}(h%cNu." % 65


def _bombs(good: bytes) -> dict[str, bytes]:
    nested: Any = [1]
    tuples: Any = (1,)
    for _ in range(60):
        nested, tuples = [nested, nested], (tuples, tuples)

    def changed(change: Callable[[Any], None]) -> bytes:
        metadata = pickle.loads(good)
        change(metadata)
        return pickle.dumps(metadata)

    def offset(metadata: Any) -> None:
        for info in metadata.storage_data.values():
            info.offset = nested

    def size(metadata: Any) -> None:
        metadata.state_dict_metadata["w"].size = tuples

    def none(metadata: Any) -> None:
        metadata.state_dict_metadata["w"] = None

    def too_many_elements(metadata: Any) -> None:
        metadata.state_dict_metadata["w"].chunks[0].sizes = torch.Size([3, 5])

    def index(metadata: Any) -> None:
        metadata.storage_data["w"] = next(iter(metadata.storage_data.values()))

    def name(metadata: Any) -> None:
        metadata.state_dict_metadata[5] = metadata.state_dict_metadata["w"]

    def paths(metadata: Any) -> None:
        metadata.planner_data = (1.5,)

    def number(metadata: Any) -> None:
        next(iter(metadata.storage_data.values())).offset = -(1 << 20_000)

    return {
        "a memo index of gigabytes": b"\x80\x02K\x00r\xff\xff\xff\x07.",
        "a deep tuple as a key": b"\x80\x02})" + b"\x85" * 1_000_000 + b"K\x01s.",
        "an exponential key": b"\x80\x02})" + b"q\x00h\x00\x86" * 60 + b"K\x01s.",
        "indices of indices": _chain_of_indices(),
        "a set of tuples": b"\x80\x04\x8f()" + b"q\x00h\x00\x86" * 60 + b"\x90.",
        "a text of gigabytes": b"\x80\x02X\xff\xff\xff\x7f.",
        "a text of exabytes": b"\x80\x04\x8d" + b"\xff" * 7 + b"\x7f.",
        "a number of megabytes": b"\x80\x02\x8b\x00\x00\x10\x00" + b"\1" * (1 << 20) + b".",
        "an end without a value": b"\x80\x02.",
        "no end": b"\x80\x02",
        "a pop of nothing": b"\x80\x02u.",
        "an offset that cannot be printed": changed(offset),
        "a size that cannot be compared": changed(size),
        "an entry of None": changed(none),
        "a chunk beyond its tensor": changed(too_many_elements),
        "an index that is a str": changed(index),
        "a name that is an int": changed(name),
        "keys that are a tuple": changed(paths),
        "an offset of 6,000 digits": changed(number),
    }


async def test_metadata_that_would_take_memory_time_or_the_stack_is_refused(tmp_path: Path) -> None:
    await _save(tmp_path / "a")
    path = tmp_path / "a" / ".metadata"
    for name, data in _bombs(path.read_bytes()).items():
        with pytest.raises(CorruptError) as caught:
            read_metadata(data, "m")
            pytest.fail(name)
        assert len(str(caught.value)) < 300, name


@pytest.mark.parametrize("name", ["a\0b", "a\udcff\ud800", "", "a/../../b", "/etc/passwd", ".."])
async def test_a_file_name_that_is_none_is_refused(name: str, tmp_path: Path) -> None:
    await _save(tmp_path / "a")

    def change(metadata: Any) -> None:
        for info in metadata.storage_data.values():
            info.relative_path = name

    _rewrite(tmp_path / "a", change)
    async with Checkpointer() as checkpointer:
        with pytest.raises((CorruptError, UnsafeError, ReadError)):
            await checkpointer.load(blank(STATE), tmp_path / "a")


async def test_every_bit_of_metadata_is_checked_by_load_and_by_the_custom_metadata(tmp_path: Path) -> None:
    place = tmp_path / "a"
    async with Checkpointer() as checkpointer:
        await (await checkpointer.save({"w": torch.ones(2)}, place, custom_metadata={"lr": 0.5}))
        good = (place / ".metadata").read_bytes()
        for position in range(len(good)):
            for bit in range(8):
                damaged = bytearray(good)
                damaged[position] ^= 1 << bit
                with pytest.raises(CorruptError):
                    read_metadata(bytes(damaged), "m")
        for position in range(0, len(good), 7):
            damaged = bytearray(good)
            damaged[position] ^= 1 << position % 8
            (place / ".metadata").write_bytes(damaged)
            target = {"w": torch.zeros(2)}
            with pytest.raises(CorruptError):
                await checkpointer.load(target, place)
            assert not target["w"].any()
        for position in range(
            len(good) - len('{"lr":0.5}') - FOOT_NBYTES, len(good)
        ):  # the custom metadata and its seal; the pickle is not read for it
            damaged = bytearray(good)
            damaged[position] ^= 1 << position % 8
            (place / ".metadata").write_bytes(damaged)
            with pytest.raises(CorruptError):
                await checkpointer.read_custom_metadata(place)


def _archive(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def _repacked(data: bytes, compression: int) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(file, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return file.getvalue()


def _overlapping(data: bytes) -> bytes:
    """The directory says twice that a record lies where the first one does."""
    records = bytearray(data)
    [end] = [data.rindex(b"PK\5\6")]
    [start] = struct.unpack_from("<I", data, end + 16)
    second = data.index(b"PK\1\2", start + 1)
    records[second + 42 : second + 46] = data[start + 42 : start + 46]
    return bytes(records)


@pytest.mark.parametrize("kind", ["compressed", "overlapping"])
async def test_archives_that_torch_does_not_write_are_refused(kind: str, tmp_path: Path) -> None:
    dcp.save({"t": torch.ones(300)}, checkpoint_id=str(tmp_path / "t"), no_dist=True)
    await _save(tmp_path / "s", {"s": torch.eye(3).to_sparse()})
    for name, value in (("t", torch.ones(300)), ("s", torch.eye(3).to_sparse())):
        packed = _archive(value)
        data = _repacked(packed, zipfile.ZIP_DEFLATED) if kind == "compressed" else _overlapping(packed)

        def change(metadata: Any, name: str = name, data: bytes = data) -> None:
            for index, info in metadata.storage_data.items():
                if index.fqn == name:
                    info.relative_path, info.offset, info.length = "bomb.distcp", 0, len(data)

        _rewrite(tmp_path / name, change)
        (tmp_path / name / "bomb.distcp").write_bytes(data)
        async with Checkpointer() as checkpointer:
            with pytest.raises(CorruptError, match=r"it has compressed records|it has records that overlap"):
                await checkpointer.load({name: torch.zeros_like(value)}, tmp_path / name)


# --- what has no bounds


def test_a_state_that_is_nested_too_deeply_is_named() -> None:
    deep: Any = torch.ones(2)
    for _ in range(5000):
        deep = {"n": deep}
    loop: dict[str, Any] = {"w": torch.ones(1)}
    loop["self"] = loop
    with Checkpointer(storage=MemoryStorage(), no_dist=True) as checkpointer:
        for state, name in (({"a": deep}, r"a\.n\.n\."), (loop, r"self\.self\.")):
            with pytest.raises(CaptureError, match=rf"{name}.*is nested too deeply"):
                checkpointer.save_sync(state, "a")
        checkpointer.save_sync(STATE, "a").wait()
        with pytest.raises(LoadError, match="nested too deeply"):
            checkpointer.load_sync({"a": deep}, "a")


def test_no_memory_for_a_value_is_an_error_of_ours_and_not_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*arguments: Any, **options: Any) -> Any:
        raise MemoryError

    with Checkpointer(storage=MemoryStorage(), no_dist=True) as checkpointer:
        with monkeypatch.context() as patch:
            patch.setattr("aiodcp.checkpointer.save_calls.take", no_memory)
            with pytest.raises(StageError, match="out of host memory"):
                checkpointer.save_sync(STATE, "a")
        with monkeypatch.context() as patch:
            patch.setattr("aiodcp._save.staging.Arena", no_memory)
            with pytest.raises(SaveError, match="MemoryError"):
                checkpointer.save_sync(STATE, "a").wait()
        checkpointer.save_sync(STATE, "a").wait()
        with monkeypatch.context() as patch:
            patch.setattr("aiodcp._load.file_reads.Scratch", no_memory)
            with pytest.raises(LoadError, match="MemoryError"):
                checkpointer.load_sync(blank(STATE), "a")


def test_a_warning_that_is_an_error_is_no_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.load

    def load(*arguments: Any, **options: Any) -> Any:
        warnings.warn("Validating sparse tensor invariants because weights_only=True", stacklevel=2)
        return real(*arguments, **options)

    monkeypatch.setattr(torch, "load", load)
    with Checkpointer(storage=MemoryStorage(), no_dist=True) as checkpointer:
        checkpointer.save_sync({"s": torch.eye(3).to_sparse()}, "a").wait()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            target = {"s": torch.zeros(3, 3).to_sparse()}
            checkpointer.load_sync(target, "a")
    assert torch.equal(target["s"].to_dense(), torch.eye(3))
    assert plain_data.quietly(lambda: 3) == 3


# --- the newest, and what is to be kept


async def test_the_order_of_steps_is_that_of_their_commits_whatever_the_clocks_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, (step, clock) in enumerate([(100, 10_000.0), (200, 20_000.0), (150, 5_000.0), (160, 1.0)]):
        monkeypatch.setattr("time.time", lambda clock=clock: clock)
        async with CheckpointManager(tmp_path, keep_last=2) as manager:
            assert manager.latest == [None, 100, 200, 150][number]
            await (await manager.save(step, STATE))
            assert manager.latest == step
    async with CheckpointManager(tmp_path) as manager:
        assert manager.steps() == [150, 160]
        assert await manager.restore(blank(STATE)) == 160
        noted = await manager.checkpointer.read_custom_metadata(manager.path(160))
    assert noted["commit_number"] == 4


async def test_a_root_from_before_the_numbers_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with Checkpointer() as checkpointer:  # on a host that is an hour ahead
        for step, saved_at in ((1, 7_000.0), (2, 7_200.0)):
            await (await checkpointer.save(STATE, tmp_path / f"step-{step}", custom_metadata={"saved_at": saved_at}))
    monkeypatch.setattr("time.time", lambda: 3_600.0)
    async with CheckpointManager(tmp_path) as manager:
        assert manager.latest == 2
        await (await manager.save(3, STATE))
        assert manager.latest == 3
    async with CheckpointManager(tmp_path) as manager:
        assert manager.latest == 3
        await manager.refresh()
        assert manager.latest == 3


async def test_two_managers_of_one_root_count_each_others_commits(tmp_path: Path) -> None:
    async with CheckpointManager(tmp_path) as one, CheckpointManager(tmp_path) as other:
        for manager, step in ((one, 5), (other, 4), (one, 3), (other, 2)):
            await (await manager.save(step, STATE))
        await one.refresh()
        assert one.latest == 2
    async with CheckpointManager(tmp_path) as manager:
        assert [each.step for each in manager._catalog.newest] == [2, 3, 4, 5]


@pytest.mark.parametrize("kind", ["a directory", "damaged", "refused"])
async def test_a_step_that_cannot_be_read_is_not_the_end_of_the_manager(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with CheckpointManager(tmp_path) as manager:
        for step in (1, 2, 3):
            await (await manager.save(step, {"w": torch.full((2,), float(step))}))

    def break_step(step: int) -> None:
        path = tmp_path / f"step-{step}" / ".metadata"
        if kind == "a directory":
            path.rename(path.with_name("kept"))
            path.mkdir()
        elif kind == "damaged":
            path.write_bytes(path.read_bytes()[:-1] + b"\0")
        else:
            real = file_access.open_regular

            def refuse(name: str, flags: int) -> int:
                if name == str(path):
                    raise PermissionError(errno.EACCES, "Permission denied", name)
                return real(name, flags)

            monkeypatch.setattr(local, "open_regular", refuse)

    break_step(1)
    async with CheckpointManager(tmp_path, keep_last=2) as manager:
        assert manager.steps() == [2, 3]
        assert "step-1 is unreadable, and is not listed as a step" in caplog.text
        assert await manager.restore({"w": torch.zeros(2)}) == 3
        await (await manager.save(4, STATE))
    assert (tmp_path / "step-1").exists()
    break_step(4)
    async with CheckpointManager(tmp_path) as manager:
        with pytest.raises(ReadError, match="this may be the latest step"):
            await manager.restore(dict(STATE))
        assert await manager.restore({"w": torch.zeros(2)}, fall_back=True) == 3


async def test_when_no_step_can_be_read_a_run_does_not_begin_anew(tmp_path: Path) -> None:
    async with CheckpointManager(tmp_path) as manager:
        await (await manager.save(1, STATE))
    (tmp_path / "step-1" / ".metadata").write_bytes(b"\0aiodcp2")
    async with CheckpointManager(tmp_path) as manager:
        for fall_back in (False, True):
            with pytest.raises((ReadError, CorruptError)):
                await manager.restore(blank(STATE), fall_back=fall_back)


async def test_a_removal_that_fails_half_way_is_tried_again_at_the_next_one(faulty: FaultyStorage) -> None:
    refused: list[str] = []

    def refuse(call: str) -> None:
        if call == "remove_tree" and not refused:
            refused.append(call)
            raise OSError(errno.EACCES, "Permission denied, this once")

    faulty.gate = refuse
    async with CheckpointManager(
        "root", checkpointer=Checkpointer(storage=faulty), keep_last=1, history=False
    ) as manager:
        for step in range(1, 5):
            await (await manager.save(step, STATE))
    assert refused
    assert {place for place, files in faulty.files.items() if files} == {"root/step-4"}


async def test_a_commit_whose_outcome_is_unknown_is_looked_at_again(faulty: FaultyStorage) -> None:
    """The rename is done, and what makes it durable fails."""
    real = MemoryStorage.put
    failing = [False]

    async def put(storage: MemoryStorage, checkpoint_id: str, name: str, data: bytes) -> None:
        await real(storage, checkpoint_id, name, data)
        if failing[0]:
            raise OSError(errno.EROFS, "Read-only file system, of the directory's fsync")

    storage = type("Storage", (MemoryStorage,), {"put": put})()
    async with CheckpointManager(
        "root", checkpointer=Checkpointer(storage=storage), keep_last=2, on_error="warn", history=False
    ) as manager:
        for step in (1, 2):
            await (await manager.save(step, STATE))
        failing[0] = True
        ckpt = await manager.save(3, STATE)
        assert ckpt.exception() is not None
        failing[0] = False
        await (await manager.save(4, STATE))
        await manager.refresh()
        assert manager.steps() == [3, 4]
    assert {place for place, files in storage.files.items() if files} == {"root/step-3", "root/step-4"}


async def test_a_listing_that_fails_after_the_commit_fails_nothing(faulty: FaultyStorage) -> None:
    class Unlisted(MemoryStorage):
        committed = False

        async def put(self, checkpoint_id: str, name: str, data: bytes) -> None:
            await super().put(checkpoint_id, name, data)
            Unlisted.committed = True

        async def list_files(self, checkpoint_id: str) -> list[str]:
            if Unlisted.committed:
                raise OSError(errno.EACCES, "Permission denied")
            return await super().list_files(checkpoint_id)

    async with Checkpointer(storage=Unlisted()) as checkpointer:
        await (await checkpointer.save(STATE, "a"))


async def test_metadata_of_data_that_is_gone_is_taken_back(tmp_path: Path) -> None:
    class Swept(LocalStorage):
        sweeps = False

        async def put(self, checkpoint_id: str, name: str, data: bytes) -> None:
            if Swept.sweeps:
                shutil.rmtree(checkpoint_id)
            await super().put(checkpoint_id, name, data)

    async with CheckpointManager(tmp_path, checkpointer=Checkpointer(storage=Swept())) as manager:
        await (await manager.save(1, STATE))
        Swept.sweeps = True
        with pytest.raises(SaveError, match="disappeared"):
            await (await manager.save(2, STATE))
        assert not (tmp_path / "step-2" / ".metadata").exists()
        assert await manager.restore(blank(STATE)) == 1


_PLAIN = """
import asyncio, sys, threading, torch
from contextlib import asynccontextmanager
from aiodcp import Checkpointer, LocalStorage

class Held(LocalStorage):
    async def put(self, checkpoint_id, name, data):
        print("written", flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
        await super().put(checkpoint_id, name, data)

with Checkpointer(storage=Held(), no_dist=True) as checkpointer:
    checkpointer.save_sync({"w": torch.ones(3)}, sys.argv[1]).wait()
print("saved", flush=True)
"""


@pytest.mark.parametrize("managers_before", [0, 1])
async def test_a_manager_removes_nothing_of_a_plain_checkpointers_save(managers_before: int, tmp_path: Path) -> None:
    for step in range(managers_before):
        async with CheckpointManager(tmp_path) as manager:
            await (await manager.save(step, STATE))
    command = [sys.executable, "-W", "ignore", "-c", _PLAIN, str(tmp_path / "step-9")]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    assert await asyncio.to_thread(other.stdout.readline) == "written\n"
    async with CheckpointManager(tmp_path, keep_last=1) as manager:
        for step in (5, 6):
            await (await manager.save(step, STATE))
    said, _ = await asyncio.to_thread(other.communicate, "\n")
    assert said == "saved\n"
    async with CheckpointManager(tmp_path) as manager:
        assert manager.steps() == [6, 9]


async def test_a_step_that_another_manager_saves_anew_outlives_its_removal() -> None:
    faulty = CommitGated()
    async with CheckpointManager("root", checkpointer=Checkpointer(storage=faulty), keep_last=1) as one:
        await (await one.save(1, STATE))
        async with CheckpointManager("root", checkpointer=Checkpointer(storage=faulty)) as other:
            gate = Gate("commit")
            faulty.gate = gate
            again = await other.save(1, make_state())
            await gate.wait_reached()
            faulty.gate = lambda call: None
            await (await one.save(2, STATE))  # and with it step 1 is one too many
            while "root/step-1" in faulty.files and ".metadata" in faulty.files["root/step-1"]:
                await asyncio.sleep(0.001)
            gate.open()
            await again
    async with Checkpointer(storage=faulty) as checkpointer:
        await checkpointer.load(blank(make_state()), "root/step-1")


async def test_a_step_that_is_saved_anew_between_two_looks_at_it_outlives_its_removal() -> None:
    class Late(MemoryStorage):
        """Another process commits just after the metadata has been removed."""

        async def list_files(self, checkpoint_id: str) -> list[str]:
            if other and ".metadata" not in self.files[checkpoint_id]:
                self.files[checkpoint_id] |= other
            return await super().list_files(checkpoint_id)

    other: dict[str, bytes] = {}
    storage = Late()
    async with Checkpointer(storage=storage) as checkpointer:
        await (await checkpointer.save(STATE, "other"))
        state = make_state()
        await (await checkpointer.save(state, "root/step-1"))
    other = storage.files["other"]
    storage.files["root/step-1"] |= {name: data for name, data in other.items() if name != ".metadata"}
    await remove_step(storage, "root/step-1", set())
    assert storage.files["root/step-1"] == other
    async with Checkpointer(storage=storage) as checkpointer:
        await checkpointer.load(blank(STATE), "root/step-1")


def test_no_handler_is_left_on_the_log() -> None:
    assert not logging.getLogger("aiodcp").handlers


async def _newest(root: Path) -> tuple[int, float]:
    async with CheckpointManager(root) as manager:
        state = {"w": torch.zeros(1)}
        restored = await manager.restore(state)
        assert restored == manager.latest
        return int(restored or 0), float(state["w"])


async def _step(manager: CheckpointManager, step: int, value: float | None = None) -> None:
    await (await manager.save(step, {"w": torch.tensor([float(step if value is None else value)])}))


async def test_a_copy_of_a_root_has_the_same_newest_step_and_retention_keeps_it(tmp_path: Path) -> None:
    dcp.save({"w": torch.ones(1)}, checkpoint_id=str(tmp_path / "a" / "step-1"), no_dist=True)
    async with CheckpointManager(tmp_path / "a") as manager:
        for step in (2, 3):
            await _step(manager, step)
    shutil.copytree(tmp_path / "a", tmp_path / "b", copy_function=shutil.copyfile)  # without the times
    for root in (tmp_path / "a", tmp_path / "b"):
        assert await _newest(root) == (3, 3.0)
    async with CheckpointManager(tmp_path / "b", keep_last=2) as manager:
        await _step(manager, 4)
    async with CheckpointManager(tmp_path / "b") as manager:
        assert manager.steps() == [3, 4]


async def test_a_known_step_that_others_save_anew_is_counted(tmp_path: Path) -> None:
    async with CheckpointManager(tmp_path / "a") as one:
        await _step(one, 1)
        async with CheckpointManager(tmp_path / "a") as other:
            for value in (11, 12, 13):
                await _step(other, 1, value)
        await _step(one, 2)
    assert await _newest(tmp_path / "a") == (2, 2.0)
    async with CheckpointManager(tmp_path / "b") as manager:
        await _step(manager, 1)
        await _step(manager, 2)
        dcp.save({"w": torch.full((1,), 7.0)}, checkpoint_id=str(tmp_path / "b" / "step-1"), no_dist=True)
        await _step(manager, 3)
    assert await _newest(tmp_path / "b") == (3, 3.0)
    async with Checkpointer() as checkpointer:  # and nobody counts it
        await (await checkpointer.save({"w": torch.full((1,), 9.0)}, tmp_path / "b" / "step-2"))
    assert await _newest(tmp_path / "b") == (2, 9.0)


async def test_the_number_of_a_step_that_cannot_be_read_is_not_used_again(tmp_path: Path) -> None:
    async with CheckpointManager(tmp_path) as manager:
        for step in (1, 2, 3):
            await _step(manager, step)
    path = tmp_path / "step-3" / ".metadata"
    path.rename(path.with_name("kept"))
    path.mkdir()
    async with CheckpointManager(tmp_path) as manager:
        await _step(manager, 2, 22)
    path.rmdir()
    path.with_name("kept").rename(path)
    assert await _newest(tmp_path) == (2, 22.0)


async def test_a_latest_step_that_cannot_be_read_is_not_passed_over_also_if_the_run_had_gone_back(
    tmp_path: Path,
) -> None:
    async with CheckpointManager(tmp_path) as manager:
        for step in (10, 20, 30, 15):
            await _step(manager, step)
    path = tmp_path / "step-15" / ".metadata"
    path.write_bytes(path.read_bytes()[:-12] + bytes(12))
    async with CheckpointManager(tmp_path) as manager:
        with pytest.raises(ReadError, match="this may be the latest"):
            await manager.restore({"w": torch.zeros(1)})
        assert await manager.restore({"w": torch.zeros(1)}, fall_back=True) == 30


def test_a_refused_file_leaves_nothing_behind_in_the_process() -> None:
    """A state with slots sets attributes of whatever it is given to: here of the classes that metadata names."""
    attributes = b"}q\x01(X\x07\x00\x00\x00plantedK\x01u"
    for module, name in metadata_pickle._GLOBALS:
        named = f"c{module}\n{name}\n".encode()
        with pytest.raises(CheckpointError):
            read_metadata(b"\x80\x02" + attributes + named + b"Nh\x01\x86b.", "m")
        assert not hasattr(metadata_pickle._GLOBALS[module, name], "planted"), name


async def test_a_place_whose_name_is_not_utf_8_is_one_like_any_other(tmp_path: Path) -> None:
    place = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    async with Checkpointer() as checkpointer:
        await (await checkpointer.save(STATE, place))
        target = blank(STATE)
        await checkpointer.load(target, place)
    assert torch.equal(target["w"], STATE["w"])  # type: ignore[arg-type]

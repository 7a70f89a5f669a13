"""The local file system's own: O_DIRECT, durability, odd file systems, locks between processes."""

import asyncio
import errno
import mmap
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from aiofiles.os import wrap

from aiodcp import ArgumentError, LocalStorage
from aiodcp.storage import file_lock, local


def pages(nbytes: int, first: int = 0) -> memoryview:
    """Page-aligned bytes, as an arena's."""
    memory = memoryview(mmap.mmap(-1, nbytes))
    memory[:] = bytes((first + n) % 251 for n in range(nbytes))
    return memory


async def test_o_direct_is_tried_once_and_given_up_where_it_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = []

    def refuse(path: str, flags: int) -> int:
        tries.append(path)
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(local, "open_direct", refuse)
    storage = LocalStorage()
    for name in ("one", "two"):
        async with storage.create(str(tmp_path), name) as writer:
            await writer.write(0, pages(8192))
    assert len(tries) == 1
    assert not storage.is_direct(str(tmp_path))
    assert (tmp_path / "two").read_bytes() == bytes(pages(8192))


async def test_o_direct_refused_by_the_write_itself_falls_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, direct = os.pwrite, []

    def pwrite(fd: int, data: memoryview, offset: int) -> int:
        if os.get_blocking(fd) and os.O_DIRECT & _flags(fd):
            direct.append(fd)
            raise OSError(22, "Invalid argument")
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    storage = LocalStorage()
    async with storage.create(str(tmp_path), "file") as writer:
        await writer.write(0, pages(8192))
    assert len(direct) == 1
    assert (tmp_path / "file").read_bytes() == bytes(pages(8192))
    assert not storage.is_direct(str(tmp_path))


def _flags(fd: int) -> int:
    import fcntl

    return fcntl.fcntl(fd, fcntl.F_GETFL)


async def test_short_writes_and_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_write, real_read = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real_write(fd, data[:1000], offset))
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: real_read(fd, [buffers[0][:7]], offset))
    storage = LocalStorage()
    async with storage.create(str(tmp_path), "file") as writer:
        await writer.write(0, pages(8192))
    async with storage.open(str(tmp_path), "file") as reader:
        back = [memoryview(bytearray(n)) for n in (10, 700, 1, 3000)]
        await reader.read_into(50, back)
    assert b"".join(back) == bytes(pages(8192)[50:3761])


async def test_more_buffers_than_one_system_call_takes(tmp_path: Path) -> None:
    storage = LocalStorage()
    async with storage.create(str(tmp_path), "file") as writer:
        await writer.write(0, pages(8192))
    async with storage.open(str(tmp_path), "file") as reader:
        back = [memoryview(bytearray(2)) for _ in range(3000)]
        await reader.read_into(1, back)
    assert b"".join(back) == bytes(pages(8192)[1:6001])


async def test_the_last_bytes_are_read_when_a_file_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = bytes(range(256)) * 256
    (tmp_path / "f").write_bytes(content)
    calls: list[int] = []

    def counted(fd: int, buffers: list[memoryview], offset: int) -> int:
        calls.append(offset)
        return real(fd, buffers, offset)

    real = os.preadv
    monkeypatch.setattr(os, "preadv", counted)
    async with LocalStorage().open(str(tmp_path), "f") as reader:
        stop, tail = len(content), local.TAIL_NBYTES
        for start, sizes in ((stop - tail, (tail,)), (stop - 10, (3, 7)), (stop - 5, (0, 2))):
            buffers = [memoryview(bytearray(size)) for size in sizes]
            await reader.read_into(start, buffers)
            assert b"".join(buffers) == content[start : start + sum(sizes)]
        assert not calls
        for start, size in ((stop - tail - 1, 10), (0, 100)):
            buffer = memoryview(bytearray(size))
            await reader.read_into(start, [buffer])
            assert buffer == content[start : start + size]
        assert len(calls) == 2
        with pytest.raises(EOFError):
            await reader.read_into(len(content) - 5, [memoryview(bytearray(6))])


@pytest.mark.filterwarnings("ignore:unclosed file")
def test_a_reader_that_nobody_closes_leaves_no_descriptor(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    before = os.listdir("/proc/self/fd")
    reader = local._LocalReader(str(tmp_path / "f"))
    assert len(os.listdir("/proc/self/fd")) == len(before) + 1
    del reader
    assert len(os.listdir("/proc/self/fd")) == len(before)


async def test_a_failed_put_leaves_the_old_content_and_no_temporary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = LocalStorage()
    await storage.put(str(tmp_path), ".metadata", b"old")

    def fail(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        await storage.put(str(tmp_path), ".metadata", b"new")
    assert await storage.list_files(str(tmp_path)) == [".metadata"]
    assert await storage.get(str(tmp_path), ".metadata") == b"old"


async def test_data_is_durable_before_its_name_and_a_commit_before_it_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(fd: int) -> None:
        events.append(f"fsync {Path(os.readlink(f'/proc/self/fd/{fd}')).name}")
        real_fsync(fd)

    def replace(source: str, target: str) -> None:
        events.append(f"rename {Path(target).name}")
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    storage = LocalStorage()
    place = str(tmp_path / "new")
    async with storage.create(place, "data") as writer:
        await writer.write(0, pages(4096))
    await storage.put(place, ".metadata", b"x")
    assert [re.sub(r"[0-9a-f]{32}", "*", event) for event in events] == [
        f"fsync {tmp_path.name}",
        "fsync data",
        "fsync new",
        "fsync .metadata.*.tmp",
        "rename .metadata",
        "fsync new",
    ]


async def test_a_place_of_anyones_is_forgotten_when_asked_for(tmp_path: Path) -> None:
    storage = LocalStorage()
    await storage.remove_if_empty(str(tmp_path))
    assert tmp_path.exists()
    (tmp_path / "mine").mkdir()
    await storage.remove_if_empty(str(tmp_path), made_by_anyone=True)
    assert (tmp_path / "mine").exists()
    await storage.remove_if_empty(str(tmp_path / "mine"), made_by_anyone=True)
    assert not (tmp_path / "mine").exists()


_HOLD = """
import asyncio, sys
from aiodcp import LocalStorage

async def main():
    async with LocalStorage().lock(sys.argv[1], exclusive=False) as held:
        print(held, flush=True)
        sys.stdin.read()

asyncio.run(main())
"""


async def test_a_claim_holds_against_other_processes_and_ends_with_them(tmp_path: Path) -> None:
    storage, root = LocalStorage(), str(tmp_path)
    other = subprocess.Popen(
        [sys.executable, "-c", _HOLD, root], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "True\n"
    async with storage.lock(root, exclusive=False) as together:
        assert together
    async with storage.lock(root, exclusive=True) as alone:
        assert not alone
    other.kill()
    other.communicate()
    async with storage.lock(root, exclusive=True) as alone:
        assert alone


async def test_where_the_file_system_has_no_locks_nobody_is_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(file_lock, "_lock", wrap(refuse))
    async with LocalStorage().lock(str(tmp_path), exclusive=True) as alone:
        assert not alone
    async with LocalStorage().lock(str(tmp_path), exclusive=False) as together:
        assert together


def test_a_tree_of_which_another_process_removes_something_meanwhile_is_removed_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = tmp_path / "step-1"
    (step / ".aiodcp").mkdir(parents=True)
    for name in ("data", ".aiodcp/lease", ".aiodcp/other", "z"):
        (step / name).write_bytes(b"1")
    unlink = os.unlink

    def quicker(path: Any, **options: Any) -> None:
        unlink(path, **options)
        if str(path).endswith("lease"):
            raise FileNotFoundError(2, "No such file or directory", path)

    monkeypatch.setattr(os, "unlink", quicker)
    asyncio.run(LocalStorage().remove_tree(str(step)))
    assert not step.exists()
    asyncio.run(LocalStorage().remove_tree(str(step)))


def test_a_relative_path_is_refused_when_the_working_directory_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(ArgumentError, match="'step-1' is relative, and the working directory has been removed"):
        LocalStorage().resolve("step-1")
    assert LocalStorage().resolve(str(tmp_path)) == str(tmp_path)

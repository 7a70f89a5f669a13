"""What every storage promises: one suite, run on each."""

import asyncio
import errno
import mmap
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import aiofiles.os
import pytest
from aiofiles.os import wrap

from aiodcp import LocalStorage, MemoryStorage, Storage
from aiodcp.storage import file_lock, local

from .conftest import FaultyStorage

Make = Callable[[], Storage]


@pytest.fixture(params=["direct", "buffered", "memory", "faulty"])
def storage(request: pytest.FixtureRequest) -> Storage:
    made: dict[str, Make] = {
        "direct": LocalStorage,
        "buffered": lambda: LocalStorage(direct=False),
        "memory": MemoryStorage,
        "faulty": FaultyStorage,
    }
    return made[request.param]()


@pytest.fixture
def place(tmp_path: Path) -> str:
    return str(tmp_path / "deep" / "checkpoint")


def pages(nbytes: int, first: int = 0) -> memoryview:
    """Page-aligned bytes, as an arena's."""
    memory = memoryview(mmap.mmap(-1, nbytes))
    memory[:] = bytes((first + n) % 251 for n in range(nbytes))
    return memory


async def test_what_is_written_is_read_back_from_any_place(storage: Storage, place: str) -> None:
    data = pages(5 * 4096)
    async with storage.create(place, "file") as writer:
        await writer.write(4096, data[4096:])
        await writer.write(0, data[:4096])
    async with storage.open(place, "file") as reader:
        assert reader.nbytes == data.nbytes
        one, two, none = memoryview(bytearray(3000)), memoryview(bytearray(9000)), memoryview(bytearray())
        await reader.read_into(123, [one, none, two])
    assert bytes(one) + bytes(two) == bytes(data[123 : 123 + 12000])


async def test_offsets_lengths_and_addresses_need_not_be_aligned(storage: Storage, place: str) -> None:
    data = pages(10000)
    async with storage.create(place, "file") as writer:
        await writer.write(0, data[:5])
        await writer.write(5, data[5:4096])
        await writer.write(4096, data[4096:8192])
        await writer.write(8192, data[8192:])
    async with storage.open(place, "file") as reader:
        back = memoryview(bytearray(10000))
        await reader.read_into(0, [back])
    assert back == data


async def test_a_read_past_the_end_is_told(storage: Storage, place: str) -> None:
    async with storage.create(place, "file") as writer:
        await writer.write(0, pages(4096))
    async with storage.open(place, "file") as reader:
        with pytest.raises(EOFError):
            await reader.read_into(4000, [memoryview(bytearray(97))])


async def test_a_file_is_there_only_if_its_block_was_left_without_error(storage: Storage, place: str) -> None:
    with pytest.raises(KeyError):
        async with storage.create(place, "file") as writer:
            await writer.write(0, pages(4096))
            raise KeyError
    assert await storage.names(place) == []


async def test_a_file_that_exists_is_not_created_again(storage: Storage, place: str) -> None:
    async with storage.create(place, "file") as writer:
        await writer.write(0, pages(4096))
    with pytest.raises(FileExistsError):
        async with storage.create(place, "file"):
            pass
    assert await storage.names(place) == ["file"]


async def test_put_replaces_and_get_returns(storage: Storage, place: str) -> None:
    await storage.put(place, ".metadata", b"one")
    await storage.put(place, ".metadata", b"another")
    assert await storage.get(place, ".metadata") == b"another"
    assert await storage.names(place) == [".metadata"]


async def test_what_is_not_there_is_not_found(storage: Storage, place: str) -> None:
    with pytest.raises(FileNotFoundError):
        await storage.get(place, "nothing")
    with pytest.raises(FileNotFoundError):
        async with storage.open(place, "nothing"):
            pass
    assert await storage.names(place) == []
    await storage.remove(place, "nothing")
    await storage.discard(place)


async def test_discard_forgets_a_place_only_when_it_is_empty(storage: Storage, place: str) -> None:
    await storage.put(place, "a", b"1")
    await storage.discard(place)
    assert await storage.get(place, "a") == b"1"
    await storage.remove(place, "a")
    await storage.discard(place)
    assert await storage.names(place) == []
    assert not Path(place).exists()


async def test_what_was_given_may_change_afterwards(storage: Storage, place: str) -> None:
    data = pages(4096)
    before = bytes(data)
    async with storage.create(place, "file") as writer:
        await writer.write(0, data)
        data[:] = bytes(4096)
    async with storage.open(place, "file") as reader:
        back = memoryview(bytearray(4096))
        await reader.read_into(0, [back])
    assert bytes(back) == before


async def test_a_name_is_located_for_messages(storage: Storage) -> None:
    assert "here" in storage.locate("here")
    assert "file" in storage.locate("here", "file")


# --- the local file system's own


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


async def test_a_failed_put_leaves_the_old_content_and_no_temporary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = LocalStorage()
    await storage.put(str(tmp_path), ".metadata", b"old")

    def fail(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(local, "fsync", wrap(fail))
    with pytest.raises(OSError, match="No space left"):
        await storage.put(str(tmp_path), ".metadata", b"new")
    assert await storage.names(str(tmp_path)) == [".metadata"]
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

    monkeypatch.setattr(local, "fsync", wrap(fsync))
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(aiofiles.os, "replace", wrap(replace))
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


async def test_places_are_those_right_below(storage: Storage, tmp_path: Path) -> None:
    root = str(tmp_path / "root")
    assert await storage.places(root) == []
    for place in ("step-2", "step-10", "deep/inside"):
        await storage.put(f"{root}/{place}", "file", b"1")
    await storage.put(root, "no-place", b"1")
    assert await storage.places(root) == ["deep", "step-10", "step-2"]
    assert await storage.places(f"{root}/no-place") == []


async def test_a_place_of_anyones_is_forgotten_when_asked_for(tmp_path: Path) -> None:
    storage = LocalStorage()
    await storage.discard(str(tmp_path))
    assert tmp_path.exists()
    (tmp_path / "mine").mkdir()
    await storage.discard(str(tmp_path), made_by_anyone=True)
    assert (tmp_path / "mine").exists()
    await storage.discard(str(tmp_path / "mine"), made_by_anyone=True)
    assert not (tmp_path / "mine").exists()


async def test_claims_go_together_but_for_one_that_is_alone(storage: Storage, tmp_path: Path) -> None:
    root = str(tmp_path)
    async with storage.join(root):
        assert not list(tmp_path.iterdir())
    async with storage.claim(root, alone=False):  # of a place that nobody has ever claimed it cannot be told
        pass
    async with storage.claim(root, alone=True) as first:
        assert first
        async with storage.claim(root, alone=True) as second:
            assert not second
        waiting = asyncio.ensure_future(_claimed(storage, root))
        await asyncio.sleep(0)
        assert not waiting.done()
    assert await waiting
    async with storage.claim(root, alone=False) as one, storage.claim(root, alone=False) as other:
        assert one
        assert other
        async with storage.claim(root, alone=True) as alone:
            assert not alone
    async with storage.join(root) as joined:
        assert joined
        async with storage.claim(root, alone=True) as alone:
            assert not alone
    async with storage.claim(root, alone=True) as again:
        assert again


async def _claimed(storage: Storage, root: str) -> bool:
    async with storage.claim(root, alone=False) as held:
        return held


_HOLD = """
import asyncio, sys
from aiodcp import LocalStorage

async def main():
    async with LocalStorage().claim(sys.argv[1], alone=False) as held:
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
    async with storage.claim(root, alone=False) as together:
        assert together
    async with storage.claim(root, alone=True) as alone:
        assert not alone
    other.kill()
    other.communicate()
    async with storage.claim(root, alone=True) as alone:
        assert alone


async def test_where_the_file_system_has_no_locks_nobody_is_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(file_lock, "_lock", wrap(refuse))
    async with LocalStorage().claim(str(tmp_path), alone=True) as alone:
        assert not alone
    async with LocalStorage().claim(str(tmp_path), alone=False) as together:
        assert together

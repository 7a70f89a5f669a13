"""What every storage promises, as tests: subclass the suite, and say how a storage is made."""

from __future__ import annotations

import asyncio
import mmap
from abc import ABC, abstractmethod
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..checkpointer.checkpointer import Checkpointer
from ..manager.manager import CheckpointManager
from ..storage.base import Storage

PAGE = 4096


class StorageSuite(ABC):
    """The tests that a storage must pass. Each makes a storage of its own, and uses it below a root of its own."""

    @abstractmethod
    def make_storage(self) -> Storage:
        """Return the storage to be tested: one that sees what another one made by this has written."""

    def make_root(self, tmp_path: Path) -> str:
        """Return a checkpoint_id below which nothing is; by default a directory that does not exist yet."""
        return str(tmp_path / "root")

    # --- files

    def test_what_is_written_is_read_back_from_any_offset(self, tmp_path: Path) -> None:
        async def check(storage: Storage, path: str) -> None:
            data = _pages(5 * PAGE)
            async with storage.create(path, "file") as writer:
                await writer.write(PAGE, data[PAGE:])
                await writer.write(0, data[:PAGE])
            async with storage.open(path, "file") as reader:
                assert reader.nbytes == data.nbytes
                one, none, two = (memoryview(bytearray(nbytes)) for nbytes in (3000, 0, 9000))
                await reader.read_into(123, [one, none, two])
            assert bytes(one) + bytes(two) == bytes(data[123 : 123 + 12000])

        self._run(check, tmp_path)

    def test_offsets_lengths_and_addresses_need_not_be_aligned(self, tmp_path: Path) -> None:
        async def check(storage: Storage, path: str) -> None:
            data = _pages(10000)
            async with storage.create(path, "file") as writer:
                for start, stop in ((0, 5), (5, PAGE), (PAGE, 2 * PAGE), (2 * PAGE, 10000)):
                    await writer.write(start, data[start:stop])
            assert await _read(storage, path, "file") == data

        self._run(check, tmp_path)

    def test_several_writes_and_reads_may_be_under_way_at_once(self, tmp_path: Path) -> None:
        async def check(storage: Storage, path: str) -> None:
            data = _pages(64 * PAGE)
            starts = range(0, data.nbytes, PAGE)
            async with storage.create(path, "file") as writer:
                await asyncio.gather(*(writer.write(start, data[start : start + PAGE]) for start in reversed(starts)))
            back = memoryview(bytearray(data.nbytes))
            async with storage.open(path, "file") as reader:
                await asyncio.gather(*(reader.read_into(start, [back[start : start + PAGE]]) for start in starts))
            assert back == data

        self._run(check, tmp_path)

    def test_a_read_past_the_end_raises_eoferror(self, tmp_path: Path) -> None:
        async def check(storage: Storage, path: str) -> None:
            async with storage.create(path, "file") as writer:
                await writer.write(0, _pages(PAGE))
            async with storage.open(path, "file") as reader:
                with _raises(EOFError):
                    await reader.read_into(PAGE - 96, [memoryview(bytearray(97))])

        self._run(check, tmp_path)

    def test_a_file_is_there_only_if_its_block_was_left_without_an_error(self, tmp_path: Path) -> None:
        async def check(storage: Storage, path: str) -> None:
            with _raises(KeyError):
                async with storage.create(path, "file") as writer:
                    await writer.write(0, _pages(PAGE))
                    raise KeyError
            assert await storage.list_files(path) == []

        self._run(check, tmp_path)

    def test_a_cancelled_write_leaves_no_file(self, tmp_path: Path) -> None:
        async def check(storage: Storage, path: str) -> None:
            async def write() -> None:
                async with storage.create(path, "file") as writer:
                    await writer.write(0, _pages(PAGE))
                    begun.set()
                    await asyncio.Event().wait()

            begun = asyncio.Event()
            task = asyncio.ensure_future(write())
            await begun.wait()
            task.cancel()
            with _raises(asyncio.CancelledError):
                await task
            assert await storage.list_files(path) == []

        self._run(check, tmp_path)

    def test_a_file_that_exists_is_not_created_again(self, tmp_path: Path) -> None:
        async def check(storage: Storage, path: str) -> None:
            async with storage.create(path, "file") as writer:
                await writer.write(0, _pages(PAGE))
            with _raises(FileExistsError):
                async with storage.create(path, "file"):
                    pass
            assert await storage.list_files(path) == ["file"]

        self._run(check, tmp_path)

    def test_what_was_written_may_change_afterwards(self, tmp_path: Path) -> None:
        async def check(storage: Storage, path: str) -> None:
            data = _pages(PAGE)
            before = bytes(data)
            async with storage.create(path, "file") as writer:
                await writer.write(0, data)
                data[:] = bytes(PAGE)
            assert await _read(storage, path, "file") == before

        self._run(check, tmp_path)

    # --- whole values

    def test_put_replaces_and_get_returns(self, tmp_path: Path) -> None:
        async def check(storage: Storage, path: str) -> None:
            await storage.put(path, ".metadata", b"one")
            await storage.put(path, ".metadata", b"another")
            assert await storage.get(path, ".metadata") == b"another"
            assert await storage.list_files(path) == [".metadata"]

        self._run(check, tmp_path)

    def test_readers_see_the_value_before_or_after_a_put(self, tmp_path: Path) -> None:
        async def check(storage: Storage, path: str) -> None:
            values = [bytes([number]) * 50_000 for number in range(20)]
            await storage.put(path, "value", values[0])

            async def put() -> None:
                for value in values:
                    await storage.put(path, "value", value)

            putting = asyncio.ensure_future(put())
            while not putting.done():
                assert await storage.get(path, "value") in values
                await asyncio.sleep(0)  # a storage in memory may not
            await putting
            assert await storage.list_files(path) == ["value"]

        self._run(check, tmp_path)

    # --- names

    def test_what_is_not_there_is_not_found(self, tmp_path: Path) -> None:
        async def check(storage: Storage, path: str) -> None:
            with _raises(FileNotFoundError):
                await storage.get(path, "nothing")
            with _raises(FileNotFoundError):
                async with storage.open(path, "nothing"):
                    pass
            assert await storage.list_files(path) == []
            assert await storage.file_sizes(path) == {}
            assert await storage.list_children(path) == []
            await storage.remove(path, "nothing")
            await storage.remove_if_empty(path)
            await storage.remove_tree(path)

        self._run(check, tmp_path)

    def test_files_are_listed_with_their_sizes(self, tmp_path: Path) -> None:
        async def check(storage: Storage, path: str) -> None:
            for name, nbytes in (("b", 3), ("a", 0), (".c", 5000)):
                await storage.put(path, name, bytes(nbytes))
            assert await storage.list_files(path) == [".c", "a", "b"]
            assert await storage.file_sizes(path) == {".c": 5000, "a": 0, "b": 3}

        self._run(check, tmp_path)

    def test_children_are_those_right_below(self, tmp_path: Path) -> None:
        async def check(storage: Storage, root: str) -> None:
            for child in ("step-2", "step-10", "deep/inside"):
                await storage.put(f"{root}/{child}", "file", b"1")
            await storage.put(root, "a-file", b"1")
            assert await storage.list_children(root) == ["deep", "step-10", "step-2"]
            assert await storage.list_children(f"{root}/a-file") == []

        self._run(check, tmp_path)

    def test_a_name_is_described_for_messages(self, tmp_path: Path) -> None:
        async def check(storage: Storage, path: str) -> None:
            assert "root" in storage.describe(path)
            assert "file" in storage.describe(path, "file")

        self._run(check, tmp_path)

    def test_an_id_resolves_to_one_spelling(self, tmp_path: Path) -> None:
        async def check(storage: Storage, path: str) -> None:
            assert storage.resolve(storage.resolve(path)) == storage.resolve(path)

        self._run(check, tmp_path)

    # --- removing

    def test_a_checkpoint_is_removed_if_it_is_empty(self, tmp_path: Path) -> None:
        async def check(storage: Storage, path: str) -> None:
            await storage.put(path, "a", b"1")
            await storage.remove_if_empty(path)
            assert await storage.get(path, "a") == b"1"
            await storage.remove(path, "a", durable=True)
            await storage.remove_if_empty(path)
            assert await storage.list_files(path) == []

        self._run(check, tmp_path)

    def test_a_tree_is_removed_and_its_neighbour_stays(self, tmp_path: Path) -> None:
        async def check(storage: Storage, root: str) -> None:
            for child in ("step-1", "step-1/below", "step-10"):
                await storage.put(f"{root}/{child}", "file", b"1")
            await storage.remove_tree(f"{root}/step-1")
            assert await storage.list_files(f"{root}/step-1") == []
            assert await storage.list_files(f"{root}/step-1/below") == []
            assert await storage.get(f"{root}/step-10", "file") == b"1"

        self._run(check, tmp_path)

    # --- locks

    def test_shared_locks_go_together_and_wait_for_an_exclusive_one(self, tmp_path: Path) -> None:
        async def check(storage: Storage, root: str) -> None:
            async with storage.lock(root, exclusive=False):  # else it may not be able to tell
                pass
            async with storage.lock(root, exclusive=True) as first:
                assert first
                async with storage.lock(root, exclusive=True) as second:
                    assert not second
                waiting = asyncio.ensure_future(_locked(storage, root))
                await asyncio.sleep(0)
                assert not waiting.done()
            assert await waiting
            async with storage.lock(root, exclusive=False) as one, storage.lock(root, exclusive=False) as other:
                assert one
                assert other
                async with storage.lock(root, exclusive=True) as third:
                    assert not third
            async with storage.lock(root, exclusive=False, create=False) as joined:
                assert joined
                async with storage.lock(root, exclusive=True) as fourth:
                    assert not fourth
            async with storage.lock(root, exclusive=True) as again:
                assert again

        self._run(check, tmp_path)

    def test_a_shared_lock_that_must_not_create_leaves_nothing(self, tmp_path: Path) -> None:
        async def check(storage: Storage, root: str) -> None:
            async with storage.lock(root, exclusive=False, create=False):
                assert await storage.list_files(root) == []

        self._run(check, tmp_path)

    # --- all together

    def test_a_checkpoint_is_saved_replaced_and_loaded(self, tmp_path: Path) -> None:
        async def check(storage: Storage, path: str) -> None:
            async with Checkpointer(storage=storage, no_dist=True) as checkpointer:
                for number in range(2):
                    saved: dict[str, Any] = {"w": torch.arange(5000.0) + number, "step": number}
                    await checkpointer.save(saved, path)
            async with Checkpointer(storage=self.make_storage_again(storage), no_dist=True) as checkpointer:
                loaded: dict[str, Any] = {"w": torch.zeros(5000), "step": -1}
                await checkpointer.load(loaded, path)
            assert torch.equal(loaded["w"], saved["w"])
            assert loaded["step"] == 1
            assert len(await storage.list_files(path)) == 2

        self._run(check, tmp_path)

    def test_steps_are_kept_removed_and_restored(self, tmp_path: Path) -> None:
        async def check(storage: Storage, root: str) -> None:
            checkpointer = Checkpointer(storage=storage, no_dist=True)
            async with CheckpointManager(root, checkpointer=checkpointer, keep_last=2) as manager:
                for step in (1, 2, 3):
                    await (await manager.save(step, {"w": torch.full((3,), float(step))})).uploaded
            assert await storage.list_children(root) == ["step-2", "step-3"]
            again = Checkpointer(storage=self.make_storage_again(storage), no_dist=True)
            async with CheckpointManager(root, checkpointer=again) as manager:
                state = {"w": torch.zeros(3)}
                assert await manager.restore(state) == 3
            assert state["w"].tolist() == [3.0] * 3

        self._run(check, tmp_path)

    def make_storage_again(self, storage: Storage) -> Storage:
        """Return a storage that sees what `storage` holds; override it for one that forgets with its object."""
        return self.make_storage()

    def _run(self, check: Any, tmp_path: Path) -> None:
        storage = self.make_storage()
        coroutine: Coroutine[Any, Any, None] = check(storage, storage.resolve(self.make_root(tmp_path)))
        asyncio.run(coroutine)


def _pages(nbytes: int) -> memoryview:
    """Page-aligned bytes, as those of a staging buffer."""
    memory = memoryview(mmap.mmap(-1, nbytes))
    memory[:] = bytes(number % 251 for number in range(nbytes))
    return memory


@contextmanager
def _raises(kind: type[BaseException]) -> Iterator[None]:
    try:
        yield
    except kind:
        return
    raise AssertionError(f"did not raise {kind.__name__}")


async def _read(storage: Storage, path: str, name: str) -> bytes:
    async with storage.open(path, name) as reader:
        back = memoryview(bytearray(reader.nbytes))
        await reader.read_into(0, [back])
    return bytes(back)


async def _locked(storage: Storage, root: str) -> bool:
    async with storage.lock(root, exclusive=False) as held:
        return held

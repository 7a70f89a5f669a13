"""What every storage promises, for each that comes with the library."""

from __future__ import annotations

from pathlib import Path

import pytest

from aiodcp import LocalStorage, MemoryStorage, Retry, Storage
from aiodcp.storage.retry import RetryingStorage
from aiodcp.testing import FaultyStorage, StorageSuite


class TestLocalStorage(StorageSuite):
    def make_storage(self) -> Storage:
        return LocalStorage()


class TestBufferedLocalStorage(StorageSuite):
    def make_storage(self) -> Storage:
        return LocalStorage(direct=False)


class InMemory(StorageSuite):
    def make_storage_again(self, storage: Storage) -> Storage:
        return storage  # another object has other files


class TestMemoryStorage(InMemory):
    def make_storage(self) -> Storage:
        return MemoryStorage()


class TestFaultyStorage(InMemory):
    def make_storage(self) -> Storage:
        return FaultyStorage()


class TestRetryingStorage(InMemory):
    def make_storage(self) -> Storage:
        return RetryingStorage(MemoryStorage(), Retry(), lambda checkpoint_id, path, attempt: None)


class _KeepsHalfAFile(MemoryStorage):
    """A storage that breaks a promise: a file whose block is left by an error stays."""

    def create(self, checkpoint_id: str, name: str):  # type: ignore[no-untyped-def]
        self.files[checkpoint_id].setdefault(name, b"half")
        return super().create(checkpoint_id, f"{name}.part")


def test_a_storage_that_breaks_a_promise_does_not_pass(tmp_path: Path) -> None:
    class Suite(StorageSuite):
        def make_storage(self) -> Storage:
            return _KeepsHalfAFile()

    with pytest.raises(AssertionError):
        Suite().test_a_file_is_there_only_if_its_block_was_left_without_an_error(tmp_path)

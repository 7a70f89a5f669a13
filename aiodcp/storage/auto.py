"""The storage of a checkpoint by its id: a path is a directory, a URL an object store."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from urllib.parse import unquote

from .._log import SafeLogger
from ..errors import ArgumentError
from .base import ObjectLimits, Reader, Storage, Writer, file_dates, object_limits, remove_all
from .hub_cache import SCHEME, cached_snapshot
from .local import LocalStorage
from .object_store import ObjectStorage
from .object_urls import bucket_of, refuse_collapsed, scheme_of
from .retry import Attempt, Retry, RetryingStorage

log: SafeLogger = SafeLogger(__name__)


class AutoStorage:
    """Keep each checkpoint where its id says: what a `Checkpointer` has that is given no storage.

    `s3://bucket/...`, `gs://`, `az://`, `abfs://` and `memory://` are objects, by `ObjectStorage`, one for each bucket;
    a path, or `file://`, is a directory, by `LocalStorage`; `hf://` is one in the cache of Hugging Face's hub client.
    """

    def __init__(self) -> None:
        self._local = LocalStorage()
        self._stores: dict[str, ObjectStorage] = {}  # by the bucket's URL

    def __repr__(self) -> str:
        return f"AutoStorage({', '.join(map(repr, (self._local, *self._stores.values())))})"

    def find(self, checkpoint_id: str) -> Storage:
        """Return the storage that has the checkpoints of this id.

        Raises:
            ArgumentError: there is none for such a URL; says why.
        """
        scheme = scheme_of(checkpoint_id)
        if scheme is None or scheme == "file":
            return self._local
        bucket = bucket_of(checkpoint_id)
        if bucket not in self._stores:
            self._stores[bucket] = ObjectStorage.from_url(checkpoint_id)
        return self._stores[bucket]

    def resolve(self, checkpoint_id: str) -> str:
        refuse_collapsed(checkpoint_id)
        if scheme_of(checkpoint_id) == SCHEME:
            return self._local.resolve(cached_snapshot(checkpoint_id))
        if scheme_of(checkpoint_id) == "file":
            host, slash, path = checkpoint_id[len("file://") :].partition("/")
            if host not in ("", "localhost") or not path:
                raise ArgumentError("checkpoint_id", f"{checkpoint_id!r} is no path of this host: file:///path is one")
            return self._local.resolve(slash + unquote(path))
        return self.find(checkpoint_id).resolve(checkpoint_id)

    def describe(self, checkpoint_id: str, name: str = "") -> str:
        return self.find(checkpoint_id).describe(checkpoint_id, name)

    def limits(self, checkpoint_id: str) -> ObjectLimits | None:
        return object_limits(self.find(checkpoint_id), checkpoint_id)

    def create(self, checkpoint_id: str, name: str) -> AbstractAsyncContextManager[Writer]:
        return self.find(checkpoint_id).create(checkpoint_id, name)

    def open(self, checkpoint_id: str, name: str) -> AbstractAsyncContextManager[Reader]:
        return self.find(checkpoint_id).open(checkpoint_id, name)

    async def put(self, checkpoint_id: str, name: str, data: bytes) -> None:
        await self.find(checkpoint_id).put(checkpoint_id, name, data)

    async def put_new(self, checkpoint_id: str, name: str, data: memoryview) -> None:
        await self._stores[bucket_of(checkpoint_id)].put_new(checkpoint_id, name, data)

    async def get(self, checkpoint_id: str, name: str) -> bytes:
        return await self.find(checkpoint_id).get(checkpoint_id, name)

    async def list_files(self, checkpoint_id: str) -> list[str]:
        return await self.find(checkpoint_id).list_files(checkpoint_id)

    async def file_sizes(self, checkpoint_id: str) -> dict[str, int]:
        return await self.find(checkpoint_id).file_sizes(checkpoint_id)

    async def list_children(self, root: str) -> list[str]:
        return await self.find(root).list_children(root)

    async def remove(self, checkpoint_id: str, name: str, *, durable: bool = False) -> None:
        await self.find(checkpoint_id).remove(checkpoint_id, name, durable=durable)

    async def remove_all(self, checkpoint_id: str, names: Sequence[str]) -> None:
        await remove_all(self.find(checkpoint_id), checkpoint_id, names)

    async def dates(self, checkpoint_id: str) -> dict[str, float]:
        return await file_dates(self.find(checkpoint_id), checkpoint_id)

    async def remove_if_empty(self, checkpoint_id: str, *, made_by_anyone: bool = False) -> None:
        await self.find(checkpoint_id).remove_if_empty(checkpoint_id, made_by_anyone=made_by_anyone)

    async def remove_tree(self, checkpoint_id: str) -> None:
        await self.find(checkpoint_id).remove_tree(checkpoint_id)

    def lock(self, root: str, *, exclusive: bool, create: bool = True) -> AbstractAsyncContextManager[bool]:
        return self.find(root).lock(root, exclusive=exclusive, create=create)


def locate(location: str, storage: Storage | None = None) -> tuple[Storage, str]:
    """Return the storage that a location is in, by default where it says, and its id there; a bucket with retries.

    Raises:
        ArgumentError: there is none for such a URL.
    """
    found = storage if storage is not None else AutoStorage()
    checkpoint_id = found.resolve(location)
    if storage is not None:
        return found, checkpoint_id
    if scheme_of(location) is None:
        return found, location  # as the caller calls it
    return RetryingStorage(found, Retry(), _report), checkpoint_id


def _report(checkpoint_id: str, path: str, attempt: Attempt) -> None:
    log.warning("%s: %s", path, attempt)

"""Checkpoints as objects of a bucket: S3, GCS, Azure and what speaks their protocols, by way of obstore.

Every file is one object, written by one PUT: there is no multipart upload that a killed process could leave behind,
but for objects over `SINGLE_PUT_NBYTES`. Objects appear whole or not at all, and are durable when the PUT is answered.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from functools import partial
from io import UnsupportedOperation
from typing import TYPE_CHECKING, Literal

import anyio
from anyio import CancelScope
from anyio.lowlevel import RunVar

from .._log import SafeLogger
from ..errors import ArgumentError
from .base import INTERNAL_DIRECTORY, ObjectLimits
from .leases import LEASE_S, PROBE, Leases
from .memory import MemoryWriter
from .object_errors import object_errors
from .object_files import Filling, ObjectReader
from .object_urls import check_url, keeps_buffers, make_store, path_below, url_of

if TYPE_CHECKING:
    from obstore import GetOptions, GetResult, ObjectMeta
    from obstore.store import ObjectStore

log: SafeLogger = SafeLogger(__name__)

OBJECT_NBYTES = 64 << 20  # a PUT of it takes a second at what a store gives one connection (about 85 MB/s)

CHUNK_NBYTES = 1 << 20  # of a GET's body that Python sees at once: each holds the GIL for a fraction of a millisecond

TAIL_NBYTES = 4 << 10  # of a file that is opened: its size and its last bytes are one request

GAP_NBYTES = 1 << 20  # 12 ms of one connection, less than a store takes to answer

GRACE_S = 1.0

LIST_PAGE = 1000  # objects: as many as a store lists in one answer

SLOWEST = 256 << 10  # bytes per second of one PUT: what is slower does not move

SINGLE_PUT_NBYTES = 4 << 30  # S3 refuses more than 5 GiB, Azure 5000 MiB


@asynccontextmanager
async def _grace() -> AsyncIterator[None]:
    """Let the block go on for `GRACE_S` when it is cancelled: a PUT that is given up may take effect afterwards.

    What the caller then removes comes back. By `CancelScope`s; a native `task.cancel()` ends the block at once.
    """
    failure: Exception | None = None
    async with anyio.create_task_group() as group:
        with CancelScope(shield=True) as scope:

            async def limit() -> None:
                try:
                    await anyio.sleep_forever()
                finally:
                    scope.deadline = min(scope.deadline, anyio.current_time() + GRACE_S)

            group.start_soon(limit)
            try:
                yield
            except Exception as error:  # out of the group, which would make a group of it
                failure = error
        group.cancel_scope.cancel()
    if failure is not None:
        raise failure


@asynccontextmanager
async def _not_held() -> AsyncIterator[bool]:
    yield False


class ObjectStorage:
    """Keep each checkpoint below a prefix of a bucket.

        store = obstore.store.S3Store("bucket", region="eu-central-1")
        async with aiodcp.Checkpointer(storage=aiodcp.ObjectStorage(store)) as checkpointer:
            await checkpointer.save(state, "run/step-10")  # or "s3://bucket/run/step-10"

    A `Checkpointer` without a storage makes one of these for each bucket that a URL names.

    Requests that fail for the moment (lost connections, time-outs, 429 and 5xx) are retried as the `Checkpointer`'s
    `retry` says, and reported. Give a store of your own `retry_config={"max_retries": 0}`, or it retries first, unseen.

    Args:
        store: of obstore, with or without a prefix.
        url: what to call it in ids and messages; by default as the store says (`s3://bucket/prefix`).
        object_bytes: of tensors in one object, at most: larger tensors are stored in several chunks.
        concurrency: requests with data under way at a time. Bytes in flight are at most that many objects; they are
            sent from the staging buffer, without a copy.
        request_timeout: seconds after which a request that is not answered has failed; a PUT may take longer, by a
            second for every 256 KiB.
        lease_s: seconds after which a process that saves and does not say so any more is taken for dead, by the
            store's clock: what it has left may then be removed.
    """

    def __init__(
        self,
        store: ObjectStore,
        *,
        url: str | None = None,
        object_bytes: int = OBJECT_NBYTES,
        concurrency: int = 16,
        request_timeout: float = 20.0,
        lease_s: float = LEASE_S,
    ) -> None:
        for name, number in (("object_bytes", object_bytes), ("concurrency", concurrency)):
            if type(number) is not int or number < 1:
                raise ArgumentError(name, f"must be a positive integer, got {number!r}")
        for name, seconds in (("request_timeout", request_timeout), ("lease_s", lease_s)):
            if type(seconds) not in (int, float) or not 0 < seconds < float("inf"):
                raise ArgumentError(name, f"must be a positive, finite number of seconds, got {seconds!r}")
        self._store = store
        self.url: str = url_of(store) if url is None else check_url(url)
        self._limits = ObjectLimits(object_nbytes=object_bytes, reads_at_once=concurrency, gap_nbytes=GAP_NBYTES)
        self._concurrency = concurrency
        self._timeout_s = float(request_timeout)
        self._slots: RunVar[anyio.Semaphore] = RunVar("slots")  # one for each event loop
        self._probing: RunVar[anyio.Lock] = RunVar("probing")
        self._copies = keeps_buffers(store)
        self._honours_create: bool | None = None  # not known yet
        self._locked: set[str] = set()  # roots
        self._leases = Leases(self, lease_s=float(lease_s))

    @classmethod
    def from_url(cls, url: str) -> ObjectStorage:
        """Return the storage of the bucket that a URL names, with the credentials of the environment.

        Raises:
            ArgumentError: there is no store for such a URL, or the extra `object` is not installed.
        """
        store, bucket = make_store(url)
        return cls(store, url=bucket)

    def __repr__(self) -> str:
        return f"ObjectStorage({self.url!r})"

    # --- names

    def resolve(self, checkpoint_id: str) -> str:
        """Return the URL; an id that is none is a path below the store's own.

        Raises:
            ArgumentError: it is in another bucket, or no path.
        """
        return "/".join(filter(None, (self.url, path_below(self.url, checkpoint_id))))

    def describe(self, checkpoint_id: str, name: str = "") -> str:
        return f"{checkpoint_id}/{name}" if name else checkpoint_id

    def _key(self, checkpoint_id: str, name: str = "") -> str:
        return "/".join(filter(None, (checkpoint_id[len(self.url) + 1 :], name)))

    def limits(self, checkpoint_id: str) -> ObjectLimits:
        return self._limits

    # --- writing

    async def put(self, checkpoint_id: str, name: str, data: bytes) -> None:
        try:
            with CancelScope(shield=True):
                await self._put(checkpoint_id, name, memoryview(data), "overwrite")
        except OSError as error:  # it may have taken effect, and only the answer be lost
            if isinstance(error, PermissionError) or not await self._holds(checkpoint_id, name, memoryview(data)):
                raise
            log.debug("%s: the answer to a PUT was lost, and it had taken effect", self.describe(checkpoint_id, name))

    async def put_new(self, checkpoint_id: str, name: str, data: memoryview) -> None:
        honours_create = await self._creates_conditionally(checkpoint_id)
        try:
            if not honours_create:
                await self._refuse_existing(checkpoint_id, name)
            await self._put(checkpoint_id, name, data, "create" if honours_create else "overwrite")
        except FileExistsError:  # perhaps by an attempt of ours whose answer was lost
            if not await self._holds(checkpoint_id, name, data):
                raise

    async def _refuse_existing(self, checkpoint_id: str, name: str) -> None:
        try:
            await self._head(checkpoint_id, name)
        except FileNotFoundError:
            return
        raise FileExistsError(f"{self.describe(checkpoint_id, name)} exists")

    async def _put(self, checkpoint_id: str, name: str, data: memoryview, mode: Literal["create", "overwrite"]) -> None:
        url = self.describe(checkpoint_id, name)
        is_single = data.nbytes <= SINGLE_PUT_NBYTES
        if self._copies:
            data = memoryview(bytes(data))
        view = data.cast("B")[:]
        try:
            async with self._slot(), _grace():
                with self._in_time("PUT", url, data.nbytes), object_errors("PUT", url):
                    await self._store.put_async(
                        self._key(checkpoint_id, name),
                        view,
                        mode=mode if is_single else "overwrite",
                        use_multipart=not is_single,
                        chunk_size=OBJECT_NBYTES,
                    )
        finally:
            if not self._copies:
                await self._release(view, url)

    async def _release(self, view: memoryview, url: str) -> None:
        """Wait until no request holds the memory any more, which the end of a cancelled one takes milliseconds for."""
        with CancelScope(shield=True):
            waited_s = 0.0
            while True:
                try:
                    view.release()
                    return
                except BufferError:
                    if waited_s > self._timeout_s:
                        # Not to be retried: the next attempt would share the memory with this one.
                        raise OSError(f"PUT {url}: given up, and the client still holds its bytes") from None
                await anyio.sleep(0.001)
                waited_s += 0.001

    async def _creates_conditionally(self, checkpoint_id: str) -> bool:
        """Whether the store refuses to make an object that exists, found out once."""
        if self._honours_create is None:
            probing = self._probing.get(None)
            if probing is None:
                probing = anyio.Lock()
                self._probing.set(probing)
            async with probing:
                if self._honours_create is None:
                    self._honours_create = await self._probe(checkpoint_id)
        return bool(self._honours_create)

    async def _probe(self, checkpoint_id: str) -> bool | None:
        """Try it: some stores ignore that they are asked to. Return None if it cannot be told now."""
        name = f"{INTERNAL_DIRECTORY}/{PROBE}{uuid.uuid4().hex}"
        try:
            await self._put(checkpoint_id, name, memoryview(b"1"), "create")
            await self._put(checkpoint_id, name, memoryview(b"2"), "create")
        except FileExistsError:
            return True
        except OSError as error:  # 501 or 400, which says so; or for the moment, which the PUT to come will meet, too
            log.debug("%s does not create objects conditionally: %s", self.url, error)
            return None if isinstance(error, ConnectionError | TimeoutError | PermissionError) else False
        finally:
            with CancelScope(shield=True):
                await self._remove_probe(checkpoint_id, name)
        return False

    async def _remove_probe(self, checkpoint_id: str, name: str) -> None:
        for attempt in range(3):
            try:
                await self.remove(checkpoint_id, name)
                return
            except OSError as error:  # who clears up here later removes it
                log.debug("%s could not be removed: %s", self.describe(checkpoint_id, name), error)
            await anyio.sleep(0.1 * attempt)

    async def _holds(self, checkpoint_id: str, name: str, data: memoryview) -> bool:
        """Whether an object has this content."""
        try:
            async with self.open(checkpoint_id, name) as reader:
                if reader.nbytes != data.nbytes:
                    return False
                piece = memoryview(bytearray(min(data.nbytes, CHUNK_NBYTES)))
                for start in range(0, data.nbytes, CHUNK_NBYTES):
                    part = piece[: min(len(piece), data.nbytes - start)]
                    await reader.read_into(start, [part])
                    if part != data.cast("B")[start : start + len(part)]:
                        return False
        except (OSError, EOFError):
            return False
        return True

    @asynccontextmanager
    async def create(self, checkpoint_id: str, name: str) -> AsyncIterator[MemoryWriter]:
        """Keep what is written in memory until the block is left. Saves use `put_new`, which copies nothing."""
        await self._refuse_existing(checkpoint_id, name)
        writer = MemoryWriter()
        yield writer
        await self.put_new(checkpoint_id, name, memoryview(writer.content))

    # --- reading

    @asynccontextmanager
    async def open(self, checkpoint_id: str, name: str) -> AsyncIterator[ObjectReader]:
        url, key = self.describe(checkpoint_id, name), self._key(checkpoint_id, name)
        try:
            meta, tail = await self._get(url, key, {"range": {"suffix": TAIL_NBYTES}})
        except UnsupportedOperation:  # Azure knows no suffix, and an empty object has none
            meta, tail = await self._head(checkpoint_id, name), b""
        yield ObjectReader(partial(self._read_range, url, key), meta, tail)

    async def get(self, checkpoint_id: str, name: str) -> bytes:
        _, content = await self._get(self.describe(checkpoint_id, name), self._key(checkpoint_id, name), {})
        return content

    async def _get(self, url: str, key: str, options: GetOptions) -> tuple[ObjectMeta, bytes]:
        with self._in_time("GET", url), object_errors("GET", url):
            found = await self._store.get_async(key, options=options)
        start, stop = found.range
        content = bytearray(stop - start)
        await self._fill(found, url, [memoryview(content)])
        return found.meta, bytes(content)

    async def _head(self, checkpoint_id: str, name: str) -> ObjectMeta:
        url = self.describe(checkpoint_id, name)
        with self._in_time("HEAD", url), object_errors("HEAD", url):
            return await self._store.head_async(self._key(checkpoint_id, name))

    async def _read_range(self, url: str, key: str, start: int, buffers: Sequence[memoryview]) -> None:
        """Fill `buffers`, one after the other, with the bytes of an object from `start` on, by one request.

        Raises:
            EOFError: the object ends before.
        """
        stop = start + sum(map(len, buffers))
        if stop == start:
            return
        async with self._slot():
            try:
                with self._in_time("GET", url), object_errors("GET", url):
                    found = await self._store.get_async(key, options={"range": (start, stop)})
            except UnsupportedOperation as error:
                raise EOFError(str(error)) from error
            if found.range != (start, stop):
                raise EOFError(f"{found.meta['size']} bytes, {stop} wanted")
            await self._fill(found, url, buffers)

    async def _fill(self, found: GetResult, url: str, buffers: Sequence[memoryview]) -> None:
        """Bring a body into `buffers`, which are as large; each chunk must come in time."""
        filling, chunks = Filling(buffers), aiter(found.stream(CHUNK_NBYTES))
        while True:
            with self._in_time("GET", url), object_errors("GET", url):
                chunk = await anext(chunks, None)
            if chunk is None:
                break
            if not filling.take(memoryview(chunk)):
                raise ConnectionError(f"GET {url}: more bytes came than were asked for")
        if filling.missing:
            raise ConnectionError(f"GET {url}: the body ended {filling.missing} bytes early")

    # --- listing and removing

    async def list_files(self, checkpoint_id: str) -> list[str]:
        return sorted(await self.file_sizes(checkpoint_id))

    async def file_sizes(self, checkpoint_id: str) -> dict[str, int]:
        objects = await self._list_files(checkpoint_id)
        return dict(sorted((each["path"].rpartition("/")[2], each["size"]) for each in objects))

    async def dates(self, checkpoint_id: str) -> dict[str, float]:
        """Return when each file was written, in seconds of the store's clock, by name."""
        objects = await self._list_files(checkpoint_id)
        return {each["path"].rpartition("/")[2]: each["last_modified"].timestamp() for each in objects}

    async def list_children(self, root: str) -> list[str]:
        url = self.describe(root)
        with self._in_time("LIST", url), object_errors("LIST", url):
            found = await self._store.list_with_delimiter_async(self._key(root) or None)
        names = {prefix.rstrip("/").rpartition("/")[2] for prefix in found["common_prefixes"]}
        return sorted(names - {INTERNAL_DIRECTORY})

    async def _list_files(self, checkpoint_id: str) -> list[ObjectMeta]:
        """Return the objects right below a prefix, of all that are below it: in a checkpoint they are almost all."""
        prefix = self._key(checkpoint_id)
        found = await self._list_tree(checkpoint_id)
        return [each for each in found if each["path"].rpartition("/")[0] == prefix]

    async def _list_tree(self, checkpoint_id: str) -> list[ObjectMeta]:
        """Return all objects below a prefix, page by page: each must come in time."""
        url, prefix = self.describe(checkpoint_id), self._key(checkpoint_id)
        pages = aiter(self._store.list(f"{prefix}/" if prefix else None, chunk_size=LIST_PAGE))
        found: list[ObjectMeta] = []
        while True:
            with self._in_time("LIST", url), object_errors("LIST", url):
                page = await anext(pages, None)
            if page is None:
                return found
            found += page

    async def remove(self, checkpoint_id: str, name: str, *, durable: bool = False) -> None:
        await self.remove_all(checkpoint_id, [name])

    async def remove_all(self, checkpoint_id: str, names: Sequence[str]) -> None:
        await self._delete(self.describe(checkpoint_id), [self._key(checkpoint_id, name) for name in names])

    async def _delete(self, url: str, keys: Sequence[str]) -> None:
        if not keys:
            return
        with CancelScope(shield=True):
            try:
                with self._in_time("DELETE", url, len(keys) << 12), object_errors("DELETE", url):
                    await self._store.delete_async(keys)
            except FileNotFoundError:  # of some stores, and then others of these may be there
                if len(keys) > 1:
                    for key in keys:
                        await self._delete(url, [key])

    async def remove_if_empty(self, checkpoint_id: str, *, made_by_anyone: bool = False) -> None:
        """Do nothing: a prefix is there while something is below it."""

    async def remove_tree(self, checkpoint_id: str) -> None:
        found = await self._list_tree(checkpoint_id)
        await self._delete(self.describe(checkpoint_id), [each["path"] for each in found])

    # --- locks

    def lock(self, root: str, *, exclusive: bool, create: bool = True) -> AbstractAsyncContextManager[bool]:
        """By leases, which are renewed while the block runs: see `leases`. They leave nothing behind.

        Without `create` a shared one is held only below a root on which this object has held one before: it may be that
        nothing may be written elsewhere. Else the value is False, and the caller locks what is its own.
        """
        if exclusive or create:
            self._locked.add(root)
        elif root not in self._locked:
            return _not_held()
        return self._leases.hold(root, exclusive=exclusive)

    # --- requests

    @asynccontextmanager
    async def _slot(self) -> AsyncIterator[None]:
        slots = self._slots.get(None)
        if slots is None:
            slots = anyio.Semaphore(self._concurrency)
            self._slots.set(slots)
        async with slots:
            yield

    @contextmanager
    def _in_time(self, verb: str, url: str, nbytes: int = 0) -> Iterator[None]:
        """End the block in time, or with an error that says what was not answered."""
        limit_s = self._timeout_s + nbytes / SLOWEST
        with anyio.move_on_after(limit_s) as scope:
            yield
        if scope.cancelled_caught:
            raise TimeoutError(f"{verb} {url}: no answer within {limit_s:.3g} s")

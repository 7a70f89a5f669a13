"""Object stores: what the storage suite does not ask, against a server of S3, and what a store may do wrong."""

from __future__ import annotations

import asyncio
import logging
import mmap
import os
import pickle
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import obstore.store
import pytest
import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

import aiodcp.storage.object_store as module
from aiodcp import (
    ArgumentError,
    Checkpointer,
    CheckpointManager,
    CorruptError,
    NotACheckpointError,
    ObjectStorage,
    ReadError,
    Retried,
    Retry,
    SaveCancelled,
    StageError,
    Storage,
    WriteError,
    joint_checkpoint,
)
from aiodcp.storage import AutoStorage, LocalStorage
from aiodcp.storage.object_urls import scheme_of
from aiodcp.testing import StorageSuite
from tests.support.devices import Driver
from tests.support.object_servers import (
    KEY_ID,
    SECRET,
    FaultProxy,
    Request,
    S3Server,
    always,
    azure_store,
    find_azurite,
    free_port,
    nth,
)

QUICK = Retry(attempts=4, wait_s=0.01)


@pytest.fixture(scope="module")
def azure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[obstore.store.AzureStore]:
    with azure_store(tmp_path_factory.mktemp("azurite")) as store:
        yield store


class _ObjectSuite(StorageSuite):
    store: obstore.store.ObjectStore

    def make_storage(self) -> Storage:
        return ObjectStorage(self.store)

    def make_root(self, tmp_path: Path) -> str:
        return f"{uuid4().hex}/root"


class TestOnS3(_ObjectSuite):
    @pytest.fixture(autouse=True)
    def _store(self, s3: S3Server) -> None:
        self.store = s3.store()


class TestOnAStoreThatIgnoresConditions(_ObjectSuite):
    @pytest.fixture(autouse=True)
    def _store(self, proxy: FaultProxy) -> None:
        proxy.fault = lambda request: "ignore_conditions"
        self.store = proxy.server.store()


class TestInMemory(_ObjectSuite):
    store = obstore.store.MemoryStore()


class TestBelowAPrefix(_ObjectSuite):
    @pytest.fixture(autouse=True)
    def _store(self, s3: S3Server) -> None:
        self.store = s3.store(prefix="some/prefix")


@pytest.mark.skipif(find_azurite() is None, reason="azurite is not installed: npm install -g azurite")
class TestOnAzure(_ObjectSuite):
    @pytest.fixture(autouse=True)
    def _store(self, azure: obstore.store.AzureStore) -> None:
        self.store = azure


def _state(seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "large": torch.randn(3, 700_000, generator=generator),
        "rows": torch.randn(1000, 500, generator=generator),
        "small": [torch.randn(10, generator=generator) for _ in range(20)],
        "empty": torch.empty(0, 4),
        "step": seed,
    }


def _blank() -> dict[str, Any]:
    return {
        "large": torch.zeros(3, 700_000),
        "rows": torch.zeros(1000, 500),
        "small": [torch.zeros(10) for _ in range(20)],
        "empty": torch.empty(0, 4),
        "step": -1,
    }


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    flat = [[each["large"], each["rows"], each["empty"], *each["small"]] for each in (one, other)]
    return one["step"] == other["step"] and all(torch.equal(a, b) for a, b in zip(*flat, strict=True))


# --- objects of a bounded size


@pytest.mark.parametrize("max_host_bytes", [None, 4 << 20])
async def test_a_save_is_objects_of_a_bounded_size_and_a_load_fills_the_tensors(
    s3: S3Server, max_host_bytes: int | None
) -> None:
    url = s3.url()
    storage = s3.storage(object_bytes=1 << 20)
    async with Checkpointer(storage=storage, max_host_bytes=max_host_bytes) as checkpointer:
        for seed in (1, 2):
            await (await checkpointer.save(_state(seed), url)).uploaded
        sizes = [each["size"] for each in s3.store().list(url.partition("/bucket/")[2]).collect()]
        assert max(sizes) <= (1 << 20) + 8192
        assert len(sizes) >= 10_400_000 >> 20
        loaded = _blank()
        report = await checkpointer.load(loaded, url)
    assert not report
    assert _same(loaded, _state(2))


async def test_objects_go_up_while_the_rest_is_staged(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second object is staged only when the first has been sent."""
    sent = asyncio.Event()
    put = ObjectStorage.put_new

    async def put_new(self: ObjectStorage, checkpoint_id: str, name: str, data: memoryview) -> None:
        await put(self, checkpoint_id, name, data)
        loop.call_soon_threadsafe(sent.set)

    loop = asyncio.get_running_loop()
    monkeypatch.setattr(ObjectStorage, "put_new", put_new)
    async with Checkpointer(storage=s3.storage(object_bytes=1 << 20), max_host_bytes=4 << 20) as checkpointer:
        ckpt = await checkpointer.save(_state(), s3.url())
        await asyncio.wait_for(sent.wait(), 30)
        await ckpt.uploaded


async def test_as_many_objects_are_under_way_as_the_argument_says(proxy: FaultProxy) -> None:
    proxy.fault = always("slow", verb="PUT", name=".distcp")
    for concurrency in (1, 3):
        proxy.most_at_once = 0
        storage = proxy.server.storage(object_bytes=1 << 20, concurrency=concurrency)
        async with Checkpointer(storage=storage) as checkpointer:
            await (await checkpointer.save(_state(), proxy.server.url())).uploaded
        assert proxy.most_at_once == concurrency


async def test_an_object_is_sent_from_the_callers_memory_and_lets_go_of_it(s3: S3Server) -> None:
    storage = s3.storage()
    memory = memoryview(mmap.mmap(-1, 32 << 20))
    memory[:] = os.urandom(1 << 20) * 32
    before = _resident_nbytes()
    await storage.put_new(storage.resolve(s3.url()), "file", memory)
    assert _resident_nbytes() - before < 16 << 20
    memory.release()  # raises, if a request still held it


def _resident_nbytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


async def test_a_cancelled_put_lets_go_of_the_memory_and_a_cancelled_save_leaves_nothing(proxy: FaultProxy) -> None:
    storage, url = proxy.server.storage(object_bytes=1 << 20), proxy.server.url()
    proxy.fault = always("hang", verb="PUT", name=".distcp")
    memory = memoryview(bytearray(8 << 20))
    putting = asyncio.ensure_future(storage.put_new(storage.resolve(url), "__0_0.distcp", memory))
    while not any(request.path.endswith(".distcp") for request in proxy.requests):
        await asyncio.sleep(0.01)
    putting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await putting
    memory.release()
    async with Checkpointer(storage=storage) as checkpointer:
        proxy.requests.clear()
        ckpt = await checkpointer.save(_state(), url)
        while not any(request.path.endswith(".distcp") for request in proxy.requests):
            await asyncio.sleep(0.01)
        ckpt.cancel()
        with pytest.raises(SaveCancelled):
            await ckpt.uploaded
    assert proxy.upstream.keys(url) == []


@pytest.mark.parametrize("moment_s", [0.0, 0.05, 0.15, 0.25, 0.35])
async def test_a_put_that_takes_effect_after_its_save_was_cancelled_leaves_nothing(
    proxy: FaultProxy, moment_s: float
) -> None:
    proxy.fault = always("slow", verb="PUT")
    url = proxy.server.url()
    async with Checkpointer(storage=proxy.server.storage(object_bytes=1 << 20)) as checkpointer:
        ckpt = await checkpointer.save(_state(), url)
        await asyncio.sleep(moment_s)
        ckpt.cancel()
        with pytest.raises(SaveCancelled):
            await ckpt.uploaded
    await asyncio.sleep(0.3)  # longer than a PUT takes
    assert proxy.upstream.keys(url) == []


async def test_what_is_too_large_for_one_put_goes_up_in_parts(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SINGLE_PUT_NBYTES", 1 << 20)
    monkeypatch.setattr(module, "OBJECT_NBYTES", 5 << 20)  # S3's parts are no smaller
    storage = s3.storage()
    path, data = storage.resolve(s3.url()), os.urandom(12 << 20)
    await storage.put_new(path, "file", memoryview(data))
    assert await storage.get(path, "file") == data


# --- the commit


async def test_a_put_whose_answer_is_lost_is_found_to_have_taken_effect(proxy: FaultProxy) -> None:
    url = proxy.server.url()
    seen: list[object] = []
    storage = proxy.server.storage(object_bytes=1 << 20)
    async with CheckpointManager(
        url, checkpointer=Checkpointer(storage=storage, retry=QUICK), on_event=seen.append
    ) as manager:
        lost = [nth(1, "lose_answer", verb="PUT", name=each) for each in ("_0.distcp", "/.metadata")]
        proxy.fault = lambda request: next(filter(None, (fault(request) for fault in lost)), None)
        await (await manager.save(1, _state(1))).uploaded
        loaded = _blank()
        assert await manager.restore(loaded) == 1
    assert _same(loaded, _state(1))
    assert [event.rank for event in seen if isinstance(event, Retried)] == [0]  # the data; the metadata is read back


async def test_an_object_of_the_same_name_with_other_content_is_refused(s3: S3Server) -> None:
    storage = s3.storage()
    path = storage.resolve(s3.url())
    await storage.put_new(path, "file", memoryview(b"one"))
    await storage.put_new(path, "file", memoryview(b"one"))
    with pytest.raises(FileExistsError, match=r"file"):
        await storage.put_new(path, "file", memoryview(b"two"))
    assert await storage.get(path, "file") == b"one"


async def test_a_probe_finds_out_whether_conditions_are_honoured_once(proxy: FaultProxy) -> None:
    storage = proxy.server.storage()
    path = storage.resolve(proxy.server.url())
    await asyncio.gather(*(storage.put_new(path, f"file{number}", memoryview(b"1")) for number in range(3)))
    assert sum("probe" in request.path and request.verb == "PUT" for request in proxy.requests) == 2
    assert sum(request.verb == "HEAD" for request in proxy.requests) == 0
    assert proxy.upstream.keys(path) == ["file0", "file1", "file2"]


# --- errors


async def test_errors_name_bucket_key_verb_and_the_stores_words_and_no_credential(
    proxy: FaultProxy, caplog: pytest.LogCaptureFixture
) -> None:
    url, server = proxy.server.url(), proxy.server
    state = {"w": torch.ones(3)}
    cases = {
        "forbid": "403 Forbidden (AccessDenied: Access Denied)",
        "signature": "403 Forbidden (SignatureDoesNotMatch",
        "slow_down": "503 Service Unavailable (SlowDown: Please reduce your request rate.)",
        "redirect": "incorrectly configured region",
        "reset": "PUT",
    }
    for fault, words in cases.items():
        proxy.fault = always(fault, verb="PUT", name=".distcp")
        async with Checkpointer(storage=server.storage(), retry=Retry(attempts=2, wait_s=0)) as checkpointer:
            ckpt = await checkpointer.save(state, url)
            with pytest.raises(WriteError) as caught:
                await ckpt.uploaded
        text = "".join(map(str, (caught.value, repr(caught.value), repr(caught.value.__cause__), caplog.text)))
        assert words in str(caught.value), fault
        assert f"PUT {url}/__0_0_" in str(caught.value), fault
        assert KEY_ID not in text
        assert SECRET not in text
        assert caught.value.path.startswith(f"{url}/__0_0_")
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    assert KEY_ID not in repr(server.storage())
    assert proxy.upstream.keys(url) == []


async def test_a_bucket_that_is_not_there_is_no_missing_checkpoint(s3: S3Server) -> None:
    storage = ObjectStorage(s3.store("no-such-bucket"))
    async with Checkpointer(storage=storage) as checkpointer:
        with pytest.raises(ReadError, match=r"GET s3://no-such-bucket/x/\.metadata.*NoSuchBucket.*no such bucket"):
            await checkpointer.load({"w": torch.ones(1)}, "s3://no-such-bucket/x")
        with pytest.raises(ReadError, match="no such bucket"):
            await checkpointer.read_custom_metadata("x")
        ckpt = await checkpointer.save({"w": torch.ones(1)}, "x")
        with pytest.raises(WriteError, match=r"PUT s3://no-such-bucket/.*no such bucket"):
            await ckpt.uploaded
    async with Checkpointer(storage=s3.storage()) as checkpointer:
        with pytest.raises(NotACheckpointError, match=r"s3://bucket/nothing"):
            await checkpointer.load({"w": torch.ones(1)}, "nothing")


async def test_an_endpoint_that_never_answers_is_an_error_in_time(proxy: FaultProxy) -> None:
    proxy.fault = always("hang")
    storage = proxy.server.storage(request_timeout=0.2)
    async with Checkpointer(storage=storage, retry=Retry(attempts=2, wait_s=0)) as checkpointer:
        with pytest.raises(ReadError, match=r"GET s3://bucket/x/\.metadata: no answer within 0\.2"):
            await asyncio.wait_for(checkpointer.load({"w": torch.ones(1)}, "x"), 20)
        ckpt = await checkpointer.save({"w": torch.ones(1)}, "x")
        with pytest.raises(WriteError, match=r"PUT s3://bucket/.*: no answer within 0\.2"):
            async with asyncio.timeout(20):
                await ckpt.uploaded


async def test_an_endpoint_where_nobody_listens_is_named(s3: S3Server) -> None:
    nobody = S3Server(f"http://127.0.0.1:{free_port()}")
    async with Checkpointer(storage=nobody.storage(), retry=Retry(attempts=2, wait_s=0)) as checkpointer:
        with pytest.raises(ReadError, match=r"GET s3://bucket/x/\.metadata: .*tcp connect error"):
            await checkpointer.load({"w": torch.ones(1)}, "x")


async def test_permission_to_write_and_not_to_delete_is_enough_to_save(
    proxy: FaultProxy, caplog: pytest.LogCaptureFixture
) -> None:
    url = proxy.server.url()
    proxy.fault = always("forbid", verb="DELETE")
    async with Checkpointer(storage=proxy.server.storage()) as checkpointer:
        for seed in (1, 2):
            await (await checkpointer.save(_state(seed), url)).uploaded
        loaded = _blank()
        await checkpointer.load(loaded, url)
    assert _same(loaded, _state(2))
    [warning] = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "DELETE" in warning.getMessage()
    assert "AccessDenied" in warning.getMessage()


async def test_a_save_writes_nothing_outside_its_own_prefix(proxy: FaultProxy) -> None:
    url = f"{proxy.server.url()}/mine"
    own = url.removeprefix("s3:/")
    proxy.fault = lambda request: "forbid" if request.verb == "PUT" and not request.path.startswith(own) else None
    async with Checkpointer(storage=proxy.server.storage()) as checkpointer:
        await (await checkpointer.save(_state(1), url)).uploaded
        loaded = _blank()
        await checkpointer.load(loaded, url)
    assert _same(loaded, _state(1))
    assert not any(".aiodcp" in key for key in proxy.upstream.keys(url))


@pytest.mark.parametrize("fault", ["slow_down", "reset"])
async def test_a_storm_of_refusals_is_weathered_and_reported(proxy: FaultProxy, fault: str) -> None:
    url = proxy.server.url()
    chances = random.Random(3)

    def storm(request: Request) -> str | None:
        return fault if chances.random() < 0.3 else None

    seen: list[object] = []
    checkpointer = Checkpointer(
        storage=proxy.server.storage(object_bytes=1 << 20), retry=Retry(attempts=40, wait_s=0.001, max_wait_s=0.01)
    )
    async with CheckpointManager(url, checkpointer=checkpointer, on_event=seen.append) as manager:
        proxy.fault = storm
        await (await manager.save(1, _state(1))).uploaded
        loaded = _blank()
        assert await manager.restore(loaded) == 1
        proxy.fault = lambda request: None
    assert _same(loaded, _state(1))
    assert len([event for event in seen if isinstance(event, Retried)]) >= 4


async def test_a_body_that_ends_early_is_read_again(proxy: FaultProxy) -> None:
    url = proxy.server.url()
    async with Checkpointer(storage=proxy.server.storage(object_bytes=1 << 20), retry=QUICK) as checkpointer:
        await (await checkpointer.save(_state(1), url)).uploaded
        faults = [nth(number, "truncate", verb="GET", name="_1.distcp") for number in (1, 3)]
        proxy.fault = lambda request: next(filter(None, [fault(request) for fault in faults]), None)
        loaded = _blank()
        await checkpointer.load(loaded, url)
    assert _same(loaded, _state(1))


async def test_a_missing_or_shortened_object_is_found_before_anything_changes(s3: S3Server) -> None:
    url = s3.url()
    storage = s3.storage(object_bytes=1 << 20)
    path = storage.resolve(url)
    async with Checkpointer(storage=storage) as checkpointer:
        await (await checkpointer.save(_state(1), url)).uploaded
        name = next(name for name in s3.keys(url) if name.endswith("_3.distcp"))
        content = await storage.get(path, name)
        for damage, problem in ((content[:-5000], "truncated"), (None, "the file is missing")):
            await storage.remove(path, name)
            if damage is not None:
                await storage.put(path, name, damage)
            loaded = _blank()
            with pytest.raises(CorruptError, match=problem):
                await checkpointer.load(loaded, url)
            assert _same(loaded, _blank())
        await storage.put(path, name, content[:9000] + b"?" + content[9001:])
        with pytest.raises(CorruptError, match="CRC32"):
            await checkpointer.load(_blank(), url)


# --- names


@pytest.mark.parametrize(
    ("id_", "problem"),
    [
        ("s3://other/run", r"is not in s3://bucket"),
        ("s3://bucketeer/run", r"is not in s3://bucket"),
        ("gs://bucket/run", r"is not in s3://bucket"),
        ("run/../secret", r'has a "\." or "\.\."'),
        ("s3://bucket/./run", r'has a "\." or "\.\."'),
        ("run\n", r"control character"),
        (str(Path("s3://bucket/run")), r"pathlib took a slash"),
        ("run/\udcff", r"not UTF-8"),
    ],
)
def test_an_id_that_is_elsewhere_or_no_objects_name_is_refused(s3: S3Server, id_: str, problem: str) -> None:
    with pytest.raises(ArgumentError, match=problem):
        s3.storage().resolve(id_)


def test_ids_have_one_spelling(s3: S3Server) -> None:
    storage = s3.storage()
    same = {
        storage.resolve(each)
        for each in ("run/a", "s3://bucket/run/a", "s3://bucket/run/a/", "/run//a", "S3://bucket/run/a")
    }
    assert same == {"s3://bucket/run/a"}
    assert ObjectStorage(s3.store(), url="s3://alias/x").resolve("a") == "s3://alias/x/a"


@pytest.mark.parametrize("name", ["a b#%2F+&?", "ü~", "[a]{b}", "step-1"])
async def test_names_with_odd_letters_are_stored_and_listed(s3: S3Server, name: str) -> None:
    storage, url = s3.storage(), f"{s3.url()}/{name}"
    async with Checkpointer(storage=storage) as checkpointer:
        await (await checkpointer.save({"w": torch.ones(3)}, url)).uploaded
        loaded = {"w": torch.zeros(3)}
        await checkpointer.load(loaded, url)
    assert loaded["w"].sum() == 3
    assert await storage.list_children(url.rpartition("/")[0]) == [name]


@pytest.mark.parametrize(
    ("argument", "value"),
    [("object_bytes", 0), ("object_bytes", 1.5), ("concurrency", 0), ("request_timeout", 0), ("lease_s", float("inf"))],
)
def test_arguments_are_checked(s3: S3Server, argument: str, value: float) -> None:
    with pytest.raises(ArgumentError, match=argument):
        s3.storage(**{argument: value})


def test_a_store_that_is_none_and_a_url_that_is_none_are_refused() -> None:
    with pytest.raises(ArgumentError, match="must be a store of obstore"):
        ObjectStorage("s3://bucket")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"must be a URL such as s3://bucket/prefix"):
        ObjectStorage(obstore.store.MemoryStore(), url="bucket")


# --- by URL


async def test_a_path_is_a_directory_and_a_url_is_a_bucket(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    files = [f"file://{tmp_path}/b%20c", f"file://{tmp_path}/b#1", f"file://localhost{tmp_path}/b?2"]
    places = [s3.url(), f"memory:///{uuid4().hex}", f"memory://{uuid4().hex}", str(tmp_path / "a"), *files]
    async with Checkpointer() as checkpointer:
        for number, place in enumerate(places):
            await checkpointer.prepare(_state(0), place)
            await (await checkpointer.save(_state(number), place)).uploaded
        for number, place in enumerate(places):
            loaded = _blank()
            await checkpointer.load(loaded, place)
            assert _same(loaded, _state(number)), place
    assert (tmp_path / "b c" / ".metadata").is_file()


@pytest.mark.skipif(find_azurite() is None, reason="azurite is not installed: npm install -g azurite")
@pytest.mark.parametrize("url", ["az://container/run", "abfs://container@devstoreaccount1.dfs.core.windows.net/run"])
async def test_azures_urls_find_account_and_key_in_the_environment(
    azure: obstore.store.AzureStore, monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    config = azure.config
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", config["account_name"])
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", config["account_key"])
    monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", config["endpoint"])
    async with Checkpointer() as checkpointer:
        await (await checkpointer.save(_state(5), url)).uploaded
        loaded = _blank()
        await checkpointer.load(loaded, url)
    assert _same(loaded, _state(5))


def test_a_scheme_is_found_by_its_name() -> None:
    storage = AutoStorage()
    assert isinstance(storage.find("relative/path"), LocalStorage)
    assert isinstance(storage.find("file:///x"), LocalStorage)
    assert isinstance(storage.find("memory://x/y"), ObjectStorage)
    assert storage.find("memory://x/y") is storage.find("memory://x/z")
    assert storage.find("memory://x/y") is not storage.find("memory://other/y")
    assert scheme_of("S3://x") == "s3"
    for bad, problem in (
        ("foo://x/y", r"is of no scheme that is known: s3://"),
        ("s3:///x", r"names no bucket"),
        ("file://host/x", r"is no path of this host"),
        ("file://", r"is no path of this host"),
        ("s3://user:secret@bucket/x", r"has no bucket's name before its path"),
        ("s3://bucket:9/x", r"has no bucket's name"),
        ("s3://[bad/x", r"has no bucket's name"),
        ("s3://bu\u2100ck/x", r"has no bucket's name"),
        (str(Path("s3://bucket/x")), r"pathlib took a slash"),
    ):
        with pytest.raises(ArgumentError, match=problem):
            storage.resolve(bad)


def test_a_profile_without_boto3_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID", raising=False)
    monkeypatch.setenv("AWS_PROFILE", "training")
    monkeypatch.setitem(__import__("sys").modules, "obstore.auth.boto3", None)
    with pytest.raises(ArgumentError, match="pip install boto3"):
        AutoStorage().resolve("s3://bucket/x")


async def test_a_profile_is_read_from_awss_files(
    proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "credentials").write_text(
        f"[training]\naws_access_key_id = {KEY_ID}\naws_secret_access_key = {SECRET}\n"
    )
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_PROFILE", "training")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.server.endpoint)
    async with Checkpointer() as checkpointer:
        await (await checkpointer.save({"w": torch.ones(3)}, proxy.server.url())).uploaded
    assert all(KEY_ID in request.headers["authorization"] for request in proxy.requests)


def test_without_the_extra_a_url_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "obstore", None)
    with pytest.raises(ArgumentError, match=r"s3:// needs obstore: pip install 'aiodcp\[object\]'"):
        AutoStorage().resolve("s3://bucket/x")


# --- what else is saved


async def test_a_joint_checkpoint_is_committed_as_one(s3: S3Server) -> None:
    url = s3.url()
    async with Checkpointer(storage=s3.storage(object_bytes=1 << 20)) as checkpointer:
        async with joint_checkpoint(checkpointer, url) as ckpt:
            ckpt.add("one", _state(1))
            ckpt.add("other", lambda: _state(2))
        loaded: dict[str, Any] = {"one": _blank(), "other": _blank()}
        await checkpointer.load(loaded, url)
    assert _same(loaded["one"], _state(1))
    assert _same(loaded["other"], _state(2))


class _Planner(DefaultSavePlanner):
    """A caller's own planner: its items are not cut."""


async def test_a_callers_own_planner_decides_what_an_object_holds(s3: S3Server) -> None:
    url = s3.url()
    for max_host_bytes in (None, 64 << 20):
        async with Checkpointer(storage=s3.storage(object_bytes=1 << 20), max_host_bytes=max_host_bytes) as one:
            await (await one.save(_state(1), url, planner=_Planner())).uploaded
            loaded = _blank()
            await one.load(loaded, url)
            assert _same(loaded, _state(1))
    async with Checkpointer(storage=s3.storage(object_bytes=1 << 20), max_host_bytes=4 << 20) as one:
        ckpt = await one.save(_state(1), url, planner=_Planner())
        with pytest.raises(StageError, match="cannot be cut, and is larger than a fourth of max_host_bytes"):
            await ckpt.uploaded


async def test_values_that_are_no_tensors_may_be_larger_than_the_host_memory_for_tensors(s3: S3Server) -> None:
    url = s3.url()
    state: dict[str, Any] = {"text": "x" * (3 << 20), "w": torch.ones(5)}
    async with Checkpointer(storage=s3.storage(object_bytes=1 << 20), max_host_bytes=2 << 20) as checkpointer:
        for saved in (state, {"text": state["text"]}):
            await (await checkpointer.save(saved, url)).uploaded
            loaded: dict[str, Any] = {"text": "", **({"w": torch.zeros(5)} if "w" in saved else {})}
            await checkpointer.load(loaded, url)
            assert loaded["text"] == state["text"]


@pytest.mark.parametrize("max_host_bytes", [None, 4 << 20])
async def test_tensors_of_devices_go_to_a_store_and_back(devices: Driver, max_host_bytes: int | None) -> None:
    storage = ObjectStorage(obstore.store.MemoryStore(), object_bytes=1 << 20)
    whole = torch.randn(3, 700_000)
    async with Checkpointer(storage=storage, max_host_bytes=max_host_bytes, no_dist=True) as checkpointer:
        on_device = {"w": devices.put(whole), "rows": devices.put(torch.ones(10))}
        await (await checkpointer.save(on_device, "run")).uploaded
        into = {"w": devices.put(torch.zeros(3, 700_000)), "rows": devices.put(torch.zeros(10))}
        await checkpointer.load(into, "run")
    assert torch.equal(torch.zeros(3, 700_000).copy_(into["w"]), whole)


async def test_without_credentials_the_error_says_so(
    proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.server.endpoint)
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", f"http://127.0.0.1:{free_port()}")
    async with Checkpointer(retry=Retry(attempts=1)) as checkpointer:
        with pytest.raises(ReadError, match=r"GET s3://bucket/x/\.metadata: no credentials: none in the environment"):
            await checkpointer.load({"w": torch.ones(1)}, "s3://bucket/x")


async def test_two_managers_on_one_root_know_of_each_others_steps(s3: S3Server) -> None:
    root = s3.url()
    one = CheckpointManager(root, checkpointer=Checkpointer(storage=s3.storage()))
    other = CheckpointManager(root, checkpointer=Checkpointer(storage=s3.storage()), keep_last=3)
    async with one, other:
        for number, manager in enumerate((one, other, one, other), start=1):
            await (await manager.save(number, _state(number))).uploaded
        assert await one.refresh() == [1, 2, 3, 4]
        assert one.latest == 4
        loaded = _blank()
        assert await other.restore(loaded) == 4
    assert _same(loaded, _state(4))

"""Servers of objects: moto as S3, azurite as Azure, each a process of its own, and a proxy with faults before them."""

from __future__ import annotations

import asyncio
import hmac
import re
import shutil
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from email.utils import formatdate
from pathlib import Path
from uuid import uuid4

from obstore.store import AzureStore, S3Store

from aiodcp import ObjectStorage

STARTS_WITHIN_S = 60.0

SECRET = "wJalrXUtnFEMISECRETSECRET"

KEY_ID = "AKIAIOSFODNN7EXAMPLE"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def process(command: list[str], url: str) -> Iterator[None]:
    """Run a server until the block is left, from when it answers."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            for _ in range(int(STARTS_WITHIN_S / 0.05)):
                assert server.poll() is None, f"{command[0]} ended: {server.returncode}"
                try:
                    urllib.request.urlopen(url, timeout=5).close()
                except urllib.error.HTTPError:
                    break
                except OSError:
                    threading.Event().wait(0.05)
                else:
                    break
            else:
                raise AssertionError(f"{command[0]} did not answer within {STARTS_WITHIN_S} s")
            yield
        finally:
            server.kill()


@dataclass(frozen=True)
class S3Server:
    """A server that speaks S3, by its address, and a bucket on it."""

    endpoint: str
    bucket: str = "bucket"

    @property
    def environment(self) -> dict[str, str]:
        """Of a process that finds it and its credentials there."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": KEY_ID,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
        }

    def store(self, bucket: str = "", prefix: str | None = None) -> S3Store:
        return S3Store(
            bucket or self.bucket,
            prefix=prefix,
            endpoint=self.endpoint,
            region="us-east-1",
            access_key_id=KEY_ID,
            secret_access_key=SECRET,
            client_options={"allow_http": True, "timeout": "1h"},
            retry_config={"max_retries": 0},
        )

    def storage(self, **options: float) -> ObjectStorage:
        return ObjectStorage(self.store(), **options)  # type: ignore[arg-type]

    def url(self) -> str:
        """Return a prefix below which nothing is."""
        return f"s3://{self.bucket}/{uuid4().hex}"

    def keys(self, url: str) -> list[str]:
        """Return the names of all objects below a URL, in order."""
        prefix = url.removeprefix(f"s3://{self.bucket}/")
        return sorted(each["path"].removeprefix(f"{prefix}/") for each in self.store().list(f"{prefix}/").collect())


@contextmanager
def s3_server() -> Iterator[S3Server]:
    """Run moto, with one bucket."""
    port = free_port()
    endpoint = f"http://127.0.0.1:{port}"
    with process([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], f"{endpoint}/moto-api/"):
        server = S3Server(endpoint)
        request = urllib.request.Request(f"{endpoint}/{server.bucket}", method="PUT")
        urllib.request.urlopen(request, timeout=30).close()
        yield server


def find_azurite() -> str | None:
    """Return the program that is a server of Azure's blobs; None if it is not installed."""
    return shutil.which("azurite-blob")


@contextmanager
def azure_store(folder: Path) -> Iterator[AzureStore]:
    """Run azurite, with one container."""
    program = find_azurite()
    assert program is not None
    port = free_port()
    command = [program, "--blobPort", str(port), "--location", str(folder), "--skipApiVersionCheck"]
    command += ["--silent", "--disableTelemetry"]
    account, key = (
        "devstoreaccount1",
        ("Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="),
    )
    endpoint = f"http://127.0.0.1:{port}/{account}"
    with process(command, endpoint):
        _make_container(f"{endpoint}/container", account, key)
        yield AzureStore(
            "container",
            account_name=account,
            account_key=key,
            endpoint=endpoint,
            client_options={"allow_http": True},
            retry_config={"max_retries": 0},
        )


def _make_container(url: str, account: str, key: str) -> None:
    """Make a container. Source: https://learn.microsoft.com/rest/api/storageservices/authorize-with-shared-key."""
    date = formatdate(usegmt=True)
    path = url.partition(f"/{account}")[2]
    headers = f"x-ms-date:{date}\nx-ms-version:2019-02-02"
    text = "PUT" + "\n" * 12 + f"{headers}\n/{account}/{account}{path}\nrestype:container"
    signature = b64encode(hmac.digest(b64decode(key), text.encode(), "sha256")).decode()
    request = urllib.request.Request(f"{url}?restype=container", method="PUT")
    for name, value in (
        ("x-ms-date", date),
        ("x-ms-version", "2019-02-02"),
        ("Authorization", f"SharedKey {account}:{signature}"),
    ):
        request.add_header(name, value)
    urllib.request.urlopen(request, timeout=30).close()


@dataclass
class Request:
    """A request on its way through a proxy."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def verb(self) -> str:
        """The method, with what S3 calls by other names: LIST, and DELETE of several objects."""
        if self.method == "GET" and "list-type=" in self.path:
            return "LIST"
        return "DELETE" if self.method == "POST" and "delete" in self.path else self.method


Fault = Callable[[Request], str | None]
"""Says what happens to a request: nothing, or one of the words that `FaultProxy` knows."""


REFUSALS = {
    "slow_down": ("503 Service Unavailable", "SlowDown", "Please reduce your request rate."),
    "forbid": ("403 Forbidden", "AccessDenied", "Access Denied"),
    "redirect": ("301 Moved Permanently", "PermanentRedirect", "The bucket is in another region: eu-west-1"),
    "signature": ("403 Forbidden", "SignatureDoesNotMatch", "The signature does not match"),
}


@dataclass
class FaultProxy:
    """A proxy before an S3 server that does to requests what `fault` says, in its own thread.

    Attributes:
        server: by which the proxy is reached.
        fault: returns None, or "reset", "hang", "slow_down", "forbid", "redirect", "truncate" (the body of the answer),
            "lose_answer" (the request takes effect), "slow" (it takes effect, whoever has gone), "ignore_conditions".
        requests: all that came, in order.
    """

    upstream: S3Server
    server: S3Server = field(init=False)
    fault: Fault = lambda request: None
    requests: list[Request] = field(default_factory=list)
    most_at_once: int = 0  # PUTs of data
    _at_once: int = 0

    def verbs(self) -> list[str]:
        return [request.verb for request in self.requests]

    @contextmanager
    def running(self) -> Iterator[FaultProxy]:
        port = free_port()
        self.server = S3Server(f"http://127.0.0.1:{port}", self.upstream.bucket)
        loop = asyncio.new_event_loop()

        async def serve() -> None:
            self._stopping = asyncio.Event()
            server = await asyncio.start_server(self._serve, "127.0.0.1", port, limit=1 << 24)
            started.set()
            async with server:
                await self._stopping.wait()
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.wait([*others, asyncio.create_task(asyncio.sleep(0))])

        started = threading.Event()
        thread = threading.Thread(target=lambda: loop.run_until_complete(serve()), daemon=True)
        thread.start()
        assert started.wait(STARTS_WITHIN_S)
        try:
            yield self
        finally:
            loop.call_soon_threadsafe(self._stopping.set)
            thread.join(STARTS_WITHIN_S)
            loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
                while await self._pass_on(reader, writer):
                    pass
        finally:
            writer.transport.abort()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        first, *lines = head.split("\r\n")[:-2]
        method, path, _ = first.split(" ")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        request = Request(method, path, headers, body)
        self.requests.append(request)
        fault = self.fault(request)
        if fault == "reset":
            return False
        if fault == "hang":
            await asyncio.sleep(3600)
        is_data = method == "PUT" and ".distcp" in path
        self._at_once += is_data
        self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            return await self._answer(fault, first, lines, body, writer)
        finally:
            self._at_once -= is_data

    async def _answer(
        self, fault: str | None, first: str, lines: list[str], body: bytes, writer: asyncio.StreamWriter
    ) -> bool:
        if fault in REFUSALS:
            status, code, message = REFUSALS[fault]
            leak = f"<AWSAccessKeyId>{KEY_ID}</AWSAccessKeyId><StringToSign>AWS4 {KEY_ID}</StringToSign>"
            content = f"<Error><Code>{code}</Code><Message>{message}</Message>{leak}</Error>".encode()
            writer.write(f"HTTP/1.1 {status}\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content)
            await writer.drain()
            return True
        if fault == "slow":
            await asyncio.sleep(0.15)
        if fault == "ignore_conditions":
            lines = [line for line in lines if not line.lower().startswith("if-")]
        answer = await self._ask(first, lines, body)
        if fault == "lose_answer":
            return False
        if fault == "truncate":
            start = answer.index(b"\r\n\r\n") + 4
            writer.write(answer[: start + (len(answer) - start) // 2])
            await writer.drain()
            return False
        writer.write(answer)
        await writer.drain()
        return True

    async def _ask(self, first: str, lines: list[str], body: bytes) -> bytes:
        host, port = self.upstream.endpoint.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port), limit=1 << 24)
        try:
            lines = [line for line in lines if not line.lower().startswith("connection:")]
            writer.write("\r\n".join([first, *lines, "Connection: close", "", ""]).encode() + body)
            await writer.drain()
            answer = await reader.read(-1)
        finally:
            writer.transport.abort()
        return re.sub(rb"(?i)\r\nconnection: close", b"", answer, count=1)


def nth(number: int, fault: str, *, verb: str = "", name: str = "") -> Fault:
    """Do `fault` to request `number` (from 1 on) of those with this verb, whose path contains `name`."""
    seen = 0

    def decide(request: Request) -> str | None:
        nonlocal seen
        if (verb and request.verb != verb) or name not in request.path:
            return None
        seen += 1
        return fault if seen == number else None

    return decide


def always(fault: str, *, verb: str = "", name: str = "") -> Fault:
    """Do `fault` to every request with this verb, whose path contains `name`."""
    return lambda request: fault if (not verb or request.verb == verb) and name in request.path else None

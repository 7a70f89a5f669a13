"""Fixtures of all tests, and the watch for a test that hangs."""

from __future__ import annotations

import faulthandler
import gc
import os
import sys
import threading
from collections.abc import Iterator

import pytest

from aiodcp.testing import FaultyStorage

from .support.devices import Driver, install
from .support.object_servers import FaultProxy, S3Server, s3_server
from .support.ranks import World

HANGS_AFTER_S = 600.0  # no test takes a minute, on a machine that has time for it


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Name a test that hangs, print all stacks, and end the run."""

    def end() -> None:
        sys.__stderr__.write(f"\n{item.nodeid} hangs: not done after {HANGS_AFTER_S:.0f} s\n")  # type: ignore[union-attr]
        faulthandler.dump_traceback(sys.__stderr__)  # type: ignore[arg-type]
        os._exit(3)

    watch = threading.Timer(HANGS_AFTER_S, end)
    watch.daemon = True
    watch.start()
    try:
        return (yield)
    finally:
        watch.cancel()


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    made = World()
    yield made
    made.close()


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    """A server of S3, for all tests: each uses a prefix of its own."""
    with s3_server() as server:
        yield server


@pytest.fixture
def proxy(s3: S3Server) -> Iterator[FaultProxy]:
    """The same server behind a proxy that can be told what to do wrong."""
    with FaultProxy(s3).running() as proxy:
        yield proxy


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    """Two devices, for all of the process."""
    driver = install(monkeypatch)
    yield driver
    gc.collect()  # what is pinned is released while the devices are there
    driver.close()
    assert not driver.violations


@pytest.fixture
def faulty() -> FaultyStorage:
    return FaultyStorage()

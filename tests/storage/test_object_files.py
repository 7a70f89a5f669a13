"""Objects read as files."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

import pytest

import aiodcp.storage.object_files as module
from aiodcp.storage.object_files import Filling, ObjectReader


def test_buffers_are_filled_one_after_the_other_with_what_comes() -> None:
    buffers = [bytearray(3), bytearray(0), bytearray(5)]
    filling = Filling([memoryview(each) for each in buffers])
    assert filling.take(memoryview(b"ab"))
    assert filling.missing == 6
    assert filling.take(memoryview(b"cdefgh"))
    assert filling.missing == 0
    assert buffers == [b"abc", b"", b"defgh"]
    assert not filling.take(memoryview(b"i"))


@pytest.mark.parametrize(
    ("nbytes", "requests"), [(10, 1), (100, 1), (110, 1), (149, 1), (151, 2), (200, 2), (1000, 10), (0, 0)]
)
async def test_a_large_read_is_several_requests_of_about_one_size(
    monkeypatch: pytest.MonkeyPatch, nbytes: int, requests: int
) -> None:
    monkeypatch.setattr(module, "RANGE_NBYTES", 100)
    content = bytes(number % 251 for number in range(2000))
    asked: list[int] = []

    async def read_range(start: int, buffers: Sequence[memoryview]) -> None:
        asked.append(sum(map(len, buffers)))
        for buffer in buffers:
            buffer[:] = content[start : start + len(buffer)]
            start += len(buffer)

    meta = {"path": "x", "size": 2000, "last_modified": datetime.now(UTC), "e_tag": None, "version": None}
    reader = ObjectReader(read_range, meta, content[-50:])  # type: ignore[arg-type]
    one, other = memoryview(bytearray(nbytes // 3)), memoryview(bytearray(nbytes - nbytes // 3))
    await reader.read_into(7, [one, other])
    assert bytes(one) + bytes(other) == content[7 : 7 + nbytes]
    assert len([each for each in asked if each]) == requests
    assert not asked or max(asked) <= 150
    asked.clear()
    end = memoryview(bytearray(30))
    await reader.read_into(1970, [end])  # is here already
    assert bytes(end) == content[1970:]
    assert asked == []
    with pytest.raises(EOFError, match="2000 bytes, 2001 wanted"):
        await reader.read_into(1970, [memoryview(bytearray(31))])

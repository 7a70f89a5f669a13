import io
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

from aiodcp._format.archive_reader import find_tensor
from aiodcp._format.dtypes import NOT_COPIED

from ..support.dtypes import DTYPES, QUANTIZED


def archive(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def view(data: bytes) -> torch.Tensor | None:
    found = find_tensor(memoryview(data), zlib.crc32)
    if found is None:
        return None
    storage = torch.frombuffer(bytearray(data[found.start : found.stop]), dtype=torch.uint8)
    return storage.view(found.dtype).as_strided(found.sizes, found.strides, found.offset)


BASE = torch.randn(6, 5)


@pytest.mark.parametrize(
    "tensor",
    [
        BASE,
        BASE.t(),
        BASE[2:4, 1:3],
        BASE[0, 0],
        torch.ones(1, 3).expand(4, 3),
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    ],
    ids=lambda tensor: f"{tuple(tensor.shape)}{tensor.stride()}",
)
def test_a_plain_tensor_is_found_where_it_lies(tensor: torch.Tensor) -> None:
    found = view(archive(tensor))
    assert found is not None
    assert torch.equal(found, tensor)
    assert found.stride() == tensor.stride()


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d not in QUANTIZED | NOT_COPIED], ids=str)
def test_every_dtype_is_found(dtype: torch.dtype) -> None:
    tensor = torch.ones(6 * dtype.itemsize, dtype=torch.uint8).view(dtype)
    found = view(archive(tensor))
    assert found is not None
    assert found.dtype is dtype
    assert torch.equal(found.view(torch.uint8), tensor.view(torch.uint8))


@pytest.mark.parametrize(
    "value",
    [
        {"a": BASE},
        3,
        (BASE, BASE),
        torch.randn(3, dtype=torch.complex64).conj(),
        torch.eye(3).to_sparse(),
        torch.nn.Parameter(BASE),
    ],
    ids=["dict", "int", "tuple", "conj", "sparse", "parameter"],
)
def test_everything_else_is_left_to_torch_load(value: Any) -> None:
    assert view(archive(value)) is None


def damage_payload(data: bytes) -> bytes:
    place = data.index(BASE.numpy().tobytes())
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def compress(data: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return out.getvalue()


def other_byte_order(data: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            new.writestr(name, b"big" if name.endswith("byteorder") else old.read(name))
    return out.getvalue()


@pytest.mark.parametrize(
    "change",
    [damage_payload, compress, other_byte_order, lambda data: data[:-1], lambda data: b"", lambda data: data[100:]],
    ids=["damaged", "compressed", "big endian", "cut", "empty", "headless"],
)
def test_what_is_odd_is_left_to_torch_load(change: Callable[[bytes], bytes]) -> None:
    assert view(change(archive(BASE))) is None


def test_checksums_are_compared_only_if_asked() -> None:
    data = damage_payload(archive(BASE))
    assert find_tensor(memoryview(data), None) is not None
    assert find_tensor(memoryview(data), zlib.crc32) is None

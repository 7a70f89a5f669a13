import io
import zipfile
import zlib
from pathlib import Path

import pytest
import torch

from aiodcp._format.alignment import ALIGNMENT, BLOCK
from aiodcp._format.archive_writer import Frame, frame_tensor, frame_value
from aiodcp._format.layout import FIRST_SEGMENT_NBYTES, lay_out
from aiodcp.storage import WRITE_ALIGNMENT

from ..support.dtypes import DTYPES, QUANTIZED


def fill(frame: Frame, payload: bytes) -> bytes:
    crc = zlib.crc32(payload).to_bytes(4, "little")
    item = bytearray(frame.header + payload + frame.trailer)
    item[frame.header_crc : frame.header_crc + 4] = crc
    foot = len(frame.header) + len(payload) + frame.trailer_crc
    item[foot : foot + 4] = crc
    return bytes(item)


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d not in QUANTIZED], ids=str)
@pytest.mark.parametrize("shape", [(3, 4), (), (0, 2), (1,)], ids=str)
def test_torch_loads_a_framed_payload_of_every_dtype(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    frame = frame_tensor(dtype, shape)
    payload = bytes(n & 1 for n in range(frame.nbytes))
    item = fill(frame, payload)
    tensor = torch.load(io.BytesIO(item), weights_only=True)
    assert tensor.dtype is dtype
    assert tuple(tensor.shape) == shape
    assert tensor.is_contiguous()
    assert bytes(tensor.untyped_storage()) == payload


def test_an_item_is_a_valid_zip_with_true_checksums_and_an_aligned_payload() -> None:
    frame = frame_tensor(torch.float32, (100, 3))
    payload = bytes(range(240)) * 5
    with zipfile.ZipFile(io.BytesIO(fill(frame, payload))) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == ["archive/data.pkl", "archive/version", "archive/data/0"]
        assert archive.read("archive/data/0") == payload
    assert len(frame.header) % ALIGNMENT == 0
    assert frame.item_nbytes - frame.nbytes < 700


def test_a_payload_over_four_gib_is_framed_as_zip64(tmp_path: Path) -> None:
    shape = ((1 << 32) + 5,)
    frame = frame_tensor(torch.uint8, shape)
    path = tmp_path / "large"
    with path.open("wb") as file:  # sparse: 4 GiB of hole between head and foot
        file.write(frame.header)
        file.seek(frame.nbytes - 1, io.SEEK_CUR)
        file.write(b"\x07")
        file.write(frame.trailer)
    tensor = torch.load(path, weights_only=True, mmap=True)
    assert tensor.shape == shape
    assert tensor[-1] == 7
    with zipfile.ZipFile(path) as archive:
        assert archive.getinfo("archive/data/0").file_size == shape[0]


def test_a_value_is_framed_as_torch_save_would() -> None:
    import pickle

    data = frame_value(pickle.dumps({"a": [1, 2.5, None, "x"]}, protocol=2))
    assert torch.load(io.BytesIO(data), weights_only=True) == {"a": [1, 2.5, None, "x"]}
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.testzip() is None


def test_records_follow_each_other_aligned_and_segments_begin_on_blocks() -> None:
    records = [(torch.float32, (n % 7, 1000)) for n in range(5000)] + [(torch.uint8, (40 << 20,))]
    layout = lay_out(records)
    stop = 0
    for frame, offset in zip(layout.frames, layout.offsets, strict=True):
        assert offset % ALIGNMENT == 0
        assert offset >= stop
        stop = offset + frame.item_nbytes
    assert layout.tail % BLOCK == 0
    assert layout.tail >= stop
    assert [segment.start for segment in layout.segments[1:]] == [segment.stop for segment in layout.segments[:-1]]
    assert all(segment.start % BLOCK == 0 for segment in layout.segments)
    assert layout.segments[0].stop <= FIRST_SEGMENT_NBYTES + BLOCK
    assert len(layout.segments) > 2
    assert [s.first for s in layout.segments[1:]] == [s.stop_record for s in layout.segments[:-1]]


def test_an_empty_layout_has_no_segments() -> None:
    layout = lay_out([])
    assert (layout.segments, layout.tail) == ((), 0)


def test_layout_and_storage_agree_on_blocks() -> None:
    assert BLOCK == WRITE_ALIGNMENT

"""Names, shapes and dtypes, read without the rest of the metadata."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

import aiodcp
from aiodcp import Checkpointer
from aiodcp._format.metadata_reader import read_metadata
from aiodcp._format.outline import decode_outline, outline_of
from aiodcp._format.seal import CLAIM, SealError, in_pieces, open_seal, read_seal, seal, seal_nbytes
from aiodcp._format.sections import pack_column, pack_section

from ..support.states import make_state


@pytest.mark.parametrize("extra", range(0, 300, 37))
def test_it_says_what_the_metadata_says(tmp_path: Path, extra: int) -> None:
    state: dict[str, Any] = make_state() | {f"w{number}": torch.ones(2, 3) for number in range(extra)}
    state |= {"name\nwith\0all \ud800": torch.ones(3, dtype=torch.int8)}
    with Checkpointer() as checkpointer:
        checkpointer.save_sync(state, tmp_path).uploaded.wait()
    data = (tmp_path / ".metadata").read_bytes()
    outline = decode_outline(open_seal(data)[1].outline)
    assert outline == outline_of(read_metadata(data, "m"))
    assert list(outline.tensors) == list(outline_of(read_metadata(data, "m")).tensors)
    assert outline.nbytes("model.weight") == 4800
    assert outline.nbytes("epoch") == 0


def test_what_has_none_is_read_as_ever(tmp_path: Path) -> None:
    dcp.save({"w": torch.ones(2, 3), "n": 3}, checkpoint_id=tmp_path, no_dist=True)
    assert not open_seal((tmp_path / ".metadata").read_bytes())[1].outline
    with aiodcp.open(tmp_path) as ckpt:
        assert set(ckpt) == {"w", "n"}
    for golden in sorted((Path(__file__).parent.parent / "golden").glob("torch-*")):
        for metadata in golden.rglob(".metadata"):
            with aiodcp.open(metadata.parent) as ckpt:
                assert len(list(ckpt)) == len(ckpt) > 0


def packed(names: Any, kinds: list[Any], codes: list[int], count: int | None = None) -> bytes:
    header = json.dumps([len(names) if count is None else count, *kinds]).encode()
    sections = [pack_section(header), pack_column(np.array(codes)), pack_section(json.dumps(names).encode())]
    text = b"2" + b"".join(sections)
    return len(text).to_bytes(8, "little") + text


def test_one_that_is_malformed_is_found() -> None:
    facts = ["float32", "strided", False, "contiguous_format", False]
    good: list[Any] = [["a", "b"], [[*facts, 2, 3]], [0, -1]]
    assert decode_outline(packed(*good)).tensors == {"a": (torch.float32, torch.Size([2, 3])), "b": None}
    others: list[tuple[int, Any]] = [
        (0, ["a"]), (0, ["a", 3]), (0, ["a", "a"]), (1, [["nothing", *facts[1:]]]), (1, [["nn", *facts[1:]]]),
        (1, [[*facts, "x"]]), (1, [["float32"]]), (1, [["float32", "float32", *facts[2:]]]), (2, [5, -1])
    ]  # fmt: skip
    for number, bad in others:
        broken = list(good)
        broken[number] = bad
        with pytest.raises((ValueError, TypeError, LookupError, AttributeError)):
            decode_outline(packed(*broken))
    names, kinds, codes = good
    for text in (*(packed(names, kinds, codes, count) for count in (1, 3, -1)), packed(names, kinds, codes)[:-1]):
        with pytest.raises((ValueError, TypeError, struct.error)):
            decode_outline(text)


async def test_one_of_another_form_counts_as_none(tmp_path: Path) -> None:
    """As the first builds of this library wrote: what it says is in the pickle, too."""
    state = {"w": torch.ones(2, 3), "n": 3}
    async with Checkpointer() as checkpointer:
        await (await checkpointer.save(state, tmp_path)).uploaded
    pickled, found = open_seal((tmp_path / ".metadata").read_bytes())
    text = json.dumps([["w", "n"], [], [0, -1]]).encode()
    outline = in_pieces(len(text).to_bytes(8, "little") + text + b"columns")
    (tmp_path / ".metadata").write_bytes(seal(bytes(pickled), found.custom_metadata, found.tables, outline))
    async with aiodcp.open(tmp_path) as ckpt:
        assert (await ckpt.read("w")).tolist() == [[1.0] * 3] * 2
    loaded = {"w": torch.zeros(2, 3), "n": 0}
    async with Checkpointer() as checkpointer:
        await checkpointer.load(loaded, tmp_path)
    assert loaded["n"] == 3


@pytest.mark.parametrize("nbytes", [1, 2047, 2048, 2049, 50_000])
def test_wherever_a_file_is_cut_off_or_changed_it_is_missed(nbytes: int) -> None:
    pickled = b"pickle " + CLAIM.encode() + b"."
    outline = bytes(range(1, 251)) * (nbytes // 250) + b"x" * (nbytes % 250)
    good = seal(pickled, b'{"a":1}', [7], in_pieces(outline))
    assert open_seal(good)[1].outline == outline
    assert read_seal(good[-seal_nbytes(good) :]).custom_metadata == b'{"a":1}'
    for position in {*range(len(pickled) + 1, len(good), 97), *range(len(good) - 60, len(good))}:
        with pytest.raises(SealError):
            open_seal(good[:position])
        damaged = bytearray(good)
        damaged[position] ^= 1
        with pytest.raises(SealError):
            open_seal(bytes(damaged))

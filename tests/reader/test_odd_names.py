"""Names that look like patterns, that lie below each other, or that a format has for itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import aiodcp
from aiodcp import ArgumentError, Checkpointer

from ..support.states import assert_equal


def full(value: float) -> torch.Tensor:
    return torch.full((3,), value)


async def save(state: dict[str, Any], place: Path) -> Path:
    async with Checkpointer(no_dist=True) as checkpointer:
        await (await checkpointer.save(state, place)).uploaded
    return place


async def state_of(place: Path) -> dict[str, Any]:
    async with aiodcp.open(place) as ckpt:
        return await ckpt.state_dict()


async def test_diff_compares_names_that_look_like_patterns(tmp_path: Path) -> None:
    a = await save({"w": full(1), "x[0]": full(1), "y*": full(1)}, tmp_path / "a")
    b = await save({"w": full(1), "x[0]": full(9), "y*": full(9)}, tmp_path / "b")
    assert [each.fqn for each in await aiodcp.diff(a, b)] == ["x[0]", "y*"]


@pytest.mark.parametrize("exclude", [None, "z"])
async def test_they_are_converted_and_exported(tmp_path: Path, exclude: str | None) -> None:
    state = {"x[0]": full(1), "y?": full(2), "z": full(3)}
    expected = {name: value for name, value in state.items() if name != exclude}
    source = await save(state, tmp_path / "a")
    await aiodcp.convert(source, tmp_path / "b", exclude=exclude)
    assert_equal(expected, await state_of(tmp_path / "b"))
    await aiodcp.export(source, tmp_path / "hf", exclude=exclude)
    assert_equal(expected, await state_of(tmp_path / "hf"))
    await aiodcp.export(source, tmp_path / "c.pt", format="torch", exclude=exclude)
    assert_equal(expected, await state_of(tmp_path / "c.pt"))


async def test_what_is_below_a_name_is_not_taken_with_it(tmp_path: Path) -> None:
    source = await save({"a": full(1), "a.b": full(2)}, tmp_path / "a")
    await aiodcp.convert(source, tmp_path / "b", include=lambda name: name == "a")
    assert_equal({"a": full(1)}, await state_of(tmp_path / "b"))
    await aiodcp.export(source, tmp_path / "hf", include=lambda name: name == "a")
    assert_equal({"a": full(1)}, await state_of(tmp_path / "hf"))


async def test_a_name_that_is_spelled_out_is_meant_whatever_is_in_it(tmp_path: Path) -> None:
    state = {"w[0]": full(1), "w0": full(2)}
    async with aiodcp.open(await save(state, tmp_path / "a")) as ckpt:
        assert_equal(full(1), await ckpt.read("w[0]"))
        assert set(await ckpt.read(["w[0]"])) == {"w[0]", "w0"}


async def test_safetensors_has_a_name_for_itself(tmp_path: Path) -> None:
    source = await save({"__metadata__": full(1), "w": full(2)}, tmp_path / "a")
    with pytest.raises(ArgumentError, match="__metadata__"):
        await aiodcp.export(source, tmp_path / "hf")
    await aiodcp.export(source, tmp_path / "hf", rename={"__metadata__": "notes"})
    assert_equal({"notes": full(1), "w": full(2)}, await state_of(tmp_path / "hf"))

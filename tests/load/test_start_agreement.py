"""What ranks propose and agree on before a load."""

from __future__ import annotations

import pytest

from aiodcp import ArgumentError
from aiodcp._load.start_agreement import (
    FoundMetadata,
    LoadPlanProposal,
    LoadProposal,
    agree_on_load,
    agree_on_load_plan,
)


def proposal(data: bytes | None = b"", *, id_digest: int = 7, has_planner: bool = False) -> list[int]:
    return LoadProposal(found=FoundMetadata.of(data), id_digest=id_digest, has_planner=has_planner).to_row()


@pytest.mark.parametrize("data", [b"metadata", None])
def test_what_one_rank_finds_all_know_of(data: bytes | None) -> None:
    agreed = FoundMetadata.from_row(agree_on_load([proposal(), proposal(data)]))
    assert agreed == FoundMetadata(is_absent=data is None, nbytes=8 if data else 0)


def test_callers_that_want_different_things_are_named() -> None:
    with pytest.raises(ArgumentError, match="checkpoint_id: the ranks load different checkpoints"):
        agree_on_load([proposal(), proposal(id_digest=8)])
    with pytest.raises(ArgumentError, match="planner: passed on some ranks"):
        agree_on_load([proposal(), proposal(has_planner=True)])


def test_one_rank_suffices_to_begin_anew_or_to_look_for_unexpected_names() -> None:
    replaced = LoadPlanProposal(is_replaced=True, has_unexpected=False)
    unexpected = LoadPlanProposal(is_replaced=False, has_unexpected=True)
    agreed = agree_on_load_plan([replaced.to_row(), unexpected.to_row()])
    assert LoadPlanProposal.from_row(agreed) == LoadPlanProposal(is_replaced=True, has_unexpected=True)
    assert not any(agree_on_load_plan([LoadPlanProposal(is_replaced=False, has_unexpected=False).to_row()] * 2))

"""How often tensors were changed, whatever there is among them."""

from __future__ import annotations

from typing import Any

import torch

from aiodcp._state.versions import version_of, versions_of


class Bag:
    """Takes each name for one of its own."""

    _version = "mine"

    def __getattr__(self, name: str) -> Any:
        raise KeyError(name)


def test_only_tensors_are_asked() -> None:
    changed = torch.zeros(2).add_(1)
    with torch.inference_mode():
        inference, odd = torch.zeros(2), torch.zeros(2)
    odd.data = torch.ones(2)  # and says then that it is no inference tensor
    for others in ([], [Bag()], [Bag, 1, None, "text"], [inference], [odd], [changed.to_sparse()]):
        values = [changed, *others, torch.nn.Parameter(changed), changed]
        versions = versions_of(values)
        assert versions == [*map(version_of, values)]
        assert {*map(type, versions)} == {int}
        assert (versions[0], versions[-1]) == (1, 1)

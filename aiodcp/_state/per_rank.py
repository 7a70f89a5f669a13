"""Values of which every rank has its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from ..errors import ArgumentError

NewRank = Literal["keep", "raise"] | Callable[[Mapping[int, Any]], Any]


class PerRank:
    """A value of which every rank has its own, under one name: `{"rng": PerRank(torch.get_rng_state())}`.

    DCP keeps one rank's value of what is not sharded. This one is kept for each rank, as `rng.rank-0`, `rng.rank-1`
    and so on, and loaded by the rank of the same number: `load` fills the tensors inside, or replaces `value`. At the
    top level `value` may be `Stateful`.

    Args:
        value: this rank's.
        new_rank: what a rank of which the checkpoint has no value gets, because it was saved by fewer ranks: "keep"
            its own; "raise" `MismatchError`; or what this function returns for the values of all ranks that are
            stored, by rank: a position to go on from, say. It is called in a thread of the library's.
    """

    def __init__(self, value: Any, *, new_rank: NewRank = "keep") -> None:
        if new_rank not in ("keep", "raise") and not callable(new_rank):
            raise ArgumentError("new_rank", f'must be "keep", "raise" or a callable, got {new_rank!r}')
        self.value = value
        self.new_rank = new_rank

    def __repr__(self) -> str:
        return f"PerRank({self.value!r})"


def per_rank_key(rank: int) -> str:
    """Return under which key a rank's own value lies."""
    return f"rank-{rank}"

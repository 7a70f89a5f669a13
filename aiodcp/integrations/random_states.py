"""The random states of a process, as state to be saved: Python's, numpy's, torch's, and those of its accelerators."""

from __future__ import annotations

import random
import sys
from typing import Any

import torch

from .._state.per_rank import PerRank


class RandomStates:
    """Has `state_dict()` and `load_state_dict()`: `{"rng": random_states()}` in a state dict, one for each rank."""

    def state_dict(self) -> dict[str, Any]:
        version, numbers, gauss = random.getstate()
        state: dict[str, Any] = {
            "python": [version, torch.tensor(numbers, dtype=torch.int64), gauss],
            "torch": torch.get_rng_state(),
        }
        if (numpy := sys.modules.get("numpy")) is not None:
            kind, keys, *rest = numpy.random.get_state()
            state["numpy"] = [kind, torch.from_numpy(keys.astype("int64")), *rest]
        if torch.cuda.is_available():
            state["cuda"] = torch.cuda.get_rng_state_all()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        version, numbers, gauss = state["python"]
        random.setstate((version, tuple(numbers.tolist()), gauss))
        torch.set_rng_state(state["torch"].cpu())
        if "numpy" in state and (numpy := sys.modules.get("numpy")) is not None:
            kind, keys, *rest = state["numpy"]
            numpy.random.set_state((kind, keys.numpy().astype("uint32"), *rest))
        if "cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])


def random_states() -> PerRank:
    """Return the random states of each rank: a rank that was not there when they were saved keeps its own."""
    return PerRank(RandomStates(), new_rank="keep")

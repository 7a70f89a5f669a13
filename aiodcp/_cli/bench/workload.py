"""States to save, and steps to train."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

State = dict[str, torch.Tensor]

STEP_ROUNDS = 60_000  # of a loop in pure Python: a step of a few milliseconds that needs the GIL throughout


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A state to save: how many tensors, and how many float32 elements each."""

    name: str
    tensors: int
    elements: int

    def make(self, device: str | torch.device = "cpu") -> State:
        generator = torch.Generator(device).manual_seed(0)
        return {
            f"layers.{n}.weight": torch.randn(self.elements, generator=generator, device=device)
            for n in range(self.tensors)
        }

    @property
    def nbytes(self) -> int:
        return 4 * self.tensors * self.elements


def python_step() -> float:
    """Compute in pure Python, as data loaders and optimizers with many small tensors do; return the seconds."""
    began = time.perf_counter()
    total = 0
    for number in range(STEP_ROUNDS):
        total += number & 3
    return time.perf_counter() - began

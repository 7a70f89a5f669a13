"""Whether the caller's tensors change while they are staged: seen by version counters, and by optimizers' steps.

Every in-place operation of PyTorch counts up the tensor's version, through views and `detach()`ed ones too, from any
thread. Not so kernels that do not say that they write (fused optimizers, BatchNorm's running averages) and `foreach`
operations on `DTensor`s: hence optimizers that begin a step are watched, too. Not seen are writes
through `.data`, `numpy()` or a pointer, and the replay of a CUDA graph. Tensors made in inference mode have no version.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from .capture import Capture
from .plain_tensors import is_plain
from .sharding import local_tensor
from .versions import versions_of


class TearDetector:
    """Watches what is captured: from now on whether optimizers begin to step, and tensors when they are known."""

    def __init__(self) -> None:
        self._captured: Capture | None = None
        self._whole: dict[int, DTensor] = {}
        self._count = 0
        self._names_of_values: list[str] = []
        self._versions: list[int] = []
        self._stepping: list[torch.Tensor] = []  # parameters of which optimizers have begun to step
        self._closed: list[str] | None = None

    def watch(self, captured: Capture, versions: Mapping[int, int]) -> None:
        """Watch the tensors themselves, of some of which the versions are known from the instant of the capture."""
        self._count = len(captured.values)  # parts of them may be added as values of their own
        self._whole = {index: value for index, value in captured.sharded.items() if isinstance(value, DTensor)}
        self._names_of_values = captured.names
        self._versions = [*captured.versions, *versions_of([*self._whole.values()])]
        for index, version in versions.items():
            self._versions[index] = version
        self._captured = captured

    def close(self) -> None:
        """Watch no longer: what changes from now on may do so."""
        self._closed = self.changed()
        self._stepping.clear()

    def changed(self) -> list[str]:
        """Return the names of the tensors that have changed, in the order of the state dict."""
        if self._closed is not None:
            return self._closed
        if self._captured is None:
            return []
        # Emptied when all is staged, perhaps by another thread and just now.
        values = self._captured.values[: self._count]
        now = self._read(values)
        if (now == self._versions and not self._stepping) or not values:
            return []
        captured, names = self._captured, self._names(self._captured)
        changed = {name for name, one, other in zip(names, now, self._versions, strict=True) if one != other}
        changed |= self._stepped(names, values)
        return [fqn for index, fqn in enumerate(captured.fqns) if fqn in changed and index not in captured.frozen]

    def begins_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Count the captured parameters of an optimizer as changed.

        In the thread of the training: which of the parameters are captured is found out later.
        """
        if self._closed is None:
            for group in optimizer.param_groups:
                self._stepping += [parameter for parameter in group["params"] if parameter.grad is not None]

    def _stepped(self, names: list[str], values: list[Any]) -> set[str]:
        """Return the names of the captured tensors that share memory with parameters that are stepped."""
        memory: set[int] = set()
        for parameter in self._stepping:
            held = local_tensor(parameter) if isinstance(parameter, DTensor) else parameter
            if is_plain(held):
                memory.add(held.untyped_storage().data_ptr())
        memory.discard(0)  # where nothing is stored, nothing changes
        return {
            name
            for name, value in zip(names, values, strict=False)
            if isinstance(value, torch.Tensor) and is_plain(value) and value.untyped_storage().data_ptr() in memory
        }

    def _read(self, values: list[Any]) -> list[int]:
        """Return the versions of all values, and of `DTensor`s beside those of their local tensors."""
        return versions_of([*values, *self._whole.values()] if self._whole else values)

    def _names(self, captured: Capture) -> list[str]:
        """Return the name of each value, in the order of `_read`."""
        return [*self._names_of_values, *(captured.fqns[index] for index in self._whole)]

"""Whether the caller's tensors change while they are staged: their version counters tell, and optimizers' steps.

Every in-place operation of PyTorch counts up the tensor's version, through views and `detach()`ed ones too, from any
thread. Not so kernels that do not say that they write (fused optimizers, BatchNorm's running averages) and `foreach`
operations on `DTensor`s: hence an optimizer that begins a step is looked at besides. What nobody sees is a write
through `.data`, `numpy()` or a pointer. Tensors made in inference mode have no version.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor

from ._capture import Capture, is_plain


class Watch:
    """Watches the tensors of one capture, from now on."""

    def __init__(self, taken: Capture) -> None:
        self._taken = taken
        self._whole = {place: value for place, value in taken.sharded.items() if isinstance(value, DTensor)}
        self._versions = self._read(taken.values)
        self._count = len(taken.values)
        self._stepped: dict[str, None] = {}
        self._closed: list[str] | None = None

    def close(self) -> None:
        """Watch no longer: what changes from now on may do so."""
        self._closed = self.changed()

    def changed(self) -> list[str]:
        """Return the names of the tensors that have changed, in the order of the state dict."""
        if self._closed is not None:
            return self._closed
        values = list(self._taken.values)  # emptied when all is staged, perhaps by another thread and just now
        now = self._read(values)
        if (now == self._versions and not self._stepped) or not values:
            return []
        names = self._names()
        changed = {name for name, one, other in zip(names, now, self._versions, strict=True) if one != other}
        changed |= self._stepped.keys()
        return [fqn for place, fqn in enumerate(self._taken.fqns) if fqn in changed and place not in self._taken.frozen]

    def begins_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Count the captured parameters of an optimizer as changed."""
        if self._closed is not None:
            return
        names = {
            value.untyped_storage().data_ptr(): name
            for name, value in zip(self._names(), list(self._taken.values), strict=False)
            if isinstance(value, torch.Tensor) and is_plain(value)
        }
        names.pop(0, None)  # where nothing is stored, nothing changes
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                held = parameter._local_tensor if isinstance(parameter, DTensor) else parameter
                if parameter.grad is not None and is_plain(held):
                    name = names.get(held.untyped_storage().data_ptr())
                    if name is not None:
                        self._stepped[name] = None

    def _read(self, values: list[Any]) -> list[int]:
        """Return the versions of all values, and of `DTensor`s beside those of their local tensors: 0.1 us each."""
        watched = [*values, *self._whole.values()] if self._whole else values
        try:
            return [value._version if isinstance(value, torch.Tensor) else 0 for value in watched]
        except RuntimeError:  # one of them is an inference tensor
            return [_version_of(value) for value in watched]

    def _names(self) -> list[str]:
        """Return the name of each value, in the order of `_read`."""
        fqns = self._taken.fqns
        starts = {start: fqns[place] for place, start in self._taken.parts.items()}  # the parts follow all leaves
        names = list(fqns)
        for place in range(len(fqns), self._count):
            names.append(starts.get(place, names[-1]))
        return [*names, *(fqns[place] for place in self._whole)]


def _version_of(value: Any) -> int:
    return value._version if isinstance(value, torch.Tensor) and not value.is_inference() else 0

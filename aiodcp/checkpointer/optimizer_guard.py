"""Optimizers that begin a step while tensors are staged: guarded ones wait, others are recorded by the tear detector.

One hook of PyTorch's for all optimizers does both, since it is called before the hooks of each optimizer.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any
from weakref import finalize, ref

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from ..errors import ArgumentError


class Guard:
    """What `Checkpointer.guard` returns: optimizers wait, until this is removed or its `with` block is left.

    Attributes:
        optimizers: which; None for all of the process.
    """

    def __init__(self, optimizers: tuple[torch.optim.Optimizer, ...] | None, guards: list[Guard]) -> None:
        self.optimizers = optimizers
        self._guards = guards
        guards.append(self)

    def __repr__(self) -> str:
        what = "all optimizers" if self.optimizers is None else f"{len(self.optimizers)} optimizers"
        return f"<Guard of {what}{'' if self in self._guards else ', removed'}>"

    def covers(self, optimizer: torch.optim.Optimizer) -> bool:
        return self.optimizers is None or any(optimizer is each for each in self.optimizers)

    def remove(self) -> None:
        """Let the optimizers step whenever they like. Once is enough."""
        if self in self._guards:
            self._guards.remove(self)

    def __enter__(self) -> Guard:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


class Guards:
    """All guards of one Checkpointer, and the hook."""

    def __init__(self, on_step: Callable[[torch.optim.Optimizer, bool], None]) -> None:
        """Call `on_step` whenever an optimizer is about to change its parameters, with whether it is guarded."""
        self._on_step = on_step
        self._guards: list[Guard] = []
        self._pid = os.getpid()
        self._handle: RemovableHandle | None = None

    def arm(self, *, asked: bool = False) -> None:
        """Look at optimizers from now on, if there can be any or it is asked for.

        The hook is not for `torch.compile` to trace. To say so takes the import of torch._dynamo, half a second, which
        the first optimizer of the process has made already.
        """
        if self._handle is None and (asked or "torch._dynamo" in sys.modules):
            guards = ref(self)  # the hook is the process's, and keeps no Checkpointer alive

            def hook(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                if (there := guards()) is not None:
                    there._hook(optimizer)

            self._handle = register_optimizer_step_pre_hook(torch.compiler.disable(hook))  # type: ignore[no-untyped-call]
            finalize(self, self._handle.remove).atexit = False

    def add(self, optimizers: tuple[torch.optim.Optimizer, ...]) -> Guard:
        for optimizer in optimizers:
            if not isinstance(optimizer, torch.optim.Optimizer):
                raise ArgumentError(
                    "optimizers", f"must be torch.optim.Optimizer objects, got {type(optimizer).__name__}"
                )
        self.arm(asked=True)
        return Guard(optimizers or None, self._guards)

    def close(self) -> None:
        if self._handle is not None:
            self._handle.remove()
        self._guards.clear()

    def _hook(self, optimizer: torch.optim.Optimizer) -> None:
        if os.getpid() != self._pid:  # forked: nothing is staged here
            return
        if any(guard.covers(optimizer) for guard in self._guards):
            self._on_step(optimizer, True)
        elif not optimizer._optimizer_step_pre_hooks:  # the caller's own, called after this one, may wait as well
            self._on_step(optimizer, False)

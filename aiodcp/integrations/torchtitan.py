"""torchtitan's checkpoint manager on aiodcp: give `AiodcpCheckpointManager.Config(...)` as the trainer's `checkpoint`.

Steps, names and layout are torchtitan's: what its own manager has saved is loaded here, and the other way round.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torchtitan.components.checkpointer import (
    DATALOADER,
    LR_SCHEDULER,
    MODEL,
    OPTIMIZER,
    BaseCheckpointManager,
    ModelWrapper,
)
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.tools import filesystem
from torchtitan.tools.logging import logger

from ..checkpointer import Checkpoint, Checkpointer
from ..errors import ArgumentError
from ..manager import CheckpointManager
from ..reader import export_sync


class AiodcpCheckpointManager(BaseCheckpointManager):
    """Saves and loads for torchtitan's `Trainer`: asynchronously, durable, with checksums.

        Trainer.Config(checkpoint=AiodcpCheckpointManager.Config(enable=True, interval=500, keep_latest_k=5), ...)

    The latest step is the one with the highest number. Staging overlaps with forward and backward; the optimizer's
    step waits for it on the device. The last step is saved before `save` returns.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseCheckpointManager.Config):
        """torchtitan's policies, and how much host memory staging may take.

        Attributes:
            max_host_bytes: see `aiodcp.Checkpointer`.
        """

        max_host_bytes: int | None = None

    def __init__(
        self,
        config: Config,
        *,
        dataloader: Any,
        model_parts: list[torch.nn.Module],
        optimizers: Any,
        lr_schedulers: Any,
        states: dict[str, Any],
        sd_adapter: Any,
        base_folder: str = "",
    ) -> None:
        self.enable = config.enable
        if not self.enable:
            return
        if config.last_save_in_hf and sd_adapter is None:
            raise ArgumentError("last_save_in_hf", "needs the sd_adapter of the model, and there is none")
        if config.initial_load_in_hf_quantized:
            raise ArgumentError(
                "initial_load_in_hf_quantized", "is not supported: load the model with torchtitan's own"
            )
        self.config = config
        self.folder = filesystem.join(base_folder, config.folder)
        self.states = states
        self.states |= {
            MODEL: ModelWrapper(model_parts),
            OPTIMIZER: optimizers,
            DATALOADER: dataloader,
            LR_SCHEDULER: lr_schedulers,
        }
        self.sd_adapter = sd_adapter
        self.save_future: Any = None
        self._last: Checkpoint | None = None
        self._manager = CheckpointManager(
            self.folder,
            checkpointer=Checkpointer(max_host_bytes=config.max_host_bytes),
            keep_last=config.keep_latest_k or None,
            latest_by="number",
        )
        self._manager.__enter__()

    def _close(self) -> None:
        if hasattr(self, "_manager"):
            self.enable = False
            self._manager.__exit__(None, None, None)

    # --- saving

    def _should_save(self, step: int, last_step: bool) -> bool:
        config = self.config
        if config.load_only:
            return False
        return last_step or step % config.interval == 0 or (step == 1 and config.enable_first_step_checkpoint)

    @torch.no_grad()
    def _save(self, curr_step: int, last_step: bool = False) -> bool:
        if not self._should_save(curr_step, last_step):
            return False
        if last_step and self.config.last_save_model_only:
            self._save_model(curr_step)
            return True
        self._last = self._manager.save_sync(curr_step, self._flat(self.states))
        self.save_future = self._last.uploaded
        if last_step:
            self._wait_for_saving()
        return True

    def _save_model(self, step: int) -> None:
        """Save what is left of a run that is over: the model, as others want it."""
        dtype = TORCH_DTYPE_MAP[self.config.export_dtype]
        states = {
            name: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
            for name, value in self.states[MODEL].state_dict().items()
        }
        if not self.config.last_save_in_hf:
            self._manager.save_sync(step, states).uploaded.wait()
            return
        folder, parts = Path(self._manager.path(step)), f"{self.folder}/.hf-step-{step}"
        checkpointer = self._manager.checkpointer
        checkpointer.save_sync(self.sd_adapter.to_hf(states), parts).uploaded.wait()
        if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
            export_sync(parts, folder)
            shutil.rmtree(parts)

    def _flat(self, states: dict[str, Any]) -> dict[str, Any]:
        """Return states as torchtitan has them stored: the model's parameters beside the other parts, not below one."""
        flat = {name: state for name, state in states.items() if name != MODEL}
        return flat | states[MODEL].state_dict() if MODEL in states else flat

    def _maybe_wait_for_staging(self) -> None:
        if self._last is not None:
            self._last.fence()

    def _wait_for_saving(self) -> None:
        self.save_future.result()
        self.save_future = None

    # --- loading

    @torch.no_grad()
    def _load(self, step: int = -1) -> bool:
        steps = self._manager.refresh_sync()
        if step == -1 and not steps:
            return self._load_initial()
        step = steps[-1] if step == -1 else step
        self._load_from(self._manager.path(step), model_only=step == 0)
        return True

    def _load_initial(self) -> bool:
        config = self.config
        place = config.initial_load_path
        if not place and config.initial_load_in_hf:
            place = getattr(self.sd_adapter, "hf_assets_path", None)
        if not place:
            logger.info("No checkpoint was provided, this is a fresh start.")
            return False
        if not config.initial_load_in_hf:
            self._load_from(place, model_only=config.initial_load_model_only)
            return True
        if self.sd_adapter is None:
            raise ArgumentError("initial_load_in_hf", "needs the sd_adapter of the model, and there is none")
        states = self.sd_adapter.to_hf(self.states[MODEL].state_dict())
        self._manager.checkpointer.load_sync(states, place)
        self.states[MODEL].load_state_dict(self.sd_adapter.from_hf(states))
        return True

    def _load_from(self, place: str, *, model_only: bool) -> None:
        excluded = self.config.exclude_from_loading
        for name in excluded:
            if name not in self.states:
                raise ArgumentError("exclude_from_loading", f"{name!r} is none of {', '.join(self.states)}")
        wanted = {MODEL: self.states[MODEL]} if model_only else self.states
        flat = self._flat({name: state for name, state in wanted.items() if name not in excluded})
        self._manager.checkpointer.load_sync(flat, place)
        self.states[MODEL].load_state_dict(flat)

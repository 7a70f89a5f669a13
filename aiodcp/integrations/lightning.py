"""Lightning's and Fabric's checkpoints by aiodcp: `Trainer(plugins=[AiodcpCheckpointIO()])`, and so for `Fabric`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import CheckpointIO

from ..checkpointer import Checkpoint, Checkpointer
from ..errors import ArgumentError
from ..reader import open_checkpoint


class AiodcpCheckpointIO(CheckpointIO):
    """Save asynchronously, with checksums, in DCP's format; load without a template, int keys and all.

        trainer = Trainer(plugins=[AiodcpCheckpointIO()], callbacks=[ModelCheckpoint(every_n_train_steps=100)])

    `save_checkpoint` returns when the state is captured, and optimizers wait, before their next step, until it is
    staged. A checkpoint is a directory, also where its name ends in `.ckpt`. A failed save is raised by the next one,
    or by `teardown`, which waits for what is under way.

    Args:
        checkpointer: saves and loads; not open, and alone: `Checkpointer(no_dist=True)`, as by default. Lightning has
            one rank save what is not sharded.
    """

    def __init__(self, checkpointer: Checkpointer | None = None) -> None:
        self._checkpointer = checkpointer if checkpointer is not None else Checkpointer(no_dist=True)
        self._is_open = False
        self._last: Checkpoint | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        if storage_options is not None:
            raise ArgumentError("storage_options", "are not used: the checkpointer's storage says where it goes")
        if not self._is_open:
            self._checkpointer.__enter__()
            self._checkpointer.guard()
            self._is_open = True
        if self._last is not None and self._last.checkpoint_id == str(Path(path).absolute()):
            self._last.uploaded.wait()  # one name again and again, such as last.ckpt, and what links to it
        self._last = self._checkpointer.save_sync(checkpoint, str(path))

    def load_checkpoint(self, path: Any, map_location: Any | None = None, weights_only: bool | None = None) -> Any:
        if map_location is not None and not isinstance(map_location, str | torch.device):
            raise ArgumentError("map_location", "must be a device: tensors are loaded from where they lie")
        self.wait()
        with open_checkpoint(path, weights_only=weights_only is not False) as ckpt:
            return ckpt.state_dict_sync(device=map_location)

    def remove_checkpoint(self, path: Any) -> None:
        self.wait()
        shutil.rmtree(path)

    def wait(self) -> None:
        """Wait for the save in flight.

        Raises:
            SaveError: it failed.
        """
        if self._last is not None:
            self._last.uploaded.wait()

    def teardown(self) -> None:
        if self._is_open:
            self._is_open = False
            self._last = None
            self._checkpointer.__exit__(None, None, None)

"""Hugging Face's `Trainer`: checkpoints by aiodcp, in place of its own, when and as often as its arguments say.

callback = AiodcpCallback()
trainer = Trainer(model, args, callbacks=[callback], ...)
trainer.train(resume_from_checkpoint=callback.resume_from(args.output_dir))  # None the first time
"""

from __future__ import annotations

import dataclasses
import json
import logging
import tempfile
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import save_file
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME

from ..checkpointer import Checkpointer
from ..errors import ArgumentError
from ..manager import CheckpointManager
from ..reader import open_checkpoint
from .random_states import random_states

STEP_FORMAT = "checkpoint-{step}"

_MISSING_KEYS = "There were missing keys in the checkpoint model loaded"


class AiodcpCallback(TrainerCallback):
    """Save model, optimizer, scheduler, random states and the trainer's own state asynchronously, and resume from them.

    `save_strategy`, `save_steps`, `save_total_limit` and `output_dir` are the trainer's; `trainer.train()` returns when
    the last checkpoint is durable. Optimizers wait, before a step, until what is in flight is staged.

    Args:
        checkpointer: saves and loads; not open yet. By default `Checkpointer()`.
    """

    def __init__(self, checkpointer: Checkpointer | None = None) -> None:
        self._checkpointer = checkpointer
        self._manager: CheckpointManager | None = None
        self._resumed: tuple[tempfile.TemporaryDirectory[str], int, str] | None = None
        self._random: Any = None  # to be set once more, when the first step begins
        self._due: Literal["", "log", "evaluate"] = ""

    # --- resuming

    def resume_from(self, root: Any, step: int | Literal["latest"] = "latest") -> str | None:
        """Return what to give to `Trainer.train(resume_from_checkpoint=...)`; None if there is no checkpoint yet.

        It is a directory with the trainer's state, from which the trainer learns where it was. All else is loaded when
        the training begins, each rank its own part.

        Raises:
            NotACheckpointError: there is no such step.
            LoadError: it cannot be read.
        """
        with CheckpointManager(root, checkpointer=Checkpointer(no_dist=True), step_format=STEP_FORMAT) as manager:
            found = manager.latest if step == "latest" else step
            if found is None:
                return None
            path = manager.path(found)
        with open_checkpoint(path) as ckpt:
            state = ckpt.read_sync("trainer_state")
        folder = tempfile.TemporaryDirectory(prefix="aiodcp-resume-")
        (Path(folder.name) / TRAINER_STATE_NAME).write_text(state)
        save_file({}, Path(folder.name) / "model.safetensors", metadata={"format": "pt"})  # the trainer wants one
        logging.getLogger("transformers.trainer").addFilter(_is_no_surprise)
        self._resumed = folder, found, path
        return folder.name

    def on_train_begin(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Open the manager, and load what is resumed."""
        if args.load_best_model_at_end:
            raise ArgumentError("load_best_model_at_end", "is not supported: use keep_best of a CheckpointManager")
        self._manager = CheckpointManager(
            args.output_dir,
            checkpointer=self._checkpointer if self._checkpointer is not None else Checkpointer(),
            step_format=STEP_FORMAT,
            keep_last=args.save_total_limit,
        )
        self._manager.__enter__()
        self._manager.checkpointer.guard()
        logging.getLogger("transformers.trainer").removeFilter(_is_no_surprise)
        if self._resumed is None:
            return
        (folder, _, path), self._resumed = self._resumed, None
        folder.cleanup()
        states = self._states(objects)
        self._random = states["rng"]
        self._manager.checkpointer.load_sync(states, path)
        self._random_state = self._random.value.state_dict()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Go on with the random states of the checkpoint, before a sampler draws from them."""
        if self._random is not None:
            self._random.value.load_state_dict(self._random_state)

    def on_step_begin(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Go on with them, after the batches that were skipped."""
        if self._random is not None:
            self._random.value.load_state_dict(self._random_state)
            self._random = None

    # --- saving

    def on_step_end(self, args: Any, state: Any, control: Any, **objects: Any) -> Any:
        """Save in place of the trainer; after what it logs and evaluates at this step, which is part of its state."""
        return self._save_if_due(state, control, objects)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **objects: Any) -> Any:
        """Likewise, with `save_strategy="epoch"`."""
        return self._save_if_due(state, control, objects)

    def _save_if_due(self, state: Any, control: Any, objects: dict[str, Any]) -> Any:
        if not control.should_save:
            return control
        control.should_save = False
        self._due = "evaluate" if control.should_evaluate else "log" if control.should_log else ""
        if not self._due:
            self._save(state, objects)
        return control

    def on_log(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        if self._due == "log":
            self._save(state, objects)

    def on_evaluate(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        if self._due == "evaluate":
            self._save(state, objects)

    def _save(self, state: Any, objects: dict[str, Any]) -> None:
        assert self._manager is not None, "the training has begun"
        self._due = ""
        trainer_state = json.dumps(dataclasses.asdict(state), sort_keys=True)
        self._manager.save_sync(state.global_step, self._states(objects) | {"trainer_state": trainer_state})

    def _states(self, objects: dict[str, Any]) -> dict[str, Any]:
        optimizer = objects["optimizer"]
        states = {
            "model": objects["model"],
            "optimizer": getattr(optimizer, "optimizer", optimizer),  # accelerate's is a wrapper
            "rng": random_states(),
        }
        if objects.get("lr_scheduler") is not None:
            states["lr_scheduler"] = objects["lr_scheduler"]
        return states

    def on_train_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Wait for the save in flight, and release everything."""
        if self._due:
            self._save(state, objects)
        self.close()

    def close(self) -> None:
        """Release everything, also where a training ended with an error; a save in flight is finished first.

        Raises:
            SaveError: it failed.
        """
        manager, self._manager = self._manager, None
        if manager is not None:
            manager.__exit__(None, None, None)


def _is_no_surprise(record: logging.LogRecord) -> bool:
    """Whether to let a record through: that the stand-in has no weights is known."""
    return not str(record.msg).startswith(_MISSING_KEYS)

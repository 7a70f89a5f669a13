"""Ray: one checkpoint of several async actors, each staging in its own process; and reports of Ray Train's workers."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from anyio import CancelScope

from ..checkpointer import Checkpoint, Checkpointer, PartSave, PartTicket
from ..errors import ArgumentError, ClosedError


class CheckpointedActor:
    """A base of async actors whose state is a part of a joint checkpoint: see `save_actors`.

        @ray.remote
        class Trainer(CheckpointedActor):
            def checkpoint_state(self) -> dict: return {"model": self.model, "optim": self.optim}

    Staging and writing go on in the actor's process, while its other methods run.
    """

    _aiodcp: tuple[Checkpointer, PartSave | None] | None = None

    def checkpoint_state(self) -> Mapping[str, Any]:
        """Return what is to be saved, and what `load_actors` fills: as for `Checkpointer.save`."""
        raise NotImplementedError(f"{type(self).__name__} must say what its state is: define checkpoint_state()")

    def make_checkpointer(self) -> Checkpointer:
        """Return what saves and loads in this process: not open yet."""
        return Checkpointer(no_dist=True)

    async def aiodcp_save(self, checkpoint_id: str, name: str) -> PartTicket | None:
        """Write this actor's part, durably, and return what the one that commits needs."""
        checkpointer = await self._checkpointer()
        part = await checkpointer.save_part({name: dict(self.checkpoint_state())}, checkpoint_id)
        self._aiodcp = checkpointer, part
        return await part.ticket()

    async def aiodcp_finish(self, committed: bool) -> None:
        """Hear what became of the commit."""
        checkpointer, part = self._aiodcp or (None, None)
        if checkpointer is not None and part is not None:
            self._aiodcp = checkpointer, None
            await part.finish(committed=committed)

    async def aiodcp_load(self, checkpoint_id: str, name: str) -> None:
        """Load this actor's part into its state, in place."""
        checkpointer = await self._checkpointer()
        await checkpointer.load({name: self.checkpoint_state()}, checkpoint_id)

    async def aiodcp_close(self) -> None:
        """Release everything."""
        if self._aiodcp is not None:
            (checkpointer, _), self._aiodcp = self._aiodcp, None
            await checkpointer.__aexit__(None, None, None)

    async def _checkpointer(self) -> Checkpointer:
        if self._aiodcp is None:
            self._aiodcp = await self.make_checkpointer().__aenter__(), None
        return self._aiodcp[0]


async def save_actors(
    checkpointer: Checkpointer,
    actors: Mapping[str, Any],
    checkpoint_id: str,
    state_dict: Mapping[str, Any] | None = None,
    *,
    custom_metadata: Mapping[str, Any] | None = None,
) -> None:
    """Save actors, and this process's own state, as one checkpoint: all of it, or nothing.

    Args:
        checkpointer: of this process, open; it commits.
        actors: handles of `CheckpointedActor`s by the names at the top level that their states get.
        checkpoint_id: where to; of all processes the same place.
        state_dict: of this process.
        custom_metadata: see `Checkpointer.save`.

    Raises:
        ArgumentError: an actor and `state_dict` share a name.
        SaveError: a part could not be written or committed; what was written is removed.
        RayActorError: an actor has died.

    Cancellation: waits for the actors, and has them remove what they have written.
    """
    if shared := actors.keys() & (state_dict or {}).keys():
        raise ArgumentError("actors", f"{sorted(shared)[0]!r} is a name of state_dict, too")
    own = await checkpointer.save_part(state_dict, checkpoint_id) if state_dict is not None else None
    asked = [actor.aiodcp_save.remote(checkpoint_id, name) for name, actor in actors.items()]
    is_committed = False
    try:
        answers = await _answers(asked)
        tickets = [*answers, await own.ticket() if own is not None else None]
        given = [ticket for ticket in tickets if ticket is not None]
        await checkpointer.commit(checkpoint_id, given, custom_metadata=custom_metadata)
        is_committed = True
    finally:
        with CancelScope(shield=True):
            await _answers(asked, return_exceptions=True)  # an actor that still writes has nothing to remove yet
            told = [actor.aiodcp_finish.remote(is_committed) for actor in actors.values()]
            if own is not None:
                await own.finish(committed=is_committed)
            await _answers(told, return_exceptions=not is_committed)


async def load_actors(actors: Mapping[str, Any], checkpoint_id: str) -> None:
    """Have actors load their parts.

    Raises:
        LoadError: as the actor's cause.
    """
    await _answers([actor.aiodcp_load.remote(checkpoint_id, name) for name, actor in actors.items()])


async def _answers(asked: list[Any], *, return_exceptions: bool = False) -> list[Any]:
    futures = (asyncio.wrap_future(each.future()) for each in asked)
    return await asyncio.gather(*futures, return_exceptions=return_exceptions)


class TrainReporter:
    """Reports to Ray Train what is saved asynchronously: each checkpoint once it is durable, one report later.

        with TrainReporter("/shared/run") as reporter:
            for step in range(steps):
                ...
                reporter.report({"loss": loss}, step=step, state_dict={"model": model, "optim": optimizer})

    All workers make the same calls, as Ray asks. The data goes straight to `root`; Ray keeps where it is. Optimizers
    wait by themselves until the save before is staged; before anything else changes the state: `wait_for_staging`.

    Args:
        root: a directory that all nodes share, or a URL.
        checkpointer: saves; not open yet. By default `Checkpointer()`.
    """

    def __init__(self, root: str, checkpointer: Checkpointer | None = None) -> None:
        self._root = root
        self._checkpointer = checkpointer if checkpointer is not None else Checkpointer()
        self._pending: tuple[Checkpoint, Mapping[str, Any]] | None = None
        self._is_open = False

    def __enter__(self) -> TrainReporter:
        self._checkpointer.__enter__()
        self._checkpointer.guard()  # optimizers wait, before a step, until the save before is staged
        self._is_open = True
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            if error is None:
                self._report_pending()
        finally:
            self._is_open = False
            self._checkpointer.__exit__(kind, error, trace)

    def path(self, step: int) -> str:
        """Return where the checkpoint of a step is."""
        return f"{self._root}/step-{step}"

    def report(self, metrics: Mapping[str, Any], *, step: int, state_dict: Mapping[str, Any]) -> None:
        """Begin to save, and report the save before, with its metrics, when that is durable.

        Raises:
            SaveError: that one failed.
        """
        if not self._is_open:
            raise ClosedError("use the reporter in a `with` block")
        ckpt = self._checkpointer.save_sync(state_dict, self.path(step))
        pending, self._pending = self._pending, (ckpt, dict(metrics))
        self._report(pending)

    def wait_for_staging(self) -> None:
        """Wait until the state may change again: for what is changed by anything but an optimizer."""
        if self._pending is not None:
            self._pending[0].fence()

    def _report_pending(self) -> None:
        pending, self._pending = self._pending, None
        self._report(pending)

    def _report(self, pending: tuple[Checkpoint, Mapping[str, Any]] | None) -> None:
        if pending is None:
            return
        from ray import train

        ckpt, metrics = pending
        ckpt.uploaded.wait()
        train.report(
            dict(metrics),
            checkpoint=train.Checkpoint(ckpt.checkpoint_id),
            checkpoint_upload_mode=train.CheckpointUploadMode.NO_UPLOAD,
        )

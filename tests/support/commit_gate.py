"""A storage at whose commits a test can wait, whatever else is written meanwhile."""

from __future__ import annotations

from aiodcp.testing import FaultyStorage


class CommitGated(FaultyStorage):
    """Passes its gate as "commit" before metadata is put: a manager puts the history of its saves, too, when it can."""

    async def put(self, checkpoint_id: str, name: str, data: bytes) -> None:
        if name == ".metadata":
            await self.enter("commit")
        await super().put(checkpoint_id, name, data)

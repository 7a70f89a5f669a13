"""Several ranks: agreement, failures, deadlines, death."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from aiodcp import Checkpointer, LocalStorage, RankError

from .conftest import assert_equal, blank, make_state
from .worlds import Killed, World


def _save_and_load(rank: int, size: int, path: Path) -> list[str]:
    async def main() -> None:
        state = make_state(3)
        async with Checkpointer() as checkpointer:
            for _ in range(3):
                ckpt = await checkpointer.save(state, path)
                await ckpt.staged
                await ckpt.uploaded
            target = blank(state)
            await checkpointer.load(target, path)
            assert_equal(state, target)

    asyncio.run(main())
    return sorted(os.listdir(path))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_replicated_state_is_saved_once(world: World, tmp_path: Path, size: int) -> None:
    names = world.run(size, _save_and_load, tmp_path / "ckpt")[0]
    assert names[0] == ".metadata"
    assert len(names) == 1 + size

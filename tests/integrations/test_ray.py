"""Ray: actors that are saved together, and reports of Ray Train's workers."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray")

import ray
import torch

import aiodcp
from aiodcp import ArgumentError, Checkpointer, NotACheckpointError
from aiodcp.checkpointer import PartTicket
from aiodcp.integrations.ray import CheckpointedActor, TrainReporter, load_actors, save_actors

from ..support.states import assert_equal

pytestmark = [pytest.mark.filterwarnings("ignore")]  # Ray's own

ROOT = str(Path(__file__).parents[2])


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    os.environ["RAY_AUTH_MODE"] = "disabled"
    ray.init(
        _node_ip_address="127.0.0.1",
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": ROOT}},
    )
    yield
    ray.shutdown()


class Worker(CheckpointedActor):
    def __init__(self, value: float) -> None:
        self.weights = torch.full((1000,), value)
        self.fails = False

    def checkpoint_state(self) -> Mapping[str, Any]:
        if self.fails:
            raise RuntimeError("no state today")
        return {"weights": self.weights}

    async def set(self, value: float) -> None:
        self.weights.fill_(value)

    async def get(self) -> float:
        return float(self.weights.mean())

    async def fail(self) -> None:
        self.fails = True


class LateWorker(Worker):
    """One that begins to save when it is let go."""

    def __init__(self, value: float) -> None:
        super().__init__(value)
        self.is_asked, self.is_let_go = asyncio.Event(), asyncio.Event()

    async def aiodcp_save(self, checkpoint_id: str, name: str) -> PartTicket | None:
        self.is_asked.set()
        await self.is_let_go.wait()
        return await super().aiodcp_save(checkpoint_id, name)

    async def wait_asked(self) -> None:
        await self.is_asked.wait()

    async def let_go(self) -> None:
        self.is_let_go.set()


def test_actors_and_a_controller_are_one_checkpoint(cluster: None, tmp_path: Path) -> None:
    place = str(tmp_path / "ckpt")

    async def main() -> None:
        remote = ray.remote(Worker)
        actors = {name: remote.remote(float(number)) for number, name in enumerate(("trainer", "rollout"))}
        async with Checkpointer(no_dist=True) as checkpointer:
            await save_actors(checkpointer, actors, place, {"controller": {"step": 3}}, custom_metadata={"a": 1})
            await asyncio.gather(*(asyncio.wrap_future(each.set.remote(9.0).future()) for each in actors.values()))
            state: dict[str, Any] = {"controller": {"step": 0}}
            await checkpointer.load(state, place)
            assert state == {"controller": {"step": 3}}
            await load_actors(actors, place)
            assert [await each.get.remote() for each in actors.values()] == [0.0, 1.0]
            assert await aiodcp.verify(place) == []
            with pytest.raises(ArgumentError, match="trainer"):
                await save_actors(checkpointer, actors, place, {"trainer": 1})

            await actors["rollout"].fail.remote()
            other = str(tmp_path / "other")
            with pytest.raises(Exception, match="no state today"):
                await save_actors(checkpointer, actors, other, {"controller": {"step": 4}})
            with pytest.raises(NotACheckpointError):
                await checkpointer.load(state, other)
            assert not list(tmp_path.glob("other/*.distcp"))
            await save_actors(checkpointer, {"trainer": actors["trainer"]}, place)  # and goes on
            await actors["trainer"].aiodcp_close.remote()

    asyncio.run(main())


@pytest.mark.parametrize("reason", ["another fails", "cancelled"])
def test_what_a_late_actor_writes_is_removed(cluster: None, tmp_path: Path, reason: str) -> None:
    async def main() -> None:
        actors = {"trainer": ray.remote(LateWorker).remote(1.0), "rollout": ray.remote(Worker).remote(2.0)}
        if reason == "another fails":
            await actors["rollout"].fail.remote()
        async with Checkpointer(no_dist=True) as checkpointer:
            saving = asyncio.create_task(save_actors(checkpointer, actors, str(tmp_path)))
            await actors["trainer"].wait_asked.remote()
            if reason == "cancelled":
                saving.cancel()
            done, _ = await asyncio.wait([saving], timeout=0.5)
            assert not done  # what is removed before it is written stays
            await actors["trainer"].let_go.remote()
            with pytest.raises(asyncio.CancelledError if reason == "cancelled" else RuntimeError):
                await saving
            assert not list(tmp_path.iterdir())

    asyncio.run(main())


def _train(config: dict[str, Any]) -> None:
    from ray import train

    rank = train.get_context().get_world_rank()
    weights = torch.zeros(4)
    state: dict[str, Any] = {"weights": weights, "step": 0}
    with TrainReporter(config["root"]) as reporter:
        if (last := train.get_checkpoint()) is not None:
            with Checkpointer(no_dist=True) as checkpointer:
                checkpointer.load_sync(state, last.path)
        while state["step"] < config["steps"]:
            reporter.wait_for_staging()
            state["step"] += 1
            weights += state["step"]
            reporter.report({"step": state["step"], "rank": rank}, step=state["step"], state_dict=state)


def test_a_worker_of_ray_train_reports_what_is_durable(cluster: None, tmp_path: Path) -> None:
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    trainer = TorchTrainer(
        _train,
        train_loop_config={"root": str(tmp_path / "run"), "steps": 3},
        scaling_config=ScalingConfig(num_workers=2, use_gpu=False),
        torch_config=TorchConfig(backend="gloo"),
        run_config=RunConfig(storage_path=str(tmp_path), name="run"),
    )
    result = trainer.fit()
    assert result.error is None
    assert result.checkpoint is not None
    assert result.checkpoint.path == str(tmp_path / "run" / "step-3")
    with aiodcp.open(result.checkpoint.path) as ckpt:
        assert_equal({"weights": torch.full((4,), 6.0), "step": 3}, ckpt.state_dict_sync())

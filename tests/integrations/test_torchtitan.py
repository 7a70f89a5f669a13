"""torchtitan's contract of a checkpoint manager, on two ranks, and its own manager's files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torchtitan")

import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torchtitan.components.checkpointer import CheckpointManager as OwnManager
from torchtitan.components.optimizer import LRSchedulersContainer, OptimizersContainer
from torchtitan.components.optimizer.optimizer import ParamGroupConfig

from aiodcp.integrations.torchtitan import AiodcpCheckpointManager

from ..support.ranks import rank_test
from ..support.states import assert_equal


class Trainer:
    """What of torchtitan's Trainer a checkpoint manager sees."""

    def __init__(self, folder: Path, *, own: bool = False, sharded: bool = True, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
        if sharded:
            fully_shard(self.model, mesh=init_device_mesh("cpu", (torch.distributed.get_world_size(),)))
        config = OptimizersContainer.Config(
            param_groups=[ParamGroupConfig(pattern=".*", optimizer_name="AdamW", optimizer_kwargs={"lr": 0.1})],
            implementation="foreach",
        )
        self.optimizers = OptimizersContainer(config, model_parts=[self.model])
        self.lr_schedulers = LRSchedulersContainer(self.optimizers, lambda step: 1 / (step + 1))
        self.step = 0
        kind: Any = OwnManager if own else AiodcpCheckpointManager
        self.checkpointer = kind(
            kind.Config(enable=True, **options),
            dataloader=None,
            model_parts=[self.model],
            optimizers=self.optimizers,
            lr_schedulers=self.lr_schedulers,
            states={"train_state": self},
            sd_adapter=Adapter(),
            base_folder=str(folder),
        )

    def state_dict(self) -> dict[str, Any]:
        return {"step": torch.tensor(self.step)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = int(state["step"])

    def train(self, until: int, *, last: int = 99) -> None:
        while self.step < until:
            self.step += 1
            torch.manual_seed(self.step)
            self.optimizers.zero_grad()
            self.model(torch.randn(3, 4)).square().sum().backward()
            self.checkpointer.maybe_wait_for_staging()
            self.optimizers.step()
            self.lr_schedulers.step()
            self.checkpointer.save(self.step, last_step=self.step == last)

    def state(self) -> dict[str, Any]:
        return {
            "model": _full(self.model.state_dict()),
            "optim": _full(self.optimizers.state_dict()),
            "lr": self.lr_schedulers.state_dict(),
            "step": self.step,
        }


class Adapter:
    fqn_to_index_mapping = None
    hf_assets_path = None

    def to_hf(self, state: dict[str, Any]) -> dict[str, Any]:
        return {f"hf.{name}": value for name, value in state.items()}

    def from_hf(self, state: dict[str, Any]) -> dict[str, Any]:
        return {name.removeprefix("hf."): value for name, value in state.items()}


def _full(state: dict[str, Any]) -> dict[str, Any]:
    return {name: each.full_tensor() if hasattr(each, "full_tensor") else each for name, each in state.items()}


@rank_test(2)
def test_a_run_that_goes_on_equals_one_that_was_never_interrupted(rank: int, size: int, tmp_path: Path) -> None:
    whole = Trainer(tmp_path / "whole", interval=100)
    whole.train(7)
    first = Trainer(tmp_path / "run", interval=2, keep_latest_k=2)
    first.train(5)
    first.checkpointer.close()
    second = Trainer(tmp_path / "run", interval=2, keep_latest_k=2)
    assert second.checkpointer.load()
    assert second.step == 4
    second.train(7)
    assert_equal(whole.state(), second.state())
    second.checkpointer.close()
    whole.checkpointer.close()
    if rank == 0:
        assert sorted(path.name for path in (tmp_path / "run" / "checkpoint").glob("step-*")) == ["step-4", "step-6"]


@rank_test(2)
def test_its_own_managers_checkpoints_load_here_and_ours_there(rank: int, size: int, tmp_path: Path) -> None:
    for first_own in (True, False):
        folder = tmp_path / str(first_own)
        first = Trainer(folder, own=first_own, interval=2)
        first.train(2)
        first.checkpointer.maybe_wait_for_saving()
        expected = first.state()
        second = Trainer(folder, own=not first_own, interval=2)
        assert second.checkpointer.load()
        assert_equal(expected, second.state())
        for each in (first, second):
            each.checkpointer.close()


@rank_test(2)
def test_the_last_step_is_the_model_alone_and_begins_another_run(rank: int, size: int, tmp_path: Path) -> None:
    first = Trainer(tmp_path / "a", interval=100, export_dtype="bfloat16")
    first.train(3, last=3)
    first.checkpointer.close()
    assert (tmp_path / "a" / "checkpoint" / "step-3" / ".metadata").exists()
    hf = Trainer(tmp_path / "hf", interval=100, last_save_in_hf=True)
    hf.train(3, last=3)
    hf.checkpointer.close()
    torch.distributed.barrier()
    folder = tmp_path / "hf" / "checkpoint" / "step-3"
    assert load_file(folder / "model.safetensors").keys() == {f"hf.{name}" for name in hf.model.state_dict()}
    for path, options in (
        (tmp_path / "a" / "checkpoint" / "step-3", {}),
        (folder, {"initial_load_in_hf": True}),
    ):
        other = Trainer(tmp_path / f"from-{path.parent.parent.name}", initial_load_path=str(path), **options)
        assert other.checkpointer.load()
        expected = (
            hf.state()["model"] if options else {n: v.bfloat16().float() for n, v in first.state()["model"].items()}
        )
        assert_equal(expected, other.state()["model"])
        assert other.step == 0
        other.checkpointer.close()


@rank_test(1)
def test_policies(rank: int, size: int, tmp_path: Path) -> None:
    trainer = Trainer(tmp_path, sharded=False, interval=3, enable_first_step_checkpoint=True, keep_latest_k=0)
    assert not trainer.checkpointer.load()
    trainer.train(7)
    trainer.checkpointer.close()
    other = Trainer(tmp_path, sharded=False, exclude_from_loading=["optimizer", "lr_scheduler"], load_only=True)
    assert other.checkpointer.load(step=3)
    assert other.step == 3
    assert not other.optimizers.optimizers[0].state
    other.train(6)
    other.checkpointer.close()
    assert sorted(path.name for path in (tmp_path / "checkpoint").iterdir() if path.name.startswith("step")) == [
        "step-1", "step-3", "step-6"
    ]  # fmt: skip
    with pytest.raises(Exception, match="is none of"):
        Trainer(tmp_path, sharded=False, exclude_from_loading=["typo"]).checkpointer.load()

"""Lightning's Trainer and Fabric, on CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lightning")

import torch
from lightning import Fabric, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import aiodcp
from aiodcp import ArgumentError, StageError
from aiodcp._engine import host_memory
from aiodcp.integrations.lightning import AiodcpCheckpointIO

from ..support.ranks import as_under_torchrun, rank_test
from ..support.states import assert_equal

pytestmark = [pytest.mark.filterwarnings("ignore")]  # Lightning's own


class Model(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        torch.manual_seed(self.global_step)
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["int_keys"] = {1: "one", 2: {3: torch.ones(1)}}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        assert checkpoint["int_keys"][1] == "one"
        assert checkpoint["int_keys"][2][3].item() == 1


def fit(
    folder: Path, steps: int, ckpt_path: Any = None, *, plugin: bool = True, **options: Any
) -> tuple[Model, Trainer]:
    seed_everything(3, verbose=False)
    model = Model()
    data = DataLoader(TensorDataset(torch.randn(12, 4)), batch_size=2)
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        plugins=[AiodcpCheckpointIO()] if plugin else [],
        callbacks=[ModelCheckpoint(folder, every_n_train_steps=3, save_top_k=-1, filename="{step}")],
        **options,
    )
    trainer.fit(model, data, ckpt_path=ckpt_path)
    return model, trainer


def test_a_run_that_goes_on_equals_one_that_was_never_interrupted(tmp_path: Path) -> None:
    whole, _ = fit(tmp_path / "whole", 9)
    fit(tmp_path / "run", 6)
    saved = tmp_path / "run" / "step=6.ckpt"
    assert (saved / ".metadata").exists()
    second, trainer = fit(tmp_path / "run", 9, saved)
    assert trainer.global_step == 9
    assert_equal(dict(whole.state_dict()), dict(second.state_dict()))


@rank_test(2)
def test_ranks_that_go_on_equal_ranks_that_were_never_interrupted(rank: int, size: int, tmp_path: Path) -> None:
    with as_under_torchrun(rank, size):
        options: dict[str, Any] = {"strategy": "ddp", "devices": size}
        whole, trainer = fit(tmp_path / "whole", 6, **options)
        assert trainer.world_size == size
        fit(tmp_path / "run", 3, **options)
        second, trainer = fit(tmp_path / "run", 6, tmp_path / "run" / "step=3.ckpt", **options)
    assert trainer.global_step == 6
    assert_equal(dict(whole.state_dict()), dict(second.state_dict()))


def test_what_is_saved_is_what_torch_would_have_saved(tmp_path: Path) -> None:
    fit(tmp_path / "ours", 3)
    fit(tmp_path / "torchs", 3, plugin=False)
    expected = torch.load(tmp_path / "torchs" / "step=3.ckpt", weights_only=False)
    loaded = AiodcpCheckpointIO().load_checkpoint(tmp_path / "ours" / "step=3.ckpt")
    assert_equal(dict(expected["state_dict"]), loaded["state_dict"])
    assert_equal(expected["optimizer_states"], loaded["optimizer_states"])
    assert loaded["global_step"] == expected["global_step"] == 3
    assert expected["loops"] == loaded["loops"]


def test_a_failed_save_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    io = AiodcpCheckpointIO()
    monkeypatch.setattr(host_memory, "free_nbytes", lambda: 0)
    monkeypatch.setattr(host_memory, "SMALL_NBYTES", 0)
    io.save_checkpoint({"w": torch.ones(3)}, tmp_path / "a.ckpt")
    with pytest.raises(StageError):
        io.teardown()
    with pytest.raises(ArgumentError, match="storage_options"):
        io.save_checkpoint({}, tmp_path, storage_options={})
    with pytest.raises(ArgumentError, match="map_location"):
        io.load_checkpoint(tmp_path, map_location={"a": "b"})


def test_fabric(tmp_path: Path) -> None:
    io = AiodcpCheckpointIO()
    fabric = Fabric(accelerator="cpu", devices=1, plugins=[io])
    fabric.launch()
    model, optimizer = fabric.setup(net := nn.Linear(3, 2), torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9))
    for step in range(3):
        model(torch.ones(3)).sum().backward()
        optimizer.step()
        fabric.save(tmp_path / f"{step}", {"model": model, "optim": optimizer, "step": step})
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    io.wait()
    state: dict[str, Any] = {"model": model, "optim": optimizer, "step": 0}
    with torch.no_grad():
        net.weight.zero_()
    fabric.load(tmp_path / "2", state)
    assert state["step"] == 2
    assert_equal(expected, dict(model.state_dict()))
    assert aiodcp.verify_sync(tmp_path / "1") == []
    io.remove_checkpoint(tmp_path / "0")
    assert not (tmp_path / "0").exists()
    io.teardown()

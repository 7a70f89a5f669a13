"""Hugging Face's Trainer and accelerate, on CPU."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import torch
from accelerate import Accelerator
from torch import nn
from transformers import (
    AutoModel,
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

import aiodcp
from aiodcp import ArgumentError, Checkpointer
from aiodcp.integrations.accelerate import accelerator_state
from aiodcp.integrations.random_states import random_states
from aiodcp.integrations.transformers import AiodcpCallback

from ..support.ranks import as_under_torchrun, rank_test
from ..support.states import assert_equal

pytestmark = [pytest.mark.filterwarnings("ignore")]  # of the frameworks


def make_model() -> BertForSequenceClassification:
    set_seed(5)
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_labels=2
    )  # with dropout
    return BertForSequenceClassification(config)


def make_trainer(folder: Path, callback: AiodcpCallback | None, **options: Any) -> Trainer:
    generator = torch.Generator().manual_seed(0)
    data = [
        {"input_ids": torch.randint(0, 50, (6,), generator=generator), "labels": number % 2} for number in range(20)
    ]
    arguments: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 12,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.01,
        "logging_steps": 2,
        "report_to": [],
        "use_cpu": True,
        "save_steps": 5,
        "disable_tqdm": True,
        "seed": 5,
    } | options
    return Trainer(
        make_model(),
        TrainingArguments(**arguments),
        train_dataset=data,
        eval_dataset=data[:4],
        callbacks=[callback] if callback is not None else [],
    )


@pytest.mark.parametrize(
    "options",
    [{"save_steps": 4}, {"save_steps": 4, "eval_strategy": "steps", "eval_steps": 2}, {"save_strategy": "epoch"}],
    ids=["steps", "evaluating", "epoch"],
)
def test_a_run_that_goes_on_equals_one_that_was_never_interrupted(tmp_path: Path, options: dict[str, Any]) -> None:
    whole = make_trainer(tmp_path / "whole", AiodcpCallback(), **options)
    whole.train()
    callback = AiodcpCallback()
    assert callback.resume_from(tmp_path / "run") is None
    first = make_trainer(tmp_path / "run", callback, **options)
    first.args.max_steps = 12  # the schedule is the same; the run is cut off
    first.add_callback(_StopAt(11))
    first.train()
    callback = AiodcpCallback()
    second = make_trainer(tmp_path / "run", callback, **options)
    second.train(resume_from_checkpoint=callback.resume_from(tmp_path / "run"))
    assert second.state.global_step == 12
    assert_equal(dict(whole.model.state_dict()), dict(second.model.state_dict()))
    assert_equal(whole.optimizer.state_dict(), second.optimizer.state_dict())
    assert whole.lr_scheduler.state_dict() == second.lr_scheduler.state_dict()
    losses = [[each["loss"] for each in trainer.state.log_history if "loss" in each] for trainer in (whole, second)]
    assert losses[0][:5] == losses[1][:5]  # after which it may have resumed between two logs: then it is a mean of less


@rank_test(2)
def test_ranks_that_go_on_equal_ranks_that_were_never_interrupted(rank: int, size: int, tmp_path: Path) -> None:
    with as_under_torchrun(rank, size):
        options = {"save_steps": 2, "max_steps": 5, "logging_steps": 100}
        whole = make_trainer(tmp_path / "whole", AiodcpCallback(), **options)
        assert whole.args.world_size == size
        whole.train()
        first = make_trainer(tmp_path / "run", AiodcpCallback(), **options)
        first.add_callback(_StopAt(3))
        first.train()
        callback = AiodcpCallback()
        second = make_trainer(tmp_path / "run", callback, **options)
        second.train(resume_from_checkpoint=callback.resume_from(tmp_path / "run"))
        assert second.state.global_step == 5
        assert_equal(dict(whole.model.state_dict()), dict(second.model.state_dict()))
        assert_equal(whole.optimizer.state_dict(), second.optimizer.state_dict())


class _StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **objects: Any) -> Any:
        control.should_training_stop = state.global_step >= self.step
        return control


def test_steps_are_kept_as_the_arguments_say_and_a_model_comes_out(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, AiodcpCallback(), save_steps=3, save_total_limit=2)
    trainer.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-12", "checkpoint-9"]
    assert not list(tmp_path.glob("checkpoint-*/*.bin")) + list(tmp_path.glob("checkpoint-*/*.safetensors"))
    aiodcp.export_sync(tmp_path / "checkpoint-12", tmp_path / "hf", include="model.bert", rename={"model.bert": ""})
    trainer.model.config.save_pretrained(tmp_path / "hf")
    loaded = AutoModel.from_pretrained(tmp_path / "hf")
    assert_equal(dict(trainer.model.bert.state_dict()), dict(loaded.state_dict()))
    with Checkpointer() as checkpointer:  # and one that Hugging Face has saved goes in
        trainer.model.save_pretrained(tmp_path / "theirs")
        other = make_model()
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        checkpointer.load_sync({"model": other}, tmp_path / "theirs", rename={"": "model"})
    assert_equal(dict(trainer.model.state_dict()), dict(other.state_dict()))


def test_what_is_not_supported_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path, AiodcpCallback(), load_best_model_at_end=True, eval_strategy="steps", eval_steps=5, save_steps=5
    )
    with pytest.raises(ArgumentError, match="keep_best"):
        trainer.train()


def test_random_states_come_back(tmp_path: Path) -> None:
    import numpy as np

    with Checkpointer() as checkpointer:
        checkpointer.save_sync({"rng": random_states()}, tmp_path).uploaded.wait()
        expected = random.random(), np.random.rand(), torch.rand(1).item(), random.gauss(0, 1)
        checkpointer.load_sync({"rng": random_states()}, tmp_path)
        assert (random.random(), np.random.rand(), torch.rand(1).item(), random.gauss(0, 1)) == expected


class Count:
    def __init__(self) -> None:
        self.steps = 0

    def state_dict(self) -> dict[str, int]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.steps = state["steps"]


def _resume_with_accelerate(folder: Path) -> None:
    def make() -> tuple[Accelerator, Any, Any, Any, Count]:
        torch.manual_seed(0)
        accelerator = Accelerator(cpu=True)
        net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 1))
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        model, optimizer, schedule = accelerator.prepare(net, optimizer, schedule)
        count = Count()
        accelerator.register_for_checkpointing(count)
        return accelerator, model, optimizer, schedule, count

    def train(parts: tuple[Accelerator, Any, Any, Any, Count], steps: int) -> None:
        accelerator, model, optimizer, schedule, count = parts
        for _ in range(steps):
            optimizer.zero_grad()
            accelerator.backward(model(torch.randn(2, 3)).square().sum())
            optimizer.step()
            schedule.step()
            count.steps += 1

    parts = make()
    train(parts, 3)
    with Checkpointer() as checkpointer:
        checkpointer.save_sync(accelerator_state(parts[0]), folder).uploaded.wait()
        train(parts, 3)
        other = make()
        assert accelerator_state(other[0]).keys() == {"model", "optimizer", "scheduler", "custom", "rng"}
        checkpointer.load_sync(accelerator_state(other[0]), folder)
    train(other, 3)
    assert_equal(dict(parts[1].state_dict()), dict(other[1].state_dict()))
    assert_equal(parts[2].state_dict(), other[2].state_dict())
    assert parts[4].steps == other[4].steps == 6


def test_accelerate(tmp_path: Path) -> None:
    _resume_with_accelerate(tmp_path)


@rank_test(2)
def test_accelerate_on_ranks(rank: int, size: int, tmp_path: Path) -> None:
    with as_under_torchrun(rank, size):
        assert Accelerator(cpu=True).num_processes == size
        _resume_with_accelerate(tmp_path)

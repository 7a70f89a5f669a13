"""The cookbook's recipes for what people watch their runs in, run against the real thing."""

from __future__ import annotations

import re
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import aiodcp

COOKBOOK = Path(__file__).parents[2] / "examples" / "README.md"


def recipe(name: str, **names: Any) -> dict[str, Any]:
    """Run a recipe of the cookbook, with `names` there, and return all that is there then."""
    [block] = re.findall(rf"^(?:With|For) {name}\b[^`]*```py\n(.*?)```", COOKBOOK.read_text(), re.MULTILINE | re.DOTALL)
    found = {"aiodcp": aiodcp, **names}
    exec(block, found)
    return found


def save_two_and_fail_once(root: Path, on_event: Callable[[aiodcp.Event], None]) -> None:
    """Save steps 1 and 2, and fail at step 3, which is a file where a directory should be."""
    with aiodcp.CheckpointManager(root, on_event=on_event, on_error="warn") as manager:
        for step in (1, 2):
            manager.save_sync(step, {"w": torch.zeros(1000)}).uploaded.wait()
        (root / "step-3").write_text("")
        failed = manager.save_sync(3, {"w": torch.zeros(1000)}).uploaded
        with pytest.raises(aiodcp.SaveError):
            failed.wait()


def test_weights_and_biases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    found = recipe("Weights & Biases", wandb=wandb)
    alerts: list[tuple[str, str]] = []
    monkeypatch.setattr(type(found["run"]), "alert", lambda self, *text: alerts.append(text))
    save_two_and_fail_once(tmp_path / "root", found["on_event"])
    assert found["run"].summary["checkpoint/step"] == 2
    assert found["run"].summary["checkpoint/nbytes"] >= 4000
    [(title, text)] = alerts
    assert title == "checkpoint failed"
    assert "step 3" in text
    found["run"].finish()


def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(f"file://{tmp_path}/runs")
    found = recipe("MLflow", mlflow=mlflow)
    save_two_and_fail_once(tmp_path / "root", found["on_event"])
    run = mlflow.get_run(found["run"].info.run_id).data
    mlflow.end_run()
    assert run.metrics["checkpoint/nbytes"] >= 4000
    assert run.metrics["checkpoint/seconds"] > 0
    assert "step 3" in run.tags["checkpoint.failure"]


def test_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from torch.utils.tensorboard import SummaryWriter

    monkeypatch.chdir(tmp_path)
    found = recipe("TensorBoard", SummaryWriter=SummaryWriter)
    save_two_and_fail_once(tmp_path / "root", found["on_event"])
    found["writer"].close()
    written = events.EventAccumulator(str(tmp_path / "runs"))
    written.Reload()
    assert [each.step for each in written.Scalars("checkpoint/seconds")] == [1, 2]
    assert "checkpoint/failures/text_summary" in written.Tags()["tensors"]


def test_prometheus(tmp_path: Path) -> None:
    prometheus = pytest.importorskip("prometheus_client")
    servers: list[Any] = []

    def start_http_server(port: int) -> None:  # at a port that is free
        servers.append(prometheus.start_http_server(0, "127.0.0.1"))

    names = {name: getattr(prometheus, name) for name in ("Counter", "Gauge", "Histogram")}
    found = recipe("Prometheus", start_http_server=start_http_server, **names)
    save_two_and_fail_once(tmp_path / "root", found["on_event"])
    [(server, thread)] = servers
    with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/metrics") as answer:
        text = answer.read().decode()
    server.shutdown()
    server.server_close()
    thread.join()
    assert 'checkpoint_saves_total{how="SaveFinished"} 2.0' in text
    assert 'checkpoint_saves_total{how="SaveFailed"} 1.0' in text
    assert "checkpoint_held_seconds_count 2.0" in text
    assert re.search(r"^checkpoint_committed_timestamp_seconds 1\.\d+e\+09$", text, re.MULTILINE)

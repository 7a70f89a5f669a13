"""`hf://`: models in the cache of Hugging Face's hub client, without a network."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("huggingface_hub")

import torch
from huggingface_hub import constants
from safetensors.torch import save_file

import aiodcp
from aiodcp import ArgumentError, Checkpointer

SHA = "0123456789012345678901234567890123456789"


def test_a_model_in_the_cache_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--some--model"
    snapshot = repository / "snapshots" / SHA
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(SHA)
    save_file({"w": torch.arange(4.0)}, snapshot / "model.safetensors")
    state = {"w": torch.zeros(4)}
    with Checkpointer() as checkpointer:
        checkpointer.load_sync(state, "hf://some/model")
        assert state["w"].tolist() == [0, 1, 2, 3]
        with aiodcp.open(f"hf://some/model@{SHA}") as ckpt:
            assert list(ckpt) == ["w"]
        for url, problem in (("hf://some/other", "hf download some/other"), ("hf://a/b/c/d", "names no repository")):
            with pytest.raises(ArgumentError, match=problem):
                checkpointer.load_sync(state, url)

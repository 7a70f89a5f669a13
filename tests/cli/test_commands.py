"""The commands for people: what is there, what is in it, is it whole, what changed; run as they are typed."""

from __future__ import annotations

import json
import os
import pickle
import random
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from aiodcp import Checkpointer, CheckpointManager, LocalStorage
from aiodcp._cli.main import main
from aiodcp._format.dcp import ChunkStorageMetadata, TensorStorageMetadata
from aiodcp._format.naming import METADATA_NAME
from aiodcp._format.seal import OLD_MARK
from aiodcp.storage import file_access, local

from ..support.ranks import World
from ..support.states import assert_equal, make_state


def save(path: Path, state: dict[str, Any]) -> None:
    with Checkpointer() as checkpointer:
        checkpointer.save_sync(state, path)


def run(capsys: pytest.CaptureFixture[str], *arguments: object, status: int = 0) -> str:
    """Run a command and return what it printed; on standard error if it failed."""
    if status:
        with pytest.raises(SystemExit) as caught:
            main([str(each) for each in arguments])
        assert caught.value.code == status
    else:
        main([str(each) for each in arguments])
    printed = capsys.readouterr()
    return printed.err if status == 2 else printed.out


@pytest.fixture
def root(tmp_path: Path) -> Path:
    with CheckpointManager(tmp_path / "run") as manager:
        for step, loss in ((5, 0.5), (10, 0.25), (15, float("nan"))):
            manager.save_sync(step, make_state(step), metrics={"loss": loss})
    (tmp_path / "run" / "step-20").mkdir()
    (tmp_path / "run" / "step-20" / "__0_0_dead.distcp").write_bytes(b"half")
    (tmp_path / "run" / "other").mkdir()
    return tmp_path / "run"


def flip(folder: Path, data: bytes) -> None:
    """Damage one byte in the middle of `data`, in whichever file it is."""
    for file in folder.glob("*.distcp"):
        content = bytearray(file.read_bytes())
        at = content.find(data)
        if at >= 0:
            content[at + len(data) // 2] ^= 1
            file.write_bytes(content)
            return
    raise AssertionError("not there")


def test_the_script_is_installed_and_needs_no_torch_to_list(root: Path) -> None:
    script = Path(sys.executable).parent / "aiodcp"
    done = subprocess.run([script, "ls", root], capture_output=True, text=True, check=True)
    assert "step" in done.stdout.lower()
    code = "import sys; from aiodcp.__main__ import main; main(sys.argv[1:]); print('torch' in sys.modules)"
    for arguments in (["ls", str(root)], ["gc", str(root), "--dry-run", "--keep-last", "1"]):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
        assert done.stdout.endswith("False\n")


def test_ls_lists_what_is_complete_and_what_is_not(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = run(capsys, "ls", root).splitlines()
    assert lines[0].split() == ["STEP", "SAVED", "AGE", "SIZE", "FILES", "METRICS"]
    assert [line.split()[0] for line in lines[1:5]] == ["5", "10", "15", "20"]
    assert lines[2].endswith("loss 0.25")
    assert "incomplete" in lines[4]
    assert lines[5].startswith("4 steps")
    rows = json.loads(run(capsys, "ls", root, "--json"))
    assert [(row["step"], row["complete"], row["metrics"]) for row in rows] == [
        (5, True, {"loss": 0.5}),
        (10, True, {"loss": 0.25}),
        (15, True, {"loss": None}),
        (20, False, {}),
    ]
    assert rows[0]["nbytes"] == sum(os.stat(file).st_size for file in (root / "step-5").iterdir())
    (root.parent / "empty").mkdir()
    assert run(capsys, "ls", root.parent / "empty") == "no steps\n"
    assert "is not a directory" in run(capsys, "ls", root / "nothing", status=2)
    assert "is a checkpoint, not a directory of steps" in run(capsys, "ls", root / "step-5", status=2)
    assert f"such as {root}/step-15:" in run(capsys, "show", root, status=2)


def test_show_names_every_value(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = run(capsys, "show", root / "step-10")
    assert "model.weight" in text
    assert "(40, 30)" in text
    assert "bfloat16" in text
    assert "step: 10" in text
    result = json.loads(run(capsys, "show", root / "step-10", "--json"))
    rows = {row["fqn"]: row for row in result["values"]}
    assert rows["model.weight"]["nbytes"] == 4800
    assert rows["model.weight"]["chunks"][0]["sizes"] == [40, 30]
    assert rows["optim.param_groups.0.lr"]["shape"] is None
    below = json.loads(run(capsys, "show", root / "step-10", "model", "--json"))
    assert {row["fqn"] for row in below["values"]} == {
        f"model.{name}" for name in ("weight", "bias", "ids", "scalar", "empty")
    }
    assert "(0.9, 0.999)" in run(capsys, "show", root / "step-10", "optim.param_groups.0.betas")
    assert "from" in run(capsys, "show", root / "step-10", "model.weight", "--chunks")
    assert "contains no value named 'mode'" in run(capsys, "show", root / "step-10", "mode", status=2)
    assert "no committed checkpoint" in run(capsys, "show", root / "step-20", status=2)


@pytest.mark.parametrize("by", ["aiodcp", "dcp"])
def test_verify_finds_damage_wherever_it_is(by: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = make_state(1)
    if by == "aiodcp":
        save(tmp_path, state)
    else:
        dcp.save(state, checkpoint_id=str(tmp_path))
    assert "intact" in run(capsys, "verify", tmp_path)
    flip(tmp_path, state["model"]["weight"].numpy().tobytes())
    flip(tmp_path, state["model"]["ids"].numpy().tobytes())
    flip(tmp_path, b"state 1")
    problems = json.loads(run(capsys, "verify", tmp_path, "--json", status=1))["problems"]
    assert {each["fqn"] for each in problems} == {"model.weight", "model.ids", "name"}
    assert all("CRC32" in each["problem"] for each in problems)
    text = run(capsys, "verify", tmp_path, status=1)
    assert "3 problems" in text
    assert "model.weight" in text


def test_verify_finds_files_that_are_short_or_gone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path, make_state(1))
    [file] = tmp_path.glob("*.distcp")
    os.truncate(file, 8000)
    problems = json.loads(run(capsys, "verify", tmp_path, "--json", status=1))["problems"]
    assert any("truncated: 8000 bytes" in each["problem"] for each in problems)
    file.unlink()
    problems = json.loads(run(capsys, "verify", tmp_path, "--json", status=1))["problems"]
    assert [each["problem"] for each in problems] == ["the file is missing (16 values lost)"]
    (tmp_path / ".metadata").write_bytes(b"junk")
    assert ".metadata: not a checkpoint's metadata" in run(capsys, "verify", tmp_path, status=1)


def test_verify_finds_what_does_not_cover(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path, {"w": torch.ones(8), "v": torch.ones(4)})
    metadata = pickle.loads((tmp_path / METADATA_NAME).read_bytes())
    entry = metadata.state_dict_metadata["w"]
    assert isinstance(entry, TensorStorageMetadata)
    entry.size = torch.Size([9])
    index = next(each for each in metadata.storage_data if each.fqn == "v")
    del metadata.storage_data[index]
    (tmp_path / METADATA_NAME).write_bytes(pickle.dumps(metadata))
    problems = {
        each["fqn"]: each["problem"]
        for each in json.loads(run(capsys, "verify", tmp_path, "--json", status=1))["problems"]
    }
    assert "do not cover its shape exactly: (9,)" in problems["w"]
    assert "has no storage location for its chunk at (0,)" in problems["v"]
    entry.chunks = [ChunkStorageMetadata(offsets=torch.Size([0]), sizes=torch.Size([9]))]
    (tmp_path / METADATA_NAME).write_bytes(pickle.dumps(metadata))
    assert "w: " in (text := run(capsys, "verify", tmp_path, status=1))
    assert "holds 32 bytes, but its shape and dtype require 36" in text


def test_diff_says_what_changed_and_by_how_much(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = {
        "same": torch.arange(5.0),
        "moved": torch.zeros(4),
        "shape": torch.zeros(3),
        "dtype": torch.zeros(3),
        "kind": torch.zeros(3),
        "gone": 1,
        "lr": 0.1,
        "nan": torch.tensor([float("nan"), 1.0]),
        "zero": torch.tensor([0.0]),
        "flag": torch.tensor([True, False]),
    }
    b = {
        "same": torch.arange(5.0),
        "moved": torch.tensor([0.0, 3.0, 0.0, -1.0]),
        "shape": torch.zeros(4),
        "dtype": torch.zeros(3, dtype=torch.bfloat16),
        "kind": "text",
        "new": 1,
        "lr": 0.2,
        "nan": torch.tensor([float("nan"), 1.0]),
        "zero": torch.tensor([-0.0]),
        "flag": torch.tensor([True, True]),
    }
    save(tmp_path / "a", a)
    save(tmp_path / "b", b)
    result = json.loads(run(capsys, "diff", tmp_path / "a", tmp_path / "b", "--json", status=1))
    found = {row["fqn"]: row for row in result["differences"]}
    assert result["same"] is False
    assert found.keys() == {"moved", "shape", "dtype", "kind", "gone", "new", "lr", "zero", "flag"}
    assert (found["moved"]["count"], found["moved"]["largest"], found["moved"]["mean"]) == (2, 3.0, 1.0)
    assert found["shape"]["change"] == "shape (3,) in A, (4,) in B"
    assert found["dtype"]["change"] == "float32 in A, bfloat16 in B"
    assert found["kind"]["change"] == "a tensor in A, another kind of value in B"
    assert (found["gone"]["change"], found["new"]["change"]) == ("only in A", "only in B")
    assert found["lr"]["change"] == "0.1 in A, 0.2 in B"
    assert found["zero"]["count"] == 0
    assert found["flag"]["count"] == 1
    assert "9 values differ" in run(capsys, "diff", tmp_path / "a", tmp_path / "b", status=1)
    assert "the same" in run(capsys, "diff", tmp_path / "a", tmp_path / "a")


def test_gc_keeps_what_is_to_be_kept(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["gc", root, "--keep-last", "1", "--keep-best", "loss:min"]
    dry = run(capsys, *arguments, "--dry-run")
    one, other = dry.splitlines()
    assert re.fullmatch(r"would remove step 5: \d files, .*; the options do not keep it", one)
    assert re.fullmatch(r"would remove leftovers of an .* save of step 20: .*; it has no \.metadata, .*", other)
    assert len(list(root.glob("step-*"))) == 4
    result = json.loads(run(capsys, *arguments, "--json"))
    assert result == {"removed": [5], "leftovers": [20]}
    assert sorted(path.name for path in root.glob("step-*")) == ["step-10", "step-15"]
    assert run(capsys, "gc", root) == "nothing to remove\n"
    for wrong in (["--keep-best", "loss:min"], ["--keep-every", "5"]):
        assert "require --keep-last" in run(capsys, "gc", root, *wrong, status=2)
    assert "usage" in run(capsys, "gc", root, "--keep-best", "loss", status=2)


async def test_gc_does_not_touch_a_root_where_somebody_saves(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = "import sys; from aiodcp.__main__ import main; main(sys.argv[1:])"
    async with LocalStorage().lock(str(root), exclusive=False):
        done = subprocess.run(
            [sys.executable, "-c", code, "gc", str(root), "--keep-last", "1"],
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 2
    assert "another process is saving below" in done.stderr
    assert len(list(root.glob("step-*"))) == 4


def test_export_to_torch_is_what_was_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = make_state(3)
    save(tmp_path / "ckpt", state)
    assert "tensors" in run(capsys, "export", tmp_path / "ckpt", "--to", "torch", tmp_path / "out.pt")
    loaded = torch.load(tmp_path / "out.pt", weights_only=True)
    assert_equal(state, loaded)
    assert "will not be overwritten" in run(
        capsys, "export", tmp_path / "ckpt", "--to", "torch", tmp_path / "out.pt", status=2
    )
    assert not list(tmp_path.glob("*.tmp"))
    assert "cannot write" in run(
        capsys, "export", tmp_path / "ckpt", "--to", "torch", tmp_path / "no" / "where.pt", status=2
    )


def test_export_to_safetensors_is_sharded_with_an_index(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import load_file

    state = make_state(3)
    save(tmp_path / "ckpt", state)
    out = tmp_path / "one"
    text = run(capsys, "export", tmp_path / "ckpt", "--to", "safetensors", out, "--prefix", "model.")
    assert "5 tensors" in text
    assert_equal(dict(sorted(state["model"].items())), dict(sorted(load_file(out / "model.safetensors").items())))
    assert [path.name for path in out.iterdir()] == ["model.safetensors"]

    out = tmp_path / "many"
    result = json.loads(
        run(capsys, "export", tmp_path / "ckpt", "--to", "safetensors", out, "--shard-gb", "0.000005", "--json")
    )
    assert "epoch" in result["left_out"]
    index = json.loads((out / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    assert len(shards) > 1
    loaded = {name: load_file(out / file)[name] for name, file in index["weight_map"].items()}
    assert_equal(state["model"]["weight"], loaded["model.weight"])
    assert_equal(state["history"][0], loaded["history.0"])
    assert index["metadata"]["total_size"] == sum(each.nbytes for each in loaded.values())
    assert "will not be overwritten" in run(capsys, "export", tmp_path / "ckpt", "--to", "safetensors", out, status=2)
    assert "has nothing that 'nothing' means" in run(
        capsys, "export", tmp_path / "ckpt", "--to", "safetensors", tmp_path / "x", "--prefix", "nothing", status=2
    )
    assert not (tmp_path / "x").exists()


def test_export_refuses_what_safetensors_cannot_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "ckpt", {"w": torch.ones(3, dtype=torch.complex128)})
    text = run(capsys, "export", tmp_path / "ckpt", "--to", "safetensors", tmp_path / "out", status=2)
    assert "model.safetensors" in text


def _save_sharded(rank: int, size: int, path: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (size,))
    whole = torch.arange(60.0).view(12, 5)
    save(path, {"w": distribute_tensor(whole, mesh, [Shard(0)]), "step": 3})


def test_checkpoints_of_several_ranks_are_read_as_a_whole(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world.run(2, _save_sharded, tmp_path / "sharded")
    save(tmp_path / "whole", {"w": torch.arange(60.0).view(12, 5), "step": 3})
    assert "2 files" in run(capsys, "show", tmp_path / "sharded", "w")
    assert "intact" in run(capsys, "verify", tmp_path / "sharded")
    assert "the same" in run(capsys, "diff", tmp_path / "sharded", tmp_path / "whole")
    run(capsys, "export", tmp_path / "sharded", "--to", "torch", tmp_path / "out.pt")
    assert torch.equal(torch.load(tmp_path / "out.pt")["w"], torch.arange(60.0).view(12, 5))


def test_a_reader_that_goes_away_is_no_error(root: Path) -> None:
    command = f"{sys.executable} -m aiodcp show {root / 'step-5'} | head -n 1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("NAME")
    assert "Traceback" not in done.stderr


def test_hostile_custom_metadata_stops_no_command(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step, custom in (
        (5, {"step": 5, "metrics": {"loss": 10**400}, "saved_at": "soon"}),
        (10, {"metrics": [1, 2]}),
    ):
        with (root / f"step-{step}" / ".metadata").open("ab") as file:
            file.write(_old_seal(json.dumps(custom).encode()))
    with (root / "step-15" / ".metadata").open("ab") as file:
        file.write(_old_seal(b"[" * 100_000 + b"]" * 100_000))
    rows = json.loads(run(capsys, "ls", root, "--json"))
    assert [row["metrics"] for row in rows] == [{}, {}, {}, {}]
    assert ["not JSON" in row["problem"] for row in rows] == [False, False, True, False]
    assert "not JSON" in run(capsys, "ls", root)
    with CheckpointManager(root, keep_last=3, keep_best=("loss", "min")) as manager:
        assert manager.steps() == [5, 10]


def _old_seal(custom: bytes) -> bytes:
    return custom + len(custom).to_bytes(4, "little") + OLD_MARK


def test_metadata_with_any_bit_flipped_is_read_or_refused_in_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, {"w": torch.ones(3, 4), "nested": {"lr": 0.1, "v": torch.zeros(2)}})
    good = (tmp_path / ".metadata").read_bytes()
    chance = random.Random(0)
    for _ in range(150):
        damaged = bytearray(good)
        damaged[chance.randrange(len(good))] ^= 1 << chance.randrange(8)
        (tmp_path / ".metadata").write_bytes(damaged)
        for command in ("show", "verify"):
            status: object = 0
            try:
                main([command, str(tmp_path)])
            except SystemExit as ended:
                status = ended.code
            assert status in (0, 1, 2)
    assert "Traceback" not in capsys.readouterr().err


def test_differences_are_exact(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inf = float("inf")
    save(tmp_path / "a", {"big": torch.tensor([2**53]), "mask": torch.tensor([-inf, 1.0]), "pair": (torch.ones(2), 3)})
    save(
        tmp_path / "b",
        {"big": torch.tensor([2**53 + 1]), "mask": torch.tensor([-inf, 2.0]), "pair": (torch.ones(2), 3)},
    )
    result = json.loads(run(capsys, "diff", tmp_path / "a", tmp_path / "b", "--json", status=1))
    found = {row["fqn"]: (row["count"], row["largest"], row["mean"]) for row in result["differences"]}
    assert found == {"big": (1, 1.0, 1.0), "mask": (1, 1.0, 0.5)}
    save(tmp_path / "sparse", {"s": torch.eye(3).to_sparse()})
    assert "the same" in run(capsys, "diff", tmp_path / "sparse", tmp_path / "sparse")
    assert "intact" in run(capsys, "verify", tmp_path / "sparse")


def test_words_for_arguments_that_cannot_be_meant(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "must be a positive integer" in run(capsys, "gc", root, "--keep-last", "x", status=2)
    assert "unrecognized arguments: --what" in run(capsys, "ls", root, "--what", status=2)
    assert "--prefix requires" in run(
        capsys, "export", root / "step-5", "--to", "torch", root / "x", "--prefix", "m", status=2
    )
    assert "model.weight" in run(capsys, "show", root / "step-5", "--chunks", "model.weight")
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert not ended.value.code


@pytest.mark.parametrize("name", ["data", ".metadata"])
def test_what_cannot_be_read_is_one_line_and_no_damage(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "a", {"w": torch.ones(3)})
    save(tmp_path / "b", {"w": torch.ones(3)})
    path = next((tmp_path / "a").glob("*.distcp")) if name == "data" else tmp_path / "a" / name
    real = file_access.open_regular

    def refuse(opened: str, flags: int) -> int:
        if opened == str(path):
            raise PermissionError(13, "Permission denied", opened)
        return real(opened, flags)

    monkeypatch.setattr(local, "open_regular", refuse)
    monkeypatch.setattr(file_access, "open_regular", refuse)
    commands = [["verify", tmp_path / "a"], ["diff", tmp_path / "a", tmp_path / "b"]]
    commands += [["export", tmp_path / "a", "--to", "torch", tmp_path / "out.pt"]]
    for command in commands:
        with pytest.raises(SystemExit) as caught:
            main([str(each) for each in command])
        assert caught.value.code == 2
        said = capsys.readouterr().err
        assert "Permission denied" in said
        assert said.count("\n") == 1


def test_a_fifo_in_a_checkpoint_is_not_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "a", {"w": torch.ones(3)})
    path = next((tmp_path / "a").glob("*.distcp"))
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(SystemExit) as caught:
        main(["verify", str(tmp_path / "a")])
    assert caught.value.code == 1
    assert "not a regular file" in capsys.readouterr().out


def test_whatever_a_name_holds_is_written_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "a", {"w\x1b[2J\udcff": torch.ones(3)})
    shown = run(capsys, "show", tmp_path / "a")
    assert r"w\x1b[2J\udcff" in shown
    assert "\x1b" not in shown


def test_what_nobody_foresaw_is_one_line_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise MemoryError("no memory for 2^45 elements\nat all")

    monkeypatch.setattr("aiodcp._cli.ls.list_rows", fail)
    with pytest.raises(SystemExit) as caught:
        main(["ls", str(tmp_path)])
    assert caught.value.code == 2
    assert capsys.readouterr().err == "aiodcp ls: MemoryError: no memory for 2^45 elements\\nat all\n"


def test_it_runs_from_a_checkout_that_is_not_installed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def not_found(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("aiodcp._cli.main.version", not_found)
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == "aiodcp (not installed)\n"

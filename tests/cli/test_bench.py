"""The command line, and the benchmark at a size that takes seconds."""

import json
import os
import re
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from aiodcp._cli.bench import device, many, measure, single, store
from aiodcp._cli.bench.memory import extra_memory
from aiodcp._cli.bench.systems import System
from aiodcp._cli.bench.workload import Shape
from aiodcp._cli.main import main
from tests.support.object_servers import S3Server


def test_help_tells_of_the_commands() -> None:
    done = subprocess.run([sys.executable, "-m", "aiodcp", "--help"], capture_output=True, text=True, check=True)
    assert "bench" in done.stdout


@pytest.mark.parametrize("arguments", [[], ["bench", "--repeat", "0"], ["bench", "--gib", "-1"], ["dance"]])
def test_wrong_arguments_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_a_directory_that_is_not_there_is_not_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["bench", str(tmp_path / "typo")])
    assert caught.value.code == 2
    assert "create it first" in capsys.readouterr().err
    assert not (tmp_path / "typo").exists()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # as before


def test_a_benchmark_that_is_ended_leaves_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "aiodcp", "bench", str(tmp_path), "--gib", "0.1", "--repeat", "3"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert "round 0" in process.stderr.readline()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == []


def test_a_shell_is_told_how_a_line_goes_on(tmp_path: Path) -> None:
    line, out = "aiodcp ver", tmp_path / "out"
    env = os.environ | {
        "_ARGCOMPLETE": "1",
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
        "_ARGCOMPLETE_STDOUT_FILENAME": str(out),
        "_ARGCOMPLETE_IFS": "\n",
    }
    subprocess.run([sys.executable, "-m", "aiodcp"], env=env, check=True)
    assert out.read_text().strip() == "verify"


def test_the_benchmark_measures_every_system_and_prints_tables_or_json(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measure, "BUSY_LIMIT_S", 0.3)
    monkeypatch.setattr(measure, "BLOCK_S", 0.02)
    memory = extra_memory

    def only_ours(name: str, shape: Shape, directory: object) -> float:
        return memory(name, shape, directory) if name == "aiodcp" else 0.0  # type: ignore[arg-type]

    monkeypatch.setattr(single, "extra_memory", only_ours)
    place = tmp_path_factory.mktemp("bench")
    main(["bench", str(place), "--gib", "0.02", "--tensors", "50", "--repeat", "1", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert len(result["shapes"]) == 2
    for shape in result["shapes"]:
        assert set(shape["rows"]) == {"aiodcp", "dcp.async_save", "dcp + DefaultStager"}
        assert {"memcpy_s", "write_buffered_s"} <= set(shape["floors"])
        for row in shape["rows"].values():
            assert 0 < row["held_s"] <= row["staged_s"] <= row["durable_s"]
            assert row["load_warm_s"] > 0
        text = single.format_result(shape)
        assert "durable / raw write" in text
        assert "aiodcp" in text
    assert result["shapes"][0]["rows"]["aiodcp"]["extra_mib"] < 0.02 * 1024 + 64
    assert list(place.iterdir()) == []


def test_the_bench_of_planning_compares_with_dcps_planner_on_the_same_plans(
    capsys: pytest.CaptureFixture[str],
) -> None:
    main(["bench", "--plan", "6", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert (result["ranks"], result["tensors"]) == (6, 500)
    rows = result["rows"]
    assert rows["aiodcp, later saves"]["received"] + rows["aiodcp, later saves"]["sent"] < 1024
    assert rows["dcp, every save"]["received"] > 50_000
    assert rows["aiodcp, first save"]["received"] < 4096
    assert rows["aiodcp, first save"]["sent"] < 8192
    assert rows["aiodcp, a load"]["received"] < rows["dcp, a load"]["received"] / 4
    assert all(row["seconds"] > 0 for row in rows.values())


def test_the_bench_of_many_tensors_shows_what_every_call_costs(
    tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path_factory.mktemp("bench")
    main(["bench", str(place), "--many", "60", "--repeat", "1", "--json"])
    result = json.loads(capsys.readouterr().out)
    calls = ("entering", "first save", "later saves", "loads", "leaving", "preparing", "save after that")
    ours = [f"aiodcp, {call}" for call in calls]
    assert result["rows"].keys() - {"safetensors, and copies"} == {
        "an idle loop",
        "a bare copy",
        *ours,
        "dcp.async_save",
        "dcp.load",
    }
    for name, row in result["rows"].items():
        assert row["total_s"] > 0
        assert (row["staged_s"] > 0) == ("save" in name)
    assert "staged / a bare copy" in many.format_rows(60, result["rows"])
    assert list(place.iterdir()) == []


def test_under_torchrun_the_bench_shows_what_each_rank_stages(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "aiodcp", "bench"]
    done = subprocess.run(
        [*torchrun, str(tmp_path), "--gib", "0.01", "--repeat", "1"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    for system, replicated in (("aiodcp", "1.00x"), ("dcp.async_save", "2.00x")):
        sharded, whole = re.findall(rf"^{system} all .* ([0-9.]+x)$", done.stdout, re.MULTILINE)
        assert float(sharded[:-1]) < 1.1
        assert abs(float(whole[:-1]) - float(replicated[:-1])) < 0.1
    [ours] = re.findall(r"^aiodcp +(?:[\d.]+ ms +){4}([\d.]+) ms$", done.stdout, re.MULTILINE)
    [theirs] = re.findall(r"^dcp.save +(?:[\d.]+ ms +){2}([\d.]+) ms$", done.stdout, re.MULTILINE)
    assert float(ours) > 0 < float(theirs)
    assert not list(tmp_path.iterdir())


def test_the_bench_of_a_device_measures_every_system(
    tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path_factory.mktemp("bench")
    for name, size in {"WIDTH": 64, "LAYERS": 1, "CONTEXT": 16, "BATCH": 1}.items():  # what trains beside it
        monkeypatch.setattr(device, name, size)
    shape = Shape(name="tiny", tensors=3, elements=2048)
    device.run("cpu", str(place), [shape], repeat=1, as_json=True)  # the host stands in for a device
    [result] = json.loads(capsys.readouterr().out)["shapes"]
    assert set(result["rows"]) == {"aiodcp, staged", "aiodcp, fence", "dcp, cached", "dcp + DefaultStager"}
    for row in result["rows"].values():
        assert all(row[name] > 0 for name in ("held_s", "copied_s", "durable_s", "slowdown"))  # each by its own clock
    text = device.format_result(result)
    assert "best dcp held / ours" in text
    assert "copied / floor" in text
    assert list(place.iterdir()) == []


def test_the_bench_of_a_device_goes_on_without_a_peer_that_fails(
    tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path_factory.mktemp("bench")
    for name, size in {"WIDTH": 64, "LAYERS": 1, "CONTEXT": 16, "BATCH": 1}.items():
        monkeypatch.setattr(device, name, size)

    def fail(*args: object, **options: object) -> None:
        raise KeyError(type)

    monkeypatch.setattr(device, "dcp_async_save", fail)
    shape = Shape(name="tiny", tensors=3, elements=2048)
    device.run("cpu", str(place), [shape], repeat=1, as_json=False)
    text = capsys.readouterr().out
    assert "dcp, cached           failed: KeyError(<class 'type'>)" in text
    assert "aiodcp, fence" in text
    assert "best dcp" not in text


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is one")
def test_the_bench_of_a_device_needs_one(
    tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["bench", str(tmp_path_factory.mktemp("bench")), "--device", "cuda"])
    assert caught.value.code == 2
    assert "no accelerator" in capsys.readouterr().err


def test_the_benchmark_of_a_store_compares_with_the_bare_client_and_dcp_through_fsspec(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    systems = {name: make for name, make in store.SYSTEMS.items() if name != "s3torchconnector"}

    def absent() -> System:
        raise ImportError("no module named absent")

    monkeypatch.setattr(store, "SYSTEMS", systems | {"absent": absent})
    monkeypatch.setattr(store, "extra_memory", lambda name, shape, url: 7.0)
    url = s3.url()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of botocore and s3fs
        main(["bench", url, "--gib", "0.02", "--tensors", "50", "--repeat", "1", "--json"])
    result = json.loads(capsys.readouterr().out)
    for shape in result["shapes"]:
        assert shape["rows"].keys() == {"aiodcp", "dcp + fsspec"}
        assert shape["absent"] == {"absent": "no module named absent"}
        assert min(shape["floors"].values()) > 0
        for row in shape["rows"].values():
            assert 0 < row["held_s"] <= row["staged_s"] <= row["durable_s"]
            assert row["load_warm_s"] > 0
        text = store.format_result(shape)
        assert "durable / bare PUTs" in text
        assert re.search("absent +not measured: no module named absent", text)
    assert s3.keys(url) == []


def test_the_memory_of_a_save_to_a_store_is_measured_in_a_process_of_its_own(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    shape = Shape(name="small", tensors=16, elements=1 << 20)
    extra = store.extra_memory("aiodcp", shape, s3.url()) - shape.nbytes / (1 << 20)
    assert -16 < extra < 64

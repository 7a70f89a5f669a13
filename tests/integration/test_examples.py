"""The examples do what they say, the README's included."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

ROOT = Path(__file__).parents[2]
TRAIN = [
    sys.executable, "-u", "examples/train.py", "--width", "32", "--layers", "2", "--steps", "14", "--save-every", "3",
    "--log-every", "1",
]  # fmt: skip


def run(*command: str) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Warning" not in done.stderr
    return done.stdout


def weights(output: str) -> str:
    [line] = re.findall(r"^weights (\w+) after step 14$", output, re.MULTILINE)
    return str(line)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> str:
    return run(*TRAIN, "--out", str(tmp_path_factory.mktemp("whole")))


def test_training_prints_a_line_for_each_save_and_the_timeline(uninterrupted: str) -> None:
    assert len(re.findall(r"saved step \d+: .* MB, stalled .* ms, durable after .*under compute", uninterrupted)) == 4
    assert len(re.findall(r"saved step 14: .*no step follows", uninterrupted)) == 1
    for name in ("training", "captured", "planned", "staged", "checksums", "written", "committed"):
        [row] = re.findall(rf"^ *{name} ([█·]+) [\d.]+ ms$", uninterrupted, re.MULTILINE)
        assert len(row) == 72
        assert "█" in row


@pytest.mark.parametrize("seed", range(2))
def test_killed_at_any_step_and_resumed_the_weights_are_the_same_bits(
    seed: int, uninterrupted: str, tmp_path: Path
) -> None:
    chance = random.Random(seed)
    child = subprocess.Popen([*TRAIN, "--out", str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    last = chance.randrange(4, 13)
    for line in child.stdout:
        if line.startswith(f"step {last}:"):
            break
    time.sleep(chance.uniform(0, 0.02))
    child.kill()
    child.communicate()
    output = run(*TRAIN, "--out", str(tmp_path), "--resume")
    [resumed] = re.findall(r"^resumed after step (\d+)", output, re.MULTILINE)
    assert int(resumed) in range(last - 6, last + 2)
    assert weights(output) == weights(uninterrupted)


@pytest.mark.parametrize("fail", [None, "evaluate", "save"])
def test_a_task_group_ends_as_its_tasks_do_and_leaves_a_whole_checkpoint(fail: str | None) -> None:
    output = run(sys.executable, "examples/task_group.py", *(["--fail", fail] if fail else []))
    step = int(re.findall(r"what is there is whole, of step (\d+)", output)[0])
    if fail is None:
        assert step == 40
        assert "evaluate: step 40" in output
        assert "ended" not in output
    elif fail == "evaluate":
        assert "the group ended: RuntimeError: evaluation found something wrong" in output
        assert step in (20, 30, 40)
    else:
        assert "the group ended: WriteError" in output
        assert "No space left" in output
        assert step == 20


@pytest.mark.parametrize("name", ["README.md", "examples/README.md"])
def test_the_programs_in_the_texts_run(name: str, tmp_path: Path) -> None:
    text = (ROOT / name).read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert blocks
    files = [tmp_path / f"example_{number}.py" for number in range(len(blocks))]
    for file, block in zip(files, blocks, strict=True):
        file.write_text(block)
    # All in one process, each in a namespace of its own: to import torch takes longer than most of them.
    one_by_one = "import runpy, sys\nfor file in sys.argv[1:]:\n    runpy.run_path(file, run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", one_by_one, *map(str, files)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["fsdp_async_save", "fsdp_pinned", "fsdp_overlap"])
def test_the_tutorials_programs_run_under_torchrun_and_dcp_loads_what_they_saved(name: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", f"examples/{name}.py"]
    output = run(*command, "--out", str(tmp_path))
    assert "loaded step 9: weights equal" in output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-3", "step-6", "step-9"]
    weights = {
        "inner": {"weight": torch.zeros(1024, 1024), "bias": torch.zeros(1024)},
        "outer": {"weight": torch.zeros(512, 1024), "bias": torch.zeros(512)},
    }
    model = {f"{layer}.{name}": value for layer, values in weights.items() for name, value in values.items()}
    state: dict[str, Any] = {"app": {"model": model, "step": 0}}
    dcp.load(state, checkpoint_id=tmp_path / "step-9")
    assert state["app"]["step"] == 9
    assert all(float(value.std()) > 0.005 for value in model.values())
    assert len(list((tmp_path / "step-9").iterdir())) == 3  # a file of each rank, and .metadata


def test_a_plain_loop_goes_on_where_it_was_and_stops_when_asked(tmp_path: Path) -> None:
    loop = [sys.executable, "-u", "examples/plain_loop.py", "--out", str(tmp_path), "--save-every", "5"]
    output = run(*loop, "--steps", "20")
    assert "going on after 0" in output
    assert re.search(r"kept \[(\d+, )?15, 20\], best \d+; the loop was held [\d.]+ ms", output)
    output = run(*loop, "--steps", "25")
    assert "going on after 20" in output
    child = subprocess.Popen([*loop, "--steps", "100000"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    for line in child.stdout:
        if line.startswith("step 35"):
            break
    child.send_signal(signal.SIGTERM)
    rest, _ = child.communicate(timeout=60)
    assert child.returncode == 0
    [step] = re.findall(r"asked to stop at step (\d+)", rest)
    assert f", {step}]" in rest
    assert f"going on after {step}" in run(*loop, "--steps", step)


def test_a_run_in_an_object_store_is_killed_and_goes_on_while_an_evaluator_follows() -> None:
    output = run(sys.executable, "-u", "examples/object_store.py")
    assert "trainer: killed" in output
    assert re.search(r"trainer: going on after step (16|20)\n", output)
    seen = [int(step) for step in re.findall(r"^evaluator: step (\d+), loss", output, re.MULTILINE)]
    removed = [int(step) for step in re.findall(r"^evaluator: step (\d+) was removed", output, re.MULTILINE)]
    assert seen[-1] == 40
    assert seen == sorted({*seen})  # each once, in the order of the commits
    assert len({*seen, *removed}) >= 5  # others came and went between two looks


def test_an_orchestrator_that_is_killed_goes_on_with_every_episode_once(tmp_path: Path) -> None:
    controller = [sys.executable, "-u", "examples/orchestrator.py", "--out", str(tmp_path), "--save-every", "3"]
    steps = 0
    for seed in range(2):
        child = subprocess.Popen([*controller, "--steps", "100000"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        saves = 0
        for line in child.stdout:
            if line.startswith("going on after step"):
                assert int(re.findall(r"step (\d+)", line)[0]) >= steps > 0
            saves += "saved step" in line
            if saves == 4:
                steps = int(re.findall(r"saved step (\d+)", line)[0])
                break
        time.sleep(random.Random(seed).uniform(0, 0.02))
        child.kill()
        child.communicate()
    output = run(*controller, "--steps", str(steps + 30))
    [resumed] = re.findall(r"going on after step (\d+)", output)
    assert steps <= int(resumed) <= steps + 30
    [(played, learnt)] = re.findall(r"(\d+) episodes played, (\d+) learnt from, each once", output)
    assert int(learnt) == 4 * (steps + 30)
    assert int(played) >= int(learnt)
    assert "largest lag of the event loop" in output


def _interrupt(*command: str, after: str) -> str:
    """Run a program, press Ctrl-C when it has printed a line that begins so, and return what it printed."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    printed = ""
    for line in process.stdout:
        printed += line
        if line.startswith(after):
            process.send_signal(signal.SIGINT)
            break
    printed += process.stdout.read()
    process.stdout.close()
    assert process.wait(120) == 0, printed
    assert "Traceback" not in printed, printed
    return printed


def test_ctrl_c_ends_training_with_a_last_checkpoint_of_the_same_bits(uninterrupted: str, tmp_path: Path) -> None:
    out = ("--out", str(tmp_path))
    printed = _interrupt(*TRAIN, *out, after="step 4:")
    [step] = re.findall(r"asked to stop: step (\d+) is saved", printed)
    assert (tmp_path / f"step-{step}" / ".metadata").exists()
    assert weights(run(*TRAIN, *out, "--resume")) == weights(uninterrupted)


def test_ctrl_c_ends_a_task_group_with_a_last_checkpoint() -> None:
    printed = _interrupt(sys.executable, "-u", "examples/task_group.py", after="train: step 10")
    assert re.findall(r"what is there is whole, of step \d+", printed)

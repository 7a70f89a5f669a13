"""Both ways with `torch.distributed.checkpoint`, bit for bit."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from aiodcp import Checkpointer
from aiodcp._format.dtypes import NOT_COPIED

from ..support.dtypes import DTYPES, QUANTIZED
from ..support.states import assert_equal, blank, make_state


@pytest.fixture(autouse=True)
def _quiet_dcp() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dcp warns on every call that there is no process group
        yield


async def save(state: dict[str, Any], path: Path) -> None:
    async with Checkpointer() as checkpointer:
        await (await checkpointer.save(state, path)).uploaded


async def load(like: dict[str, Any], path: Path) -> dict[str, Any]:
    target: dict[str, Any] = blank(like)
    async with Checkpointer() as checkpointer:
        await checkpointer.load(target, path)
    return target


async def test_dcp_load_reads_what_aiodcp_wrote(tmp_path: Path) -> None:
    state = make_state(3)
    del state["optim"]["state"]  # its key 0: dcp.load adds a key "0" beside an int key instead of filling it
    await save(state, tmp_path)
    target = blank(state)
    dcp.load(target, checkpoint_id=tmp_path)
    assert_equal(state, target)


@pytest.mark.parametrize("thread_count", [1, 3])
async def test_aiodcp_reads_what_dcp_save_wrote(tmp_path: Path, thread_count: int) -> None:
    state = make_state(4)
    dcp.save(state, storage_writer=dcp.FileSystemWriter(tmp_path, thread_count=thread_count))
    assert_equal(state, await load(state, tmp_path))


async def test_aiodcp_reads_one_file_for_each_tensor(tmp_path: Path) -> None:
    state = make_state(4)
    dcp.save(state, storage_writer=dcp.FileSystemWriter(tmp_path, single_file_per_rank=False))
    assert len(list(tmp_path.iterdir())) > 10
    assert_equal(state, await load(state, tmp_path))


async def test_aiodcp_reads_what_dcp_async_save_wrote(tmp_path: Path) -> None:
    state = make_state(5)
    dcp.async_save(state, checkpoint_id=tmp_path).result()  # type: ignore[union-attr]
    assert_equal(state, await load(state, tmp_path))


@pytest.mark.parametrize("writer", ["aiodcp", "dcp"])
@pytest.mark.parametrize("reader", ["aiodcp", "dcp"])
async def test_every_dtype_goes_through(tmp_path: Path, writer: str, reader: str) -> None:
    dtypes = [dtype for dtype in DTYPES if dtype not in QUANTIZED]
    if reader == "dcp" or writer == "dcp":  # which cannot copy the first, and knows no size of the others
        dtypes = [dtype for dtype in dtypes if dtype not in NOT_COPIED and not str(dtype).startswith("torch.bits")]
    state = {}
    for dtype in dtypes:
        nbytes = 6 * dtype.itemsize
        pattern = torch.arange(nbytes, dtype=torch.uint8) % (2 if dtype is torch.bool else 120)
        state[str(dtype)] = pattern.view(dtype)
    if writer == "dcp":
        dcp.save(state, checkpoint_id=tmp_path)
    else:
        await save(state, tmp_path)
    target = {
        name: torch.zeros(6, dtype=torch.uint8).repeat(t.dtype.itemsize).view(t.dtype) for name, t in state.items()
    }
    if reader == "dcp":
        dcp.load(target, checkpoint_id=tmp_path)
    else:
        async with Checkpointer() as checkpointer:
            await checkpointer.load(target, tmp_path)
    assert_equal(state, target)


@pytest.mark.parametrize("writer", ["aiodcp", "dcp"])
async def test_layouts_and_shapes_of_all_kinds_go_through(tmp_path: Path, writer: str) -> None:
    base = torch.randn(50, 60)
    state = {
        "transposed": base.t(),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "view": base[3:5, 7:9],
        "expanded": torch.ones(1, 3).expand(4, 3),
        "scalar": torch.tensor(7),
        "empty": torch.empty(0, 4),
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "with.dots": {"ünïcode ☃": torch.randn(2), "": torch.randn(1)},
        "sparse": torch.eye(4).to_sparse(),
        "large": torch.randn(700, 800),
    }
    if writer == "dcp":
        dcp.save({key: value for key, value in state.items() if key != "sparse"}, checkpoint_id=tmp_path)
        del state["sparse"]
    else:
        await save(state, tmp_path)
    contiguous = {
        key: torch.zeros(value.shape, dtype=value.dtype) if isinstance(value, torch.Tensor) else blank(value)
        for key, value in state.items()
    }
    if "sparse" in state:
        contiguous["sparse"] = torch.zeros(4, 4).to_sparse()
    async with Checkpointer() as checkpointer:
        await checkpointer.load(contiguous, tmp_path)
    for key, value in state.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value.detach().to_dense(), contiguous[key].to_dense()), key
        else:
            assert_equal(value, contiguous[key])


async def test_targets_may_lie_in_memory_in_any_order(tmp_path: Path) -> None:
    state = {"w": torch.randn(600, 700), "small": torch.randn(6, 5)}
    await save(state, tmp_path)
    target = {"w": torch.zeros(700, 600).t(), "small": torch.zeros(5, 6).t()}
    async with Checkpointer() as checkpointer:
        await checkpointer.load(target, tmp_path)
    for name, tensor in state.items():
        assert torch.equal(tensor, target[name])


async def test_dcp_to_torch_save_reads_what_aiodcp_wrote(tmp_path: Path) -> None:
    state = make_state(6)
    await save(state, tmp_path / "ckpt")
    dcp_to_torch_save(tmp_path / "ckpt", tmp_path / "out.pt")
    read = torch.load(tmp_path / "out.pt", weights_only=True)
    state["optim"]["state"] = {"0": state["optim"]["state"][0]}  # DCP writes every key as text
    assert_equal(state, read)


async def test_a_plain_unzip_of_the_data_file_finds_true_checksums(tmp_path: Path) -> None:
    import io
    import zipfile

    from aiodcp._format.metadata_reader import read_metadata

    await save(make_state(7), tmp_path)
    metadata = read_metadata((tmp_path / ".metadata").read_bytes(), "m")
    assert len(metadata.storage_data) == 16
    for info in metadata.storage_data.values():
        data = (tmp_path / info.relative_path).read_bytes()[info.offset : info.offset + info.length]
        assert zipfile.ZipFile(io.BytesIO(data)).testzip() is None


class AppState:
    """The tutorial's wrapper around model and optimizer."""

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model = model
        self.optimizer = optimizer
        self.loads = 0

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optim": optimizer}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.loads += 1
        set_state_dict(
            self.model, self.optimizer, model_state_dict=state_dict["model"], optim_state_dict=state_dict["optim"]
        )


def _train(app: AppState, steps: int) -> None:
    for number in range(steps):
        app.optimizer.zero_grad()
        app.model(torch.full((4, 8), float(number))).square().sum().backward()
        app.optimizer.step()


def _make_app(seed: int) -> AppState:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 2))
    return AppState(model, torch.optim.Adam(model.parameters(), lr=0.1))


@pytest.mark.parametrize("writer", ["aiodcp", "dcp"])
@pytest.mark.parametrize("reader", ["aiodcp", "dcp"])
async def test_the_tutorials_app_state_goes_on_as_if_never_interrupted(
    tmp_path: Path, writer: str, reader: str
) -> None:
    app = _make_app(0)
    _train(app, 3)
    if writer == "dcp":
        dcp.save({"app": app}, checkpoint_id=tmp_path)
    else:
        await save({"app": app}, tmp_path)
    _train(app, 2)
    other = _make_app(1)
    if reader == "dcp":
        dcp.load({"app": other}, checkpoint_id=tmp_path)
    else:
        async with Checkpointer() as checkpointer:
            await checkpointer.load({"app": other}, tmp_path)
    assert other.loads == 1
    _train(other, 2)
    assert_equal(app.state_dict(), other.state_dict())

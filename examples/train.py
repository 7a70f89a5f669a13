"""Train a small GPT on the Python standard library's own sources, saving while it trains.

    python examples/train.py                # a quarter of a minute on two cores
    python examples/train.py --resume       # goes on after the newest checkpoint, bit for bit
    python examples/train.py --trace trace.json     # what happened when, to look at in https://ui.perfetto.dev

Ctrl-C saves the step that is under way, and ends; --resume goes on from there.

The loop is asyncio; a training step blocks it, as steps do. A save is begun after an optimizer step. Its staging runs
under the next forward and backward pass and is awaited before the next optimizer step, which is the first moment at
which the weights change again; its writing goes on under whatever comes next.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import os
import shutil
import signal
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the name the field gives it
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import aiodcp

CONTEXT = 128  # bytes of text that the model sees
BATCH = 8
KEPT = 2  # checkpoints


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(0.1))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        heads = self.qkv(self.norm_1(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(batch, length, width))
        out: Tensor = x + self.mlp(self.norm_2(x))
        return out


class GPT(nn.Module):
    """A decoder over bytes."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.token = nn.Embedding(256, width)
        self.position = nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*(Block(width, width // 32) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 256, bias=False)
        self.head.weight = self.token.weight  # tied

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits


def read_text() -> Tensor:
    """All bytes of the standard library's top-level modules, in the order of their names."""
    library = Path(sysconfig.get_paths()["stdlib"])
    return torch.frombuffer(
        bytearray(b"".join(p.read_bytes() for p in sorted(library.glob("*.py")))), dtype=torch.uint8
    )


class App:
    """All that training goes on from: a `Stateful`, as in PyTorch's tutorial."""

    def __init__(self, model: GPT, optimizer: torch.optim.Optimizer) -> None:
        self.model = model
        self.optimizer = optimizer
        self.step = 0

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        rng = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            rng["cuda"] = torch.cuda.get_rng_state()
        return {"model": model, "optim": optimizer, "rng": rng, "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"])
        self.step = state["step"]
        torch.set_rng_state(state["rng"]["cpu"])
        if "cuda" in state["rng"]:
            torch.cuda.set_rng_state(state["rng"]["cuda"])

    def digest(self) -> str:
        """A hash of every weight's bits."""
        digest = hashlib.sha256()
        for _, tensor in sorted(self.model.state_dict().items()):
            digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]


def batch_of(text: Tensor, step: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The text for one step; a function of the step, so that a resumed run reads what the other would have read."""
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(len(text) - CONTEXT - 1, (BATCH, 1), generator=generator)
    windows = text[starts + torch.arange(CONTEXT + 1)].long().to(device)
    return windows[:, :-1], windows[:, 1:]


Span = tuple[float, float]


@dataclass
class Save:
    """One save as the loop saw it."""

    step: int
    checkpoint: aiodcp.Checkpoint
    stall_s: float

    async def follow(self, compute: list[Span], *, is_last: bool) -> None:
        """Print the save's line when it is durable."""
        await self.checkpoint.uploaded
        timeline, nbytes = self.checkpoint.timeline, self.checkpoint.progress.bytes_total
        upload_s = timeline.spans[-1].ended_s - timeline.spans[0].began_s
        staged, written = (timeline.under(phase, compute) for phase in ("stage", "write"))
        under = "no step follows" if is_last else f"under compute: {staged:.0%} of staging, {written:.0%} of writing"
        print(
            f"  saved step {self.step}: {nbytes / 1e6:.1f} MB, stalled {1e3 * self.stall_s:.1f} ms, "
            f"durable after {1e3 * upload_s:.0f} ms ({nbytes / 1e9 / upload_s:.2f} GB/s); {under}",
            flush=True,
        )

    def between(self, phase: str) -> Span:
        span = self.checkpoint.timeline.between(phase)
        assert span is not None, "the save is not done"
        return span


async def train(options: argparse.Namespace) -> None:
    device = torch.device(options.device)
    torch.manual_seed(options.seed)
    model = GPT(options.width, options.layers).to(device)
    app = App(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    text = read_text()
    compute: list[Span] = []
    saves: list[Save] = []
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(text):,} bytes of text, {device}")

    if not options.resume and any(options.out.glob("step-*")):
        print(f"removing the steps of an earlier run from {options.out}; --resume would go on with them")
        shutil.rmtree(options.out)
    manager = aiodcp.CheckpointManager(
        options.out,
        keep_last=KEPT,
        save_interval=options.save_every,
        signals=[signal.SIGINT, signal.SIGTERM],
    )
    async with asyncio.TaskGroup() as group, manager:
        checkpointer = manager.checkpointer
        if await manager.restore({"app": app}) is not None:
            print(f"resumed after step {app.step} from {manager.path(app.step)}")
        await checkpointer.prepare({"app": app})

        for step in range(app.step + 1, options.steps + 1):
            began = time.perf_counter()
            with checkpointer.step(step):
                tokens, targets = batch_of(text, step, device)
                loss = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
                loss.backward()  # type: ignore[no-untyped-call]
            compute.append((began, time.perf_counter()))

            if saves:
                began = time.perf_counter()
                await saves[-1].checkpoint.staged  # from here on the weights may change
                saves[-1].stall_s += time.perf_counter() - began if saves[-1].step == step - 1 else 0.0

            began = time.perf_counter()
            app.optimizer.step()
            app.optimizer.zero_grad()
            app.step = step
            compute.append((began, time.perf_counter()))
            if step % options.log_every == 0:
                print(f"step {step}: loss {loss.item():.3f}", flush=True)

            if manager.should_save(step) or step == options.steps:
                began = time.perf_counter()
                checkpoint = await manager.save(step, {"app": app}, metrics={"loss": loss.item()})
                assert checkpoint is not None, "no save is skipped"
                saves.append(Save(step, checkpoint, stall_s=time.perf_counter() - began))
                is_last = step == options.steps or manager.preempted.done()
                group.create_task(saves[-1].follow(compute, is_last=is_last))
            if manager.preempted.done():
                print(f"asked to stop: step {step} is saved, --resume goes on", flush=True)
                break
            await asyncio.sleep(0)  # everything else that lives on this loop has its turn
        for save in saves:
            await save.checkpoint.uploaded
        if options.trace:
            checkpointer.write_trace(options.trace)

    if saves:
        print(draw(saves[-2:][0], compute))  # the last one, but that nothing is trained under it
    more = "" if app.step < options.steps else f" --steps {2 * options.steps}"
    print(f"kept steps {manager.steps()}: --resume{more} goes on")
    print(f"see `aiodcp ls {options.out}`, and `aiodcp report {options.out}` for pictures of all saves")
    print(f"weights {app.digest()} after step {app.step}")


PHASES = {
    "capture": "captured",
    "plan": "planned",
    "stage": "staged",
    "checksum": "checksums",
    "write": "written",
    "commit": "committed",
}


def draw(save: Save, compute: list[Span], width: int = 72) -> str:
    """The time of one save as text: a column is filled where the row was at work for some of it."""
    start, stop = save.between("capture")[0], save.between("commit")[1]
    column_s = (stop - start) / width

    def row(name: str, spans: list[Span]) -> str:
        cells = (
            "█" if any(a < start + (n + 1) * column_s and b > start + n * column_s for a, b in spans) else "·"
            for n in range(width)
        )
        took = sum(max(0.0, min(b, stop) - max(a, start)) for a, b in spans)
        return f"{name:>10} {''.join(cells)} {1e3 * took:.1f} ms"

    spans = save.checkpoint.timeline.spans
    rows = {"training": compute} | {
        name: [(span.began_s, span.ended_s) for span in spans if span.name == phase] for phase, name in PHASES.items()
    }
    nbytes = save.checkpoint.progress.bytes_total
    head = f"the save of step {save.step}, {nbytes / 1e6:.1f} MB: {1e3 * (stop - start):.0f} ms from left to right"
    return "\n".join([head, *(row(name, each) for name, each in rows.items())])


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("checkpoints/train"), help="where checkpoints go")
    parser.add_argument("--steps", type=int, default=60, help="train up to this step")
    parser.add_argument("--save-every", type=int, default=10, help="steps between saves")
    parser.add_argument("--log-every", type=int, default=10, help="steps between losses")
    parser.add_argument("--resume", action="store_true", help="go on after the newest checkpoint")
    parser.add_argument("--width", type=int, default=256, help="of the model: a multiple of 32")
    parser.add_argument("--layers", type=int, default=4, help="of the model")
    parser.add_argument("--trace", type=Path, help="write what happened when, for https://ui.perfetto.dev")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    if options.device.startswith("cuda"):  # the same bits again, on a GPU too
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    return options


if __name__ == "__main__":
    try:
        asyncio.run(train(parse()))
    except KeyboardInterrupt:  # a second Ctrl-C
        raise SystemExit(128 + signal.SIGINT) from None

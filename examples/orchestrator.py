"""An asyncio controller for reinforcement learning, whose checkpoint is one commit of several participants.

    python examples/orchestrator.py            # 60 steps; kill it at any moment, and
    python examples/orchestrator.py            # it goes on: every episode is trained on once, none twice
    python examples/orchestrator.py --fresh    # forget the last run

Rollout workers play episodes and put them into a replay buffer; the trainer takes each out once and learns from it, in
a thread; a judge in another process keeps the scores. A checkpoint must not show a trainer that has learnt from an
episode that is still in the buffer, nor a buffer without an episode that the judge has scored: what is captured
between two `await`s is of one instant. The trainer goes on as soon as its own part is staged.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import signal
import sys
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import aiodcp

WORKERS = 4
CAPACITY = 64  # episodes in the replay buffer
LENGTH, SENSES, ACTIONS = 32, 8, 4
EPISODES_A_STEP = 4
LAG_PERIOD_S = 0.002


class Trainer:
    """Learns from each worker's episodes in their order, by policy gradients; says so if one is lost or comes twice."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(SENSES, 256), nn.Tanh(), nn.Linear(256, 256), nn.Tanh())
        self.model.append(nn.Linear(256, ACTIONS))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.step = 0
        self.trained = [0] * WORKERS
        self.between_steps = asyncio.Lock()

    def state_dict(self) -> dict[str, Any]:  # model and optimizer are participants of their own
        return {"step": self.step, "trained": self.trained}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.trained = state["step"], state["trained"]

    async def learn(self, replay: Replay) -> float:
        episodes = [await replay.take() for _ in range(EPISODES_A_STEP)]
        async with self.between_steps:
            for worker, number, _ in episodes:
                assert number == self.trained[worker], f"worker {worker}: {number} instead of {self.trained[worker]}"
                self.trained[worker] += 1
            rewards = await asyncio.to_thread(self._learn, torch.stack([data for _, _, data in episodes]))
            self.step += 1
        return rewards

    def _learn(self, episodes: Tensor) -> float:
        senses, actions, rewards = torch.split(episodes, [SENSES, 1, 1], dim=-1)
        chosen = self.model(senses).log_softmax(dim=-1).gather(-1, actions.long())
        loss = -(chosen * (rewards - rewards.mean())).mean()
        loss.backward()
        self.optimizer.step()  # waits until the weights are staged: it is guarded
        self.optimizer.zero_grad()
        return float(rewards.mean())


class Replay:
    """A ring of episodes that nobody has learnt from yet."""

    def __init__(self) -> None:
        self.episodes = torch.zeros(CAPACITY, LENGTH, SENSES + 2)
        self.whose = torch.zeros(CAPACITY, 2, dtype=torch.int64)  # worker, number of its episode
        self.put_count = self.taken_count = 0
        self.changed = asyncio.Condition()
        self.part: aiodcp.Checkpoint | None = None  # of a checkpoint that may still be copying the ring

    def state_dict(self) -> dict[str, Any]:
        ring = {"episodes": self.episodes, "whose": self.whose}
        return ring | {"put": self.put_count, "taken": self.taken_count}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # the ring was filled in place
        self.put_count, self.taken_count = state["put"], state["taken"]

    async def put(self, worker: int, number: int, episode: Tensor, judge: Judge) -> None:
        async with self.changed:
            await self.changed.wait_for(lambda: self.put_count - self.taken_count < CAPACITY)
            if self.part is not None:
                await self.part.staged  # until then the ring must not change
            place = self.put_count % CAPACITY
            self.episodes[place], self.whose[place] = episode, torch.tensor([worker, number])
            self.put_count += 1
            judge.score(float(episode[:, -1].mean()))  # no await in between: a checkpoint has both or neither
            self.changed.notify_all()

    async def take(self) -> tuple[int, int, Tensor]:
        async with self.changed:
            await self.changed.wait_for(lambda: self.taken_count < self.put_count)
            place = self.taken_count % CAPACITY
            self.taken_count += 1
            worker, number = self.whose[place].tolist()
            episode = self.episodes[place].clone()
            self.changed.notify_all()
            return worker, number, episode


class Judge:
    """Another process, that counts episodes and keeps their average; it is spoken to over pipes, in order."""

    async def __aenter__(self) -> Judge:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, __file__, "--judge", stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        await self._process.wait()

    def score(self, reward: float) -> None:
        self._say({"reward": reward})

    async def restore(self, state: dict[str, Any]) -> None:
        self._say({"restore": state})

    def snapshot(self) -> asyncio.Future[dict[str, Any]]:
        """Ask for its state as of now: after all that was said before, and nothing that is said later."""
        self._say({"snapshot": True})
        assert self._process.stdout is not None
        reading = asyncio.ensure_future(self._process.stdout.readline())
        answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        reading.add_done_callback(lambda line: answer.set_result(json.loads(line.result())))
        return answer

    def _say(self, words: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(words).encode() + b"\n")


def be_the_judge() -> None:
    """What the other process does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the controller
    state = {"count": 0, "average": 0.0}
    for line in sys.stdin:
        words = json.loads(line)
        if "reward" in words:
            state["count"] += 1
            state["average"] += 0.02 * (words["reward"] - state["average"])
        elif "restore" in words:
            state = words["restore"]
        else:
            print(json.dumps(state), flush=True)


async def play(worker: int, played: list[int], trainer: Trainer, replay: Replay, judge: Judge) -> None:
    """Play one episode after the other with the policy of the moment; what to do is the first sense that is largest."""
    while True:
        number = played[worker]
        chance = torch.Generator().manual_seed(1_000_003 * worker + number)
        senses = torch.randn(LENGTH, SENSES, generator=chance)
        with torch.no_grad():
            actions = torch.multinomial(trainer.model(senses).softmax(dim=-1), 1, generator=chance)
        rewards = (actions == senses[:, :ACTIONS].argmax(dim=-1, keepdim=True)).float()
        await asyncio.sleep(0.001)  # the world takes its time
        await replay.put(worker, number, torch.cat([senses, actions, rewards], dim=-1), judge)
        played[worker] = number + 1


async def save(manager: aiodcp.CheckpointManager, trainer: Trainer, replay: Replay, judge: Judge) -> None:
    """Commit one checkpoint of all participants."""
    async with AsyncExitStack() as pause:
        await pause.enter_async_context(trainer.between_steps)
        await pause.enter_async_context(replay.changed)
        began, step = time.perf_counter(), trainer.step
        async with manager.checkpoint(step) as ckpt:
            ckpt.add("model", trainer.model)  # from here on no await: all of this is of one instant
            ckpt.add("optim", trainer.optimizer)
            ckpt.add("trainer", trainer)
            replay.part = ckpt.add("replay", replay)
            judged = judge.snapshot()
            await pause.aclose()  # all go on; the optimizer and the ring wait for their own part of the copy
            paused_s = time.perf_counter() - began
            ckpt.add("judge", judged)  # its answer comes when it comes
        print(f"  saved step {step}: paused {1e3 * paused_s:.1f} ms, durable after {time.perf_counter() - began:.3f} s")


async def watch_lag() -> None:
    """Print, in the end, for how long at most the event loop did not turn."""
    largest, last = 0.0, time.perf_counter()
    try:
        while True:
            await asyncio.sleep(LAG_PERIOD_S)
            now = time.perf_counter()
            largest, last = max(largest, now - last - LAG_PERIOD_S), now
    finally:
        print(f"largest lag of the event loop: {1e3 * largest:.1f} ms")


async def main(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    trainer, replay = Trainer(), Replay()
    async with (
        Judge() as judge,
        aiodcp.CheckpointManager(options.out, keep_last=2, signals=[signal.SIGINT, signal.SIGTERM]) as manager,
    ):
        state: dict[str, Any] = {"model": trainer.model, "optim": trainer.optimizer, "trainer": trainer}
        state |= {"replay": replay, "judge": {"count": 0, "average": 0.0}}
        if await manager.restore(state) is not None:
            print(f"going on after step {trainer.step}, with {replay.put_count - replay.taken_count} episodes to learn")
        await judge.restore(state["judge"])
        manager.checkpointer.guard(trainer.optimizer)

        # Each worker's next episode: after those that were learnt from, and those in the ring.
        played = list(trainer.trained)
        for place in range(replay.taken_count, replay.put_count):
            played[int(replay.whose[place % CAPACITY, 0])] += 1
        tasks = [asyncio.create_task(watch_lag())]
        tasks += [asyncio.create_task(play(n, played, trainer, replay, judge)) for n in range(WORKERS)]
        saving: asyncio.Task[None] | None = None
        while trainer.step < options.steps:
            reward = await trainer.learn(replay)
            if trainer.step % 10 == 0:
                print(f"step {trainer.step}: reward {reward:.2f}", flush=True)
            if trainer.step % options.save_every == 0 or manager.preempted.done():
                if saving is not None:
                    await saving
                saving = asyncio.create_task(save(manager, trainer, replay, judge))
                await asyncio.sleep(0)
            if manager.preempted.done():
                print(f"asked to stop after step {trainer.step}")
                break
        if saving is not None:
            await saving
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        judged = await judge.snapshot()
    assert judged["count"] == replay.put_count == sum(played), "an episode is lost, or was counted twice"
    assert sum(trainer.trained) == replay.taken_count == EPISODES_A_STEP * trainer.step
    print(f"{replay.put_count} episodes played, {replay.taken_count} learnt from, each once; the rest is in the buffer")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("checkpoints/orchestrator"), help="where checkpoints go")
    parser.add_argument("--steps", type=int, default=60, help="learn up to this step")
    parser.add_argument("--save-every", type=int, default=5, help="steps between saves")
    parser.add_argument("--fresh", action="store_true", help="remove the checkpoints of the last run first")
    parser.add_argument("--judge", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.judge:
        be_the_judge()
    else:
        if options.fresh:
            shutil.rmtree(options.out, ignore_errors=True)
        asyncio.run(main(options))

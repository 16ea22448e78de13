"""The links between ranks: a sum over all, and a hidden state from each rank to each other, every byte verified.
Takes some seconds, and the memory of two hidden states. Runs as ranks of its own, which the watch ends when they hang.

python -m loop.distributed.launch --nproc-per-node 2 -m loop.check.links TOKENS HIDDEN
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from typing import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from loop.check.findings import Finding, wait_for
from loop.distributed.groups import Ranks
from loop.errors import ROOT, run_command

CONNECT_S, TIMEOUT_S = 120, 20  # after which ranks that do not connect, or hang in a transfer, are ended
LIMIT_S = 300  # for all of it
REPEATS = 3
NO_P2P = "NCCL_P2P_DISABLE"  # consumer cards are known to hang in direct transfers


def links(num_ranks: int, tokens: int, hidden: int) -> list[Finding]:
    """Tries the links; where they hang or fail on GPUs, tries them again without direct transfers between cards."""
    if num_ranks < 2:
        return [Finding("links", "between GPUs", "there is one: nothing to check")]
    found, problem = tried(num_ranks, tokens, hidden, {})
    if problem and torch.cuda.is_available() and NO_P2P not in os.environ:
        found, second = tried(num_ranks, tokens, hidden, {NO_P2P: "1"})
        works = f". They work with {NO_P2P}=1: put `export {NO_P2P}=1` first"
        problem += f"; also with {NO_P2P}=1: {second}" if second else works
    if problem:
        return [Finding("links", f"between {num_ranks} ranks", "they do not work", problem, {"measured": found})]
    return [Finding("links", name, f"{gb_per_s:.2f} GB/s, every byte right", numbers={"gb_per_s": gb_per_s})
            for name, gb_per_s in found.items()]


def tried(num_ranks: int, tokens: int, hidden: int, variables: dict[str, str]) -> tuple[dict[str, float], str]:
    """Starts the ranks; returns GB/s by link, and what went wrong, "" if nothing did."""
    command = [sys.executable, "-m", "loop.distributed.launch", "--nproc-per-node", str(num_ranks),
               "-m", "loop.check.links", str(tokens), str(hidden)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
                   **variables}
    environment.setdefault("OMP_NUM_THREADS", "1")
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        return {}, f"the ranks had not ended after {LIMIT_S} s"
    if done.returncode == 0:
        return json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1]), ""
    said = [line.removeprefix("error: ") for line in done.stderr.splitlines() if line.startswith("error:")]
    return {}, said[0] if said else (done.stderr.strip().splitlines() or ["they ended without a word"])[-1]


def main() -> None:
    tokens, hidden = map(int, sys.argv[1:3])
    ranks = Ranks.from_launcher()
    ranks.connect(CONNECT_S)
    ranks.watch.limit_s = TIMEOUT_S / 2
    dtype = torch.bfloat16
    state_1TD = torch.empty(1, tokens, hidden, dtype=dtype, device=ranks.device)
    found = {f"sum over {ranks.world_size} ranks": summed(ranks, state_1TD)}
    for sender in range(ranks.world_size):
        for receiver in range(ranks.world_size):
            if sender != receiver:
                found[f"rank {sender} to rank {receiver}"] = sent(ranks, state_1TD, sender, receiver)
    if ranks.is_main:
        print(json.dumps(found), flush=True)
    ranks.disconnect()


def timed(ranks: Ranks, what: str, communicate: Callable[[], object]) -> float:
    """The seconds of one transfer."""
    with ranks.watch.waiting(what):
        dist.barrier()
        wait_for(ranks.device)
        started = time.perf_counter()
        communicate()
        wait_for(ranks.device)
        return time.perf_counter() - started


def summed(ranks: Ranks, state_1TD: Tensor) -> float:
    """GB/s of the fastest of some sums; the first one, which also connects, is not counted."""
    times = []
    for _ in range(REPEATS + 1):
        state_1TD.fill_(ranks.rank + 1)
        times.append(timed(ranks, "all ranks to join in a sum", lambda: dist.all_reduce(state_1TD)))
        verify(state_1TD, torch.full_like(state_1TD, ranks.world_size * (ranks.world_size + 1) // 2))
    return state_1TD.nbytes / min(times[1:]) / 1e9


def sent(ranks: Ranks, state_1TD: Tensor, sender: int, receiver: int) -> float:
    """GB/s of the fastest of some messages from one rank to another, likewise; on ranks beside these two of nothing."""
    pattern_1TD = (torch.arange(state_1TD.numel(), device=ranks.device) % 251).to(state_1TD.dtype).view_as(state_1TD)
    work: dict[int, Callable[[], object]] = {
        sender: lambda: dist.send(pattern_1TD, receiver), receiver: lambda: dist.recv(state_1TD, sender)}
    times = []
    for _ in range(REPEATS + 1):
        state_1TD.zero_()
        what = f"a hidden state from rank {sender} to rank {receiver}"
        times.append(timed(ranks, what, work.get(ranks.rank, lambda: None)))
        if ranks.rank == receiver:
            verify(state_1TD, pattern_1TD)
    return state_1TD.nbytes / min(times[1:]) / 1e9


def verify(found: Tensor, expected: Tensor) -> None:
    wrong = int((found != expected).sum())
    if wrong:
        raise ValueError(f"{wrong:,} of {found.numel():,} numbers arrived with other values")


if __name__ == "__main__":
    run_command(main)

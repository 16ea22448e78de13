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
from typing import Any

import torch
import torch.distributed as dist

from loop.check.findings import Finding, wait_for
from loop.distributed.groups import Ranks
from loop.errors import ROOT, run_command

TIMEOUT_S = 20  # after which ranks that hang are ended
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
    command = [sys.executable, "-m", "loop.distributed.launch", "--standalone", "--nproc-per-node", str(num_ranks),
               "-m", "loop.check.links", str(tokens), str(hidden)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
                   **variables}
    environment.setdefault("OMP_NUM_THREADS", "1")
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1]), ""
    said = [line.removeprefix("error: ") for line in done.stderr.splitlines() if line.startswith("error:")]
    return {}, said[0] if said else (done.stderr.strip().splitlines() or ["they ended without a word"])[-1]


def main() -> None:
    tokens, hidden = map(int, sys.argv[1:3])
    ranks = Ranks.from_launcher()
    ranks.connect(TIMEOUT_S)
    dtype = torch.bfloat16
    state_1TD = torch.empty(1, tokens, hidden, dtype=dtype, device=ranks.device)
    found: dict[str, float] = {}
    took = timed(ranks, "all ranks to join in a sum", lambda: summed(ranks, state_1TD))
    found[f"sum over {ranks.world_size} ranks"] = state_1TD.nbytes / took / 1e9
    for sender in range(ranks.world_size):
        for receiver in range(ranks.world_size):
            if sender != receiver:
                took = timed(ranks, f"a hidden state from rank {sender} to rank {receiver}",
                             lambda: sent(ranks, state_1TD, sender, receiver))
                found[f"rank {sender} to rank {receiver}"] = state_1TD.nbytes / took / 1e9
    if ranks.is_main:
        print(json.dumps(found))
    ranks.disconnect()


def timed(ranks: Ranks, what: str, communicate: Any) -> float:
    """The least seconds of a transfer; the first one, which also connects, is not counted."""
    times = []
    for _ in range(REPEATS + 1):
        with ranks.watch.waiting(what):
            dist.barrier()
            wait_for(ranks.device)
            started = time.perf_counter()
            communicate()
            wait_for(ranks.device)
            times.append(time.perf_counter() - started)
    return min(times[1:])


def summed(ranks: Ranks, state_1TD: torch.Tensor) -> None:
    state_1TD.fill_(ranks.rank + 1)
    dist.all_reduce(state_1TD)
    verify(state_1TD, torch.full_like(state_1TD, ranks.world_size * (ranks.world_size + 1) // 2))


def sent(ranks: Ranks, state_1TD: torch.Tensor, sender: int, receiver: int) -> None:
    pattern_1TD = (torch.arange(state_1TD.numel(), device=ranks.device) % 251 + sender).to(state_1TD.dtype).view_as(state_1TD)
    if ranks.rank == sender:
        dist.send(pattern_1TD, receiver)
    elif ranks.rank == receiver:
        dist.recv(state_1TD.zero_(), sender)
        verify(state_1TD, pattern_1TD)


def verify(found: torch.Tensor, expected: torch.Tensor) -> None:
    wrong = int((found != expected).sum())
    if wrong:
        raise ValueError(f"{wrong:,} of {found.numel():,} numbers arrived with other values")


if __name__ == "__main__":
    run_command(main)

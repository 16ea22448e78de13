"""Which process groups are made, and what torch is told before it uses a GPU."""

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from loop.distributed.groups import Ranks, compute_deterministically

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("world_size, num_stages, groups", [
    (4, 1, []), (2, 2, []), (3, 3, []), (4, 2, [[[0, 1], [2, 3]], [[0, 2], [1, 3]]])])
def test_only_groups_that_are_used_are_made(monkeypatch, world_size, num_stages, groups):
    """Each group connects as it is made, and takes memory on the GPU."""
    made = []
    monkeypatch.setattr(dist, "new_subgroups_by_enumeration", lambda ranks, timeout: made.append(ranks) or (object(), None))
    ranks = Ranks(0, world_size, num_stages)
    ranks.make_groups(timedelta(seconds=1))
    assert made == groups
    assert (ranks.replica_group is None) == (ranks.stage_group is None) == (not groups)


@pytest.mark.parametrize("given, expected", [
    ({}, "expandable_segments:True"), ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, "max_split_size_mb:64"),
    ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, None)])
@pytest.mark.parametrize("first", ["loop", "model"])
def test_the_allocator_grows_its_segments_unless_the_user_said_otherwise(monkeypatch, first, given, expected):
    """Set before torch is imported: bitsandbytes asks for the card as it is imported, and the allocator reads its settings."""
    environment = {name: value for name, value in os.environ.items() if not name.endswith("ALLOC_CONF")} | given
    code = f"import os, sys, {first}; print(os.environ.get('PYTORCH_ALLOC_CONF'), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout == f"{expected} False\n", done.stderr


def test_deterministic_runs_do_not_fill_every_buffer_first(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    was = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    try:
        compute_deterministically()
        assert torch.are_deterministic_algorithms_enabled() and not torch.utils.deterministic.fill_uninitialized_memory
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8", "as the user said"
    finally:
        torch.use_deterministic_algorithms(was[0])
        torch.utils.deterministic.fill_uninitialized_memory = was[1]


@pytest.mark.parametrize("rank, awaited", [
    (0, "the other ranks to take what rank 0 has read"), (1, "rank 0 to send what it has read")])
def test_no_rank_waits_for_itself(monkeypatch, rank, awaited):
    """Found: "rank 0 waited for rank 0 to send what it has read"."""
    ranks, seen = Ranks(rank, 2), []
    monkeypatch.setattr("torch.distributed.broadcast", lambda tensor, src: seen.append(ranks.watch.awaited()))
    ranks.broadcast(torch.zeros(1))
    assert seen == [awaited]

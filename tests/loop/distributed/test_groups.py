"""Which process groups are made, and what torch is told before it uses a GPU."""

import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from loop.distributed.groups import Ranks, configure_cuda


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


@pytest.fixture
def settings(monkeypatch):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "CUBLAS_WORKSPACE_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    was = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    yield monkeypatch
    torch.use_deterministic_algorithms(was[0])
    torch.utils.deterministic.fill_uninitialized_memory = was[1]
    for name in ("PYTORCH_ALLOC_CONF", "CUBLAS_WORKSPACE_CONFIG"):
        os.environ.pop(name, None)


def test_the_allocator_grows_its_segments_unless_the_user_said_otherwise(settings):
    configure_cuda(deterministic=False)
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert not torch.are_deterministic_algorithms_enabled()
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        settings.delenv("PYTORCH_ALLOC_CONF", raising=False)
        settings.setenv(name, "max_split_size_mb:64")
        configure_cuda(deterministic=False)
        assert os.environ.get("PYTORCH_ALLOC_CONF") == ("max_split_size_mb:64" if name == "PYTORCH_ALLOC_CONF" else None)
        settings.delenv(name)


def test_deterministic_runs_do_not_fill_every_buffer_first(settings):
    configure_cuda(deterministic=True)
    assert torch.are_deterministic_algorithms_enabled() and not torch.utils.deterministic.fill_uninitialized_memory

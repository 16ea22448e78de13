"""`train.deterministic`: no operation of a training step is one that torch refuses on CUDA under deterministic algorithms."""

import re

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from data.batches import Microbatch, StepBatch
from loop.accumulate import forward_backward
from loop.memory.phases import Memory
from loop.optim import make_optimizer
from model.build import build
from model.config import LoraConfig
from model.tiny.write import write_tiny

CPU = torch.device("cpu")


class Recorder(TorchDispatchMode):
    """The names of all operations, and whether any of their tensors is a float."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        is_float = any(isinstance(arg, torch.Tensor) and arg.is_floating_point() for arg in args)
        self.seen.add((func.overloadpacket.__name__, is_float))
        return func(*args, **(kwargs or {}))


def refused():
    """The operations that torch's documentation lists as raising on CUDA."""
    text = torch.use_deterministic_algorithms.__doc__
    listed = text.partition("operations will throw a\n")[2].partition("In addition, several operations")[0]
    return set(re.findall(r":(?:func|class):`torch\.(?:\w+\.)*(\w+)`", listed))


@pytest.mark.parametrize("kind", ["qwen3_5_moe", "qwen3"])
def test_a_step_has_no_operation_that_raises(tmp_path, kind):
    model = write_tiny(tmp_path / "model", kind=kind, num_hidden_layers=4)
    lora = LoraConfig(4, 8, ("q_proj", "down_proj"), experts=kind == "qwen3_5_moe")
    stage = build(model, "nf4", lora, seed=0, device=CPU, recompute=True)
    optimizer = make_optimizer("adamw", stage.adapters().values(), 0.01)
    ids_T, predict_N = torch.arange(128) % 200, torch.arange(0, 128, 3)
    microbatch = Microbatch(ids_T, torch.cat([torch.arange(80), torch.arange(48)]), torch.tensor([0, 80, 128]).int(), (80, 48),
                            predict_N, predict_N, predict_N, (1, 2), 128)
    batch = StepBatch(2, 0, [microbatch], 128, range(1), [[1, 2]], 2, 128, len(predict_N))
    recorder = Recorder()
    with recorder:
        forward_backward(stage, Memory(CPU), batch)
        optimizer.step()
    names = {name for name, _ in recorder.seen}
    assert {"mm", "bmm", "silu"} <= names or kind == "qwen3" and "mm" in names, "the recorder works"
    found = refused()
    assert {"cumsum", "put_", "histc", "bincount", "median"} <= found, "torch's list is read"
    assert ("cumsum", True) not in recorder.seen, "torch raises for a cumsum of floats"
    assert not names & (found - {"cumsum"})

"""What is not ours and may change without notice: each private name of a library that the code relies on, and which file to
mend when it is gone."""

import importlib
import inspect

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

STAGE = "torch.distributed.pipelining.stage"
NAMES = [  # module, name in it, file of this project
    *((STAGE, f"PipelineStage.{name}", "loop/pipeline/gpipe.py") for name in (
        "_prepare_forward_infra", "_prepare_backward_infra", "forward_one_chunk", "backward_one_chunk", "get_fwd_recv_ops",
        "get_fwd_send_ops", "get_bwd_recv_ops", "get_bwd_send_ops")),
    ("torch.distributed.pipelining.schedules", "_batch_p2p", "loop/plan/fakes.py"),
    ("torch.testing._internal.distributed.fake_pg", "FakeStore", "loop/plan/fakes.py"),
    ("torch._subclasses.fake_tensor", "FakeTensorMode", "loop/memory/without_values.py"),
    ("torch.utils._python_dispatch", "TorchDispatchMode", "loop/memory/ledger.py"),
    ("torch._C._autograd", "_get_sequence_nr", "loop/memory/ledger.py"),
    ("torch._C", "_current_autograd_node", "loop/memory/ledger.py"),
    ("torch.autograd.graph", "_engine_run_backward", "loop/memory/ledger.py"),
    ("torch._C", "_cuda_isHistoryEnabled", "loop/memory/trace.py"),
    ("torch.cuda.memory", "_record_memory_history", "loop/memory/phases.py"),
    ("torch.cuda.memory", "_dump_snapshot", "loop/memory/trace.py"),
    ("bitsandbytes.functional", "name2qmap", "loop/memory/without_values.py"),
    *(("torch", f"ops.mkldnn.{name}", "model/decode/weights.py") for name in (
        "_is_mkldnn_bf16_supported", "_reorder_linear_weight", "_linear_pointwise.binary")),
    ("transformers.models.llama.modeling_llama", "LlamaRMSNorm", "model/ops/fused.py"),
    ("transformers.models.qwen3.modeling_qwen3", "Qwen3RMSNorm", "model/ops/fused.py"),
    ("transformers.models.qwen3_5_moe.modeling_qwen3_5_moe", "Qwen3_5MoeRMSNorm", "model/ops/fused.py"),
    ("transformers.models.qwen3_5_moe.modeling_qwen3_5_moe", "Qwen3_5MoeRMSNormGated", "model/ops/fused.py"),
]


@pytest.mark.parametrize("module, name, file", NAMES, ids=lambda value: value.rpartition(".")[2])
def test_it_is_there(module, name, file):
    if module == "torch._C" and "cuda" in name and not torch.backends.cuda.is_built():
        pytest.skip("torch without CUDA does not have it")
    found = importlib.import_module(module)
    for part in name.split("."):
        assert hasattr(found, part), f"{module}.{name} is gone: mend {file}"
        found = getattr(found, part)


def test_a_fake_tensor_still_says_which_device_it_plays():
    with FakeTensorMode():
        assert torch.empty(1).fake_device.type == "cpu", "mend loop/memory/ledger.py"


def test_a_stage_still_has_the_attributes_that_are_read():
    """They are set where torch makes and uses them, so that a changed name shows in the source alone."""
    source = inspect.getsource(importlib.import_module(STAGE))
    for name in ("args_recv_info", "grad_recv_info", "has_backward", "self.device"):
        assert name in source, f"PipelineStage has no {name} any more: mend loop/pipeline/gpipe.py"

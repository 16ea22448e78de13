"""Our attention against transformers' own modules, forward and backward, on one row."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, Qwen3_5MoeTextConfig, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3RotaryEmbedding
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeAttention, Qwen3_5MoeTextRotaryEmbedding

from model.attention import Attention
from model.mixers import Segments
from model.ops.fused import fuse

SIZES = {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32, "attn_implementation": "sdpa"}
KINDS = {
    "llama": (LlamaConfig, LlamaAttention, LlamaRotaryEmbedding),
    "qwen3": (Qwen3Config, Qwen3Attention, Qwen3RotaryEmbedding),
    "qwen3.5": (Qwen3_5MoeTextConfig, Qwen3_5MoeAttention, Qwen3_5MoeTextRotaryEmbedding),  # rotates a quarter of each head
}


def pair(kind, dtype):
    """transformers' module, ours with the same weights, and the rotary tables of 50 positions."""
    torch.manual_seed(0)
    configuration, attention, rotary = KINDS[kind]
    config = configuration(**SIZES)
    theirs = attention(config, 0).to(dtype)
    if kind != "llama":
        for norm in (theirs.q_norm, theirs.k_norm):
            nn.init.normal_(norm.weight, 0 if kind == "qwen3.5" else 1, 0.3)
    model = nn.ModuleDict({"self_attn": theirs, "norm": LlamaRMSNorm(8)})
    names = [name for name, _ in model.named_parameters()]
    fuse(model)
    assert isinstance(model["self_attn"], Attention) and [name for name, _ in model.named_parameters()] == names
    tables = rotary(config)(torch.empty(0, dtype=dtype), torch.arange(50)[None])
    return attention(config, 0).to(dtype), model["self_attn"], tables


def run(attend, x, dy):
    y = attend(x)
    return [y.detach(), *torch.autograd.grad(y, x, dy)]


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-6), (torch.bfloat16, 6e-3)])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_transformers(kind, dtype, limit):
    theirs, ours, rotary = pair(kind, dtype)
    theirs.load_state_dict(ours.state_dict())
    x, dy = torch.randn(1, 50, 96).to(dtype).requires_grad_(), torch.randn(1, 50, 96).to(dtype)
    segments = Segments(torch.tensor([0, 50], dtype=torch.int32), (50,))
    expected = run(lambda x: theirs(x, position_embeddings=rotary, attention_mask=None, is_causal=True)[0], x, dy)
    results = run(lambda x: ours(x, rotary, segments), x, dy)
    for found, truth in zip(results, expected):
        assert ((found - truth).double().norm() / truth.double().norm()).item() < limit


def test_an_attention_that_is_not_known_is_refused():
    class RenamedAttention(nn.Module):
        pass

    with pytest.raises(RuntimeError, match="self_attn is a RenamedAttention, which is not known: add it to"):
        fuse(nn.ModuleDict({"self_attn": RenamedAttention(), "norm": LlamaRMSNorm(8)}))

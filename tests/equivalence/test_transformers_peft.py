"""Loss and every adapter gradient of a step against transformers plus peft in float32, rows alone, packed, recomputed."""

import peft
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from model.build import build
from model.config import LoraConfig
from model.lora import to_peft_name
from model.mixers import Segments

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LENGTHS = (23, 150, 41)
SIZES = {"vocab_size": 300, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 6,
         "num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.1}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama with biases": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "qwen3": Qwen3Config(**SIZES, tie_word_embeddings=False),
    "qwen3 tied": Qwen3Config(**SIZES, tie_word_embeddings=True),
}


@pytest.fixture(scope="module", params=CONFIGS)
def model_dir(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[request.param], trust_remote_code=False)
    for name, parameter in model.named_parameters():  # biases and norms that do something
        if name.endswith("bias") or "norm" in name:
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
    model.save_pretrained(directory)
    return directory


def rows():
    """Ids, and which of them are supervised, of each row."""
    torch.manual_seed(1)
    return [(torch.randint(300, (length,)), torch.arange(length) > length // 3) for length in LENGTHS]


def ours(model_dir, recompute=False, base="float32", seed=2):
    stage = build(model_dir, base, LoraConfig(4, 8, TARGETS), seed=0, device=torch.device("cpu"), recompute=recompute)
    torch.manual_seed(seed)
    for parameter in stage.adapters().values():
        torch.nn.init.normal_(parameter, std=0.05)
    return stage


def packed_step(stage, packs):
    """Loss and gradients of one step whose microbatches hold these rows, each with 5 positions of padding."""
    num_supervised = sum(int(supervised.sum()) for pack in packs for _, supervised in pack)
    total = 0.0
    for pack in packs:
        lengths = (*(len(ids) for ids, _ in pack), 5)
        bounds = torch.tensor([0, *lengths]).cumsum(0)
        positions = torch.cat([torch.arange(n) for n in lengths])
        ids = torch.cat([*(ids for ids, _ in pack), torch.zeros(5, dtype=torch.int64)])
        predict = torch.cat([start + supervised.nonzero()[:, 0] - 1 for start, (_, supervised) in zip(bounds, pack)])
        x = stage(ids[None], positions, Segments(bounds.int(), lengths))
        loss = stage.losses(x, predict, ids[predict + 1]).sum() / num_supervised
        loss.backward()
        total += loss.item()
    gradients = {name: parameter.grad.clone() for name, parameter in stage.adapters().items()}
    stage.zero_grad()
    return total, gradients


def reference_step(model_dir, adapters):
    """The same by transformers and peft: each row alone, all logits, autograd."""
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=list(TARGETS), task_type="CAUSAL_LM")
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, trust_remote_code=False)
    model = peft.get_peft_model(base, config)
    theirs = {name.replace(".default", ""): p for name, p in model.named_parameters() if p.requires_grad}
    assert theirs.keys() == {to_peft_name(name) for name in adapters}
    with torch.no_grad():
        for name, parameter in adapters.items():
            theirs[to_peft_name(name)].copy_(parameter)
    losses = []
    for ids, supervised in rows():
        logits = model(input_ids=ids[None]).logits[0]
        losses.append(cross_entropy(logits[:-1][supervised[1:]], ids[1:][supervised[1:]], reduction="sum"))
    loss = sum(losses) / sum(int(supervised.sum()) for _, supervised in rows())
    loss.backward()
    return loss.item(), {name: theirs[to_peft_name(name)].grad for name in adapters}


def worst(found, expected):
    """Largest relative difference of the loss and of any one adapter's gradient."""
    pairs = [(found[1][name], expected[1][name]) for name in expected[1]]
    return max(abs(found[0] / expected[0] - 1), *(((a - b).norm() / b.norm()).item() for a, b in pairs))


@pytest.mark.parametrize("recompute", (False, True))
def test_a_step_equals_transformers_and_peft(model_dir, recompute):
    stage = ours(model_dir, recompute)
    assert worst(packed_step(stage, [rows()]), reference_step(model_dir, stage.adapters())) < 1e-5


def test_packed_equals_each_row_alone(model_dir):
    stage = ours(model_dir)
    alone = packed_step(stage, [[row] for row in rows()])
    assert worst(packed_step(stage, [rows()]), alone) < 1e-5
    assert worst(packed_step(stage, [rows()[1:], rows()[:1]]), alone) < 1e-5


def test_bf16_is_as_close_to_float32_as_transformers(model_dir):
    """Not closer than rounding allows, and not further away than transformers' own bf16 is: over several adapters, as
    which of the two is luckier with a single one depends on the kernels of the CPU."""
    squares = torch.zeros(2)
    for seed in range(2, 10):
        truth = packed_step(ours(model_dir, seed=seed), [rows()])
        found = packed_step(ours(model_dir, base="bf16", seed=seed), [rows()])
        assert abs(found[0] / truth[0] - 1) < 5e-3
        for i, gradients in enumerate((found[1], bf16_reference(model_dir, ours(model_dir, seed=seed).adapters()))):
            squares[i] += sum((gradients[name].float() - truth[1][name]).square().sum().item() for name in truth[1])
    assert squares[0].sqrt() < 1.1 * squares[1].sqrt()


def bf16_reference(model_dir, adapters):
    """The gradients by transformers and peft, with weights and adapters in bf16."""
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=list(TARGETS), task_type="CAUSAL_LM")
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16, trust_remote_code=False)
    model = peft.get_peft_model(base, config, autocast_adapter_dtype=False)
    theirs = {name.replace(".default", ""): p for name, p in model.named_parameters() if p.requires_grad}
    for name, parameter in adapters.items():
        theirs[to_peft_name(name)].data.copy_(parameter.data)
    num_supervised = sum(int(supervised.sum()) for _, supervised in rows())
    for ids, supervised in rows():
        logits = model(input_ids=ids[None]).logits[0].float()
        loss = cross_entropy(logits[:-1][supervised[1:]], ids[1:][supervised[1:]], reduction="sum")
        (loss / num_supervised).backward()
    return {name: theirs[to_peft_name(name)].grad for name in adapters}

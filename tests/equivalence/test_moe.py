"""A mixture-of-experts model as it is built here is the one that transformers and peft compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional as bnb
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from model.build import build
from model.config import LoraConfig
from model.delta_rule import similar
from model.lora import adapters_off, to_peft_name
from model.mixers import Segments
from model.moe.usage import load_balance, start_counting
from model.stages import Stage
from model.tiny.write import write_tiny

CPU = torch.device("cpu")
LAYOUTS = ("fused", "per-expert", "fp8")
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "in_proj_qkv", "in_proj_z", "out_proj", "gate_proj", "up_proj", "down_proj")
LENGTHS = (70, 13, 37, 29)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("moe")
    return {layout: write_tiny(root / layout, layout=layout, num_hidden_layers=4, moe_intermediate_size=64)
            for layout in LAYOUTS}


def make(model_dir: Path, base: str, experts: bool = False, recompute: bool = False) -> Stage:
    lora = LoraConfig(rank=4, alpha=8, target=TARGETS, experts=experts)
    stage = build(model_dir, base, lora, seed=0, device=CPU, recompute=recompute)
    with torch.no_grad():
        for name, parameter in sorted(stage.adapters().items()):
            if name.endswith("lora_B"):
                parameter.normal_(std=0.02, generator=torch.Generator().manual_seed(len(name)))
    return stage


def theirs(model_dir: Path, dtype: torch.dtype) -> Any:
    # its loop over experts, as the batched implementations add up in another order
    return AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=dtype, attn_implementation="sdpa", experts_implementation="eager", trust_remote_code=False)


def segments(lengths: tuple[int, ...]) -> Segments:
    return Segments(torch.tensor((0, *lengths)).cumsum(0).int(), lengths)


def difference(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


# What is loaded


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("base", ["bf16", "nf4", "int8"])
def test_streamed_weights_are_those_of_transformers(checkpoints: dict[str, Path], layout: str, base: str) -> None:
    expected = dict(theirs(checkpoints[layout], torch.bfloat16).named_parameters())
    built = build(checkpoints[layout], base, LoraConfig(4, 8, ("q_proj",)), seed=0, device=CPU, recompute=False).model
    num_equal = 0
    for name, tensor in expected.items():
        if name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
            mine, expected_E = built.get_submodule(name), [quantized(base, matrix) for matrix in tensor]
            assert torch.equal(mine.dequantize(0, len(tensor)), torch.stack(expected_E))
        elif any(name.endswith(f".{target}.weight") for target in TARGETS):
            module = built.get_submodule(name.removesuffix(".weight"))
            module = getattr(module, "base", module)
            assert torch.equal(module.dequantize(), quantized(base, tensor))
        else:  # router, gates, norms, convolution, decays, embedding, head
            assert built.get_parameter(name).dtype == torch.bfloat16  # transformers leaves some float32 beside FP8
            assert torch.equal(built.get_parameter(name).float(), tensor.float())
        num_equal += 1
    assert num_equal == 72


def quantized(base: str, matrix_OI: Tensor) -> Tensor:
    """What bitsandbytes makes of one matrix."""
    if base == "nf4":
        # flat: its CPU kernel takes the wrong absmax for a matrix whose rows end within a block
        packed = bnb.quantize_4bit(matrix_OI.flatten(), blocksize=64, compress_statistics=True, quant_type="nf4")
        return bnb.dequantize_4bit(*packed).view(matrix_OI.shape)
    if base == "int8":
        quantized_OI, absmax_O, _ = bnb.int8_vectorwise_quant(matrix_OI.half())
        return (quantized_OI * (absmax_O / 127)[:, None]).bfloat16()
    return matrix_OI


# What is computed


def run(stage: Stage, x_1TD: Tensor, ids_T: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Sum of the losses of all next tokens, each row by itself, from embedded tokens."""
    positions_T = torch.cat([torch.arange(length) for length in lengths])
    stage.is_first = False
    h_1TD = stage(x_1TD, positions_T, segments(lengths))
    predict_N = (positions_T.roll(-1) != 0).nonzero()[:, 0]
    return stage.losses(h_1TD, predict_N, ids_T[predict_N + 1]).sum()


def run_theirs(model: Any, x_1TD: Tensor, ids_T: Tensor, lengths: tuple[int, ...]) -> Tensor:
    losses = []
    for x_1LD, ids_L in zip(x_1TD.split(lengths, dim=1), ids_T.split(lengths)):
        logits_LV = model(inputs_embeds=x_1LD).logits[0].float()
        losses.append(torch.nn.functional.cross_entropy(logits_LV[:-1], ids_L[1:], reduction="sum"))
    return torch.stack(losses).sum()


@pytest.mark.parametrize("lengths", [(90,), LENGTHS])
@pytest.mark.parametrize("recompute", [False, True])
def test_loss_and_gradients_are_those_of_transformers_and_peft(
        checkpoints: dict[str, Path], lengths: tuple[int, ...], recompute: bool) -> None:
    stage = make(checkpoints["fused"], "float32", experts=True, recompute=recompute)
    adapters = stage.adapters()
    model = get_peft_model(theirs(checkpoints["fused"], torch.float32), PeftConfig(
        r=4, lora_alpha=8, target_modules=list(TARGETS),
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]))
    peft = {name.replace(".default", ""): p for name, p in model.named_parameters() if "lora_" in name}
    assert {to_peft_name(name) for name in adapters} == peft.keys()
    with torch.no_grad():
        for name, parameter in adapters.items():
            peft[to_peft_name(name)].copy_(parameter)

    torch.manual_seed(0)
    ids_T = torch.randint(0, 256, (sum(lengths),))
    x_1TD = model.get_input_embeddings()(ids_T[None]).detach().requires_grad_()
    expected_loss = run_theirs(model, x_1TD, ids_T, lengths)
    expected_dx, *expected = torch.autograd.grad(expected_loss, (x_1TD, *(peft[to_peft_name(name)] for name in adapters)))
    loss = run(stage, x_1TD, ids_T, lengths)
    dx, *grads = torch.autograd.grad(loss, (x_1TD, *adapters.values()))
    assert difference(loss, expected_loss) < 1e-6
    assert difference(dx, expected_dx) < 1e-4  # 1e-7 of noise in the input makes 1e-5
    worst = max(difference(mine, other) for mine, other in zip(grads, expected))
    assert worst < 1e-4 and len(grads) == 2 * (3 * 4 + 4 + 3 * 3 + 2 * 4)


def test_bf16_differs_from_transformers_no_more_than_bf16_does(checkpoints: dict[str, Path]) -> None:
    stage = make(checkpoints["fused"], "bf16")
    torch.manual_seed(0)
    ids_T = torch.randint(0, 256, (sum(LENGTHS),))
    losses = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = theirs(checkpoints["fused"], dtype)
        losses[dtype] = run_theirs(model, model.get_input_embeddings()(ids_T[None]), ids_T, LENGTHS)
    with adapters_off(stage.model):
        mine = run(stage, stage.model.model.embed_tokens(ids_T[None]), ids_T, LENGTHS)
    assert difference(mine, losses[torch.bfloat16]) < 2e-3


def test_packed_rows_equal_each_row_alone(checkpoints: dict[str, Path]) -> None:
    """Also with padding as the last segment, whatever it holds."""
    stage = make(checkpoints["fused"], "float32")
    torch.manual_seed(0)
    ids_T = torch.randint(0, 256, (sum(LENGTHS),))
    x_1TD = stage.model.model.embed_tokens(ids_T[None]).detach().requires_grad_()
    (packed,) = torch.autograd.grad(run(stage, x_1TD, ids_T, LENGTHS), x_1TD)
    for start, length in zip(segments(LENGTHS).cu_seqlens_R1.tolist(), LENGTHS):
        row = slice(start, start + length)
        x_1LD = x_1TD[:, row].detach().requires_grad_()
        (alone,) = torch.autograd.grad(run(stage, x_1LD, ids_T[row], (length,)), x_1LD)
        assert difference(packed[:, row], alone) < 1e-5


# Gated delta rule


def test_padded_batches_are_of_similar_rows() -> None:
    assert similar((10, 100, 80, 9, 76, 74)) == [[1, 2, 4], [5], [0, 3]]


# Load balance


def test_load_balance_counts_the_tokens_of_every_expert(checkpoints: dict[str, Path]) -> None:
    stage = make(checkpoints["fused"], "nf4", recompute=True)
    start_counting(stage.model)
    ids_T = torch.randint(0, 256, (64,))
    indices = []
    for layer in stage.model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda module, inputs, outputs: indices.append(outputs[2]))
    x_1TD = stage.model.model.embed_tokens(ids_T[None]).requires_grad_()
    run(stage, x_1TD, ids_T, (64,)).backward()
    report = load_balance(stage.model, lambda counts: counts)
    num_experts = stage.model.config.num_experts
    for number in range(4):
        counts_E = torch.bincount(indices[number].flatten(), minlength=num_experts)
        assert report[str(number)]["share"] == pytest.approx((counts_E / counts_E.sum()).tolist(), abs=1e-6)
        assert 0 < report[str(number)]["entropy"] <= 1
    stage.eval()
    with torch.no_grad():
        run(stage, x_1TD, ids_T, (64,))
    assert set(load_balance(stage.model, lambda counts: counts)["0"]["share"]) == {0.0}

"""A whole model with compiled code, in bf16: its error against float32 is no larger than that of the plain path."""

import pytest
import torch

from model.build import build
from model.config import LoraConfig
from model.devices import taking
from model.mixers import Segments
from model.tiny.write import write_tiny

LENGTHS, NUM_DRAWS = (90, 7, 160), 8
TARGETS = {"llama": ("q_proj", "v_proj", "down_proj"), "qwen3": ("q_proj", "v_proj", "down_proj"),
           "qwen3_5_moe": ("q_proj", "v_proj", "in_proj_qkv", "out_proj", "down_proj")}


def step(model_dir, base, draw):
    """Losses, and the gradients of all adapters, on weights that bf16 holds exactly."""
    lora = LoraConfig(4, 8, TARGETS[model_dir.name])
    stage = build(model_dir, base, lora, seed=0, device=torch.device("cpu"), recompute=True)
    generator = torch.Generator().manual_seed(draw)
    for _, parameter in sorted(stage.adapters().items()):
        parameter.data.normal_(std=0.05, generator=generator)
    for layer in stage.model.model.layers if model_dir.name == "qwen3_5_moe" else ():  # else rounding chooses other experts
        layer.mlp.gate.top_k = layer.mlp.gate.num_experts
    ids, predict = torch.randint(200, (1, sum(LENGTHS)), generator=generator), torch.arange(0, sum(LENGTHS), 2)
    segments = Segments(torch.tensor([0, *LENGTHS]).cumsum(0).int(), LENGTHS)
    x = stage(ids, torch.cat([torch.arange(n) for n in LENGTHS]), segments)
    losses = stage.losses(x, predict, ids[0, predict])
    return [losses, *torch.autograd.grad(losses.mean(), list(stage.adapters().values()))]


def relative(found, truth):
    (one, *some), (exact, *others) = found, truth
    flat, expected = (torch.cat([gradient.flatten().double() for gradient in gradients]) for gradients in (some, others))
    return [((a - b).norm() / b.norm()).item() for a, b in ((one.double(), exact.double()), (flat, expected))]


@pytest.mark.slow
@pytest.mark.parametrize("kind", TARGETS)
def test_compiled_code_errs_no_more_than_the_plain_path(kind, tmp_path):
    """On the mean of several draws: through the delta rule a single rounding may double the error of one, or halve it."""
    model_dir = write_tiny(tmp_path / kind, kind=kind, num_hidden_layers=4)
    errors = []
    for draw in range(NUM_DRAWS):
        truth, plain = step(model_dir, "float32", draw), step(model_dir, "bf16", draw)
        with taking("compiled"):
            compiled = step(model_dir, "bf16", draw)
        errors.append([relative(plain, truth), relative(compiled, truth)])
    plain, compiled = torch.tensor(errors).mean(0)
    assert (compiled <= 1.02 * plain).all(), f"losses and gradients differ from float32 by {compiled}, without it by {plain}"

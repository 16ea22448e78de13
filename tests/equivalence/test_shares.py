"""Gradients of one optimizer step, however its rows are dealt over ranks and packed into microbatches."""

import hashlib
import json
import random
from pathlib import Path

import pytest
import torch

from data.batches import Batches
from data.config import DataConfig
from data.tokenized import tokenize
from loop.accumulate import forward_backward
from loop.memory.phases import Memory
from model.build import build
from model.config import LoraConfig
from model.tiny.write import write_tiny


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def stage_and_rows(request, tmp_path_factory, tiny_tokenizers):
    directory = tmp_path_factory.mktemp(request.param)
    sizes = {"num_hidden_layers": 3, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
             "num_key_value_heads": 2, "head_dim": 16}
    model_dir = write_tiny(directory / "model", kind=request.param, **sizes)
    rng = random.Random(1)
    rows = [{"messages": [{"role": "user", "content": "q" * rng.randint(1, 90)},
                          {"role": "assistant", "content": "".join(rng.choices("abcdefgh ", k=rng.randint(3, 60))) + "."}],
             "metadata": {"source": "x"}} for _ in range(13)]
    path = directory / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenized = tokenize("train", tiny_tokenizers[request.param], DataConfig(str(path), str(path), ("x",)))
    stage = build(Path(model_dir), "float32", LoraConfig(rank=4, alpha=8, target=("q_proj", "o_proj", "up_proj", "down_proj")),
                  seed=0, device=torch.device("cpu"), recompute=False)
    generator = torch.Generator().manual_seed(2)
    for parameter in stage.adapters().values():  # B starts at zero, which would hide A's gradients
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    return stage, tokenized


def step_gradients(stage, rows, num_replicas, microbatch_tokens, recompute=False):
    """Loss and gradients of the step that sees all rows, summed over replicas."""
    stage.recomputed = range(2 if recompute else 0)
    for parameter in stage.adapters().values():
        parameter.grad = None
    loss = 0.0
    for replica in range(num_replicas):
        (batch,) = Batches(rows, 13, microbatch_tokens, replica, num_replicas).train_steps(0, 1, seed=0)
        loss += forward_backward(stage, Memory(torch.device("cpu")), batch).sum().item()
    return loss, {name: parameter.grad.clone() for name, parameter in stage.adapters().items()}


@pytest.mark.parametrize("num_replicas, microbatch_tokens, recompute", [
    (2, 2048, False),  # two ranks
    (3, 512, False),  # three ranks, several microbatches each
    (1, 256, False),  # one rank, nearly every row alone
    (1, 512, True),  # recomputed
])
def test_shares_add_up_to_the_whole(stage_and_rows, num_replicas, microbatch_tokens, recompute):
    stage, rows = stage_and_rows
    loss, gradients = step_gradients(stage, rows, 1, 2048)
    shared_loss, shared_gradients = step_gradients(stage, rows, num_replicas, microbatch_tokens, recompute)
    assert shared_loss == pytest.approx(loss, rel=1e-6)
    for name, gradient in gradients.items():
        error = (shared_gradients[name] - gradient).norm() / gradient.norm()
        assert error < 1e-5, f"{name}: {error:.1e}"


def test_weights_that_do_not_match_their_manifest_are_refused(tmp_path):
    model_dir = write_tiny(tmp_path / "model", kind="llama", num_hidden_layers=1, hidden_size=64, intermediate_size=96)
    files = sorted(model_dir.glob("*.safetensors"))
    (model_dir / "manifest.json").write_text(json.dumps({
        file.name: {"size": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()} for file in files
    }))
    lora = LoraConfig(rank=2, alpha=4, target=("q_proj",))
    settings = {"seed": 0, "device": torch.device("cpu"), "recompute": False}
    build(model_dir, "float32", lora, **settings)
    content = bytearray(files[0].read_bytes())
    content[-1] ^= 1
    files[0].write_bytes(content)
    with pytest.raises(ValueError, match=files[0].name):
        build(model_dir, "float32", lora, **settings)

"""A checkpoint as it lies, loaded by transformers and peft in a few lines, computes what the trainer computes. Float32."""

import json

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

from data.chat import ChatFormat
from loop import checkpoint
from loop.config import load_config
from loop.run import load_tokenizer
from loop.state import load_adapters
from model.build import build
from model.mixers import Segments
from model.tiny.write import write_tiny

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DELTA_RULE = ["in_proj_qkv", "in_proj_z", "out_proj"]
KINDS = {  # of a tiny model, its layout, what is adapted
    "llama": ("llama", "fused", LINEARS, False),
    "qwen3": ("qwen3", "fused", LINEARS, False),
    "qwen3-moe, each expert a tensor": ("qwen3_moe", "per-expert", LINEARS[:4], True),
    "qwen3.5-moe": ("qwen3_5_moe", "fused", LINEARS + DELTA_RULE, False),
    "qwen3.5-moe, experts": ("qwen3_5_moe", "fused", LINEARS + DELTA_RULE, True),
    "qwen3.5-moe, each expert a tensor": ("qwen3_5_moe", "per-expert", LINEARS + DELTA_RULE, True),
}
MESSAGES = [{"role": "system", "content": "You are a chess coach."}, {"role": "user", "content": "Knight to f3? Why?"}]


def trainer_logits(path, model_dir, ids):
    """Of the whole prompt, [T, V]: by the modules of training, with the adapters of the checkpoint, and without any."""
    config = load_config(path.parent / "config.yaml")
    stage = build(model_dir, "float32", config.lora, seed=0, device=torch.device("cpu"), recompute=False)
    found = []
    for adapter in (checkpoint.load(path).adapter, None):
        if adapter:
            load_adapters(stage.adapters(), adapter)
        else:
            for name, parameter in stage.adapters().items():
                parameter.data.mul_(not name.endswith("lora_B"))
        with torch.no_grad():
            x_1TD = stage(ids, torch.arange(ids.shape[1]), Segments(torch.tensor([0, ids.shape[1]]).int(), (ids.shape[1],)))
            found.append(stage.model.lm_head(stage.model.model.norm(x_1TD[0])))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_and_peft_compute_the_trainers_logits(kind, write_config, run_train, tmp_path, monkeypatch):
    model_type, layout, target, experts = KINDS[kind]
    model_dir = write_tiny(tmp_path / "model", kind=model_type, layout=layout, num_hidden_layers=4)
    run_train(write_config(model__path="model", lora__target=target, lora__experts=experts, train__max_steps=2))
    path = tmp_path / "checkpoints/tiny/step-00000002"
    monkeypatch.chdir("/")  # what has been saved is found from anywhere
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    model = AutoPeftModelForCausalLM.from_pretrained(path, dtype=torch.float32, trust_remote_code=False)
    inputs = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    chat = ChatFormat(load_tokenizer(model_dir), "strip")
    assert inputs.input_ids[0].tolist() == chat.tokenizer(chat.prompt(MESSAGES), add_special_tokens=False).input_ids
    ours, base = trainer_logits(path, model_dir, inputs.input_ids)
    with torch.no_grad():
        theirs = model(**inputs).logits[0]
    assert (theirs - ours).norm() < 1e-4 * ours.norm()
    assert (base - ours).norm() > 1e-2 * ours.norm(), "the adapter changes something"


@pytest.mark.parametrize("path", ["~/model", "model"])
def test_the_base_model_is_found_from_anywhere(write_config, run_train, tiny_llama, tmp_path, monkeypatch, path):
    """Found: peft could not read an adapter whose configuration said `~/...`, and took a relative path from elsewhere."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / path.removeprefix("~/")).symlink_to(tiny_llama)
    run_train(write_config(model__path=path, train__max_steps=1))
    config = json.loads((tmp_path / "checkpoints/tiny/step-00000001/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / path.removeprefix("~/"))

"""Random checkpoints: of the real architectures, in the published layouts, readable by transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from model.tiny.write import KINDS, LAYOUTS, quantize_fp8, write_tiny
from model.weights.shards import Checkpoint

QUESTION = [{"role": "user", "content": "Why?"}]
ROOT = Path(__file__).parents[3]


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_default_is_a_few_mb_with_the_real_depth(tmp_path: Path, layout: str) -> None:
    command = [sys.executable, "-m", "model.tiny", str(tmp_path / "out"), "--layout", layout]
    printed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    config = AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=False).get_text_config()
    num_bytes = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert 3e6 < num_bytes < 8e6 and f"{num_bytes / 1e6:,.1f} MB" in printed
    assert config.num_hidden_layers == 40 and config.layer_types.count("full_attention") == 10
    assert config.layer_types[:4] == ["linear_attention"] * 3 + ["full_attention"]
    assert len(list((tmp_path / "out").glob("*.safetensors"))) >= 4
    names = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert ("model.language_model.layers.39.mlp.experts.gate_up_proj" in names) == (layout == "fused")
    assert any(name.startswith("mtp.") for name in names) and any(name.startswith("model.visual.") for name in names)


@pytest.mark.parametrize("kind", KINDS)
def test_forward_is_sane(tmp_path: Path, kind: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(write_tiny(tmp_path, kind=kind), dtype=torch.float32, trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=False)
    ids = tokenizer("The knight is pinned to the king.", return_tensors="pt").input_ids
    with torch.no_grad():
        logits = model(ids).logits
    assert logits.isfinite().all() and 0.5 < logits.std() < 2


def test_layouts_hold_the_same_weights(tmp_path: Path) -> None:
    fused, single, fp8 = (Checkpoint(write_tiny(tmp_path / layout, layout=layout, num_hidden_layers=4, seed=3))
                          for layout in LAYOUTS)
    gate_up = fused.read_rows("model.layers.3.mlp.experts.gate_up_proj", 5, 6)[0]
    down = fused.read_rows("model.layers.3.mlp.experts.down_proj", 5, 6)[0]
    expert = [single.read_rows(f"model.layers.3.mlp.experts.5.{p}_proj.weight", 0, rows)
              for p, rows in (("gate", 32), ("up", 32), ("down", 64))]
    assert torch.equal(gate_up, torch.cat(expert[:2])) and torch.equal(down, expert[2])
    for name, info in single.tensors.items():
        rows, approximate = (checkpoint.read_rows(name, 0, info.shape[0]) for checkpoint in (single, fp8))
        if fp8.tensors[name].dtype == "F8_E4M3":
            assert 0.001 < (rows - approximate).norm() / rows.norm() < 0.04
        else:
            assert torch.equal(rows, approximate)
    assert sum(info.dtype == "F8_E4M3" for info in fp8.tensors.values()) == 3 * 3 + 4 + 4 * (8 + 1) * 3


def test_another_seed_gives_other_weights(tmp_path: Path) -> None:
    first, again, other = (Checkpoint(write_tiny(tmp_path / str(i), kind="llama", seed=seed))
                           for i, seed in enumerate((1, 1, 2)))
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(first.read_rows(name, 0, 9), again.read_rows(name, 0, 9))
    assert not torch.equal(first.read_rows(name, 0, 9), other.read_rows(name, 0, 9))


def test_fp8_blocks() -> None:
    values = torch.randn(200, 130)
    values[150, 5] = 1000.0
    codes, scale = quantize_fp8(values)
    assert codes.shape == (200, 130) and scale.shape == (2, 2) and scale.dtype == torch.bfloat16
    torch.testing.assert_close(scale[1, 0].item(), 1000 / 448, rtol=0.004, atol=0)
    back = codes.float() * scale.float().repeat_interleave(128, 0).repeat_interleave(128, 1)[:200, :130]
    torch.testing.assert_close(back[:128], values[:128], rtol=0.0725, atol=1e-4)


def test_true_shapes(tmp_path: Path) -> None:
    """`scale=1` with fewer layers and experts: the published sizes."""
    checkpoint = Checkpoint(write_tiny(tmp_path, layout="fp8", scale=1, num_hidden_layers=4, num_experts=1,
                                       vocab_size=128))
    shapes = {name.removeprefix("model.layers."): info.shape for name, info in checkpoint.tensors.items()}
    assert shapes["3.self_attn.q_proj.weight"] == (8192, 2048) and shapes["3.self_attn.k_proj.weight"] == (512, 2048)
    assert shapes["0.linear_attn.in_proj_qkv.weight"] == (8192, 2048) and shapes["0.linear_attn.A_log"] == (32,)
    assert shapes["0.linear_attn.conv1d.weight"] == (8192, 1, 4) and shapes["0.linear_attn.norm.weight"] == (128,)
    assert shapes["0.mlp.experts.0.down_proj.weight"] == (2048, 512)
    assert checkpoint.scales["model.layers.0.mlp.experts.0.down_proj.weight"].shape == (16, 4)
    assert checkpoint.tensors["model.layers.0.linear_attn.A_log"].dtype == "F32"


@pytest.mark.parametrize("kind, thinking, not_thinking", [
    ("qwen3_5_moe", "<think>\n", "<think>\n\n</think>\n\n"), ("qwen3", "", "<think>\n\n</think>\n\n"),
    ("llama", "", "")])
def test_generation_prompts(tmp_path: Path, kind: str, thinking: str, not_thinking: str) -> None:
    write_tiny(tmp_path, kind=kind, num_hidden_layers=1)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=False)
    start = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    for arguments, end in (({}, thinking), ({"enable_thinking": False}, not_thinking)):
        prompt = tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True, **arguments)
        assert prompt == start + end


@pytest.mark.parametrize("name, kind", [
    ("tokenizer_config.json", "qwen3"), ("chat_template_qwen3_5.jinja", "qwen3_5_moe")])
def test_templates_render_like_the_published(tmp_path: Path, name: str, kind: str) -> None:
    published = ROOT.parent / "shared" / "data" / "qwen3-tokenizer"
    if not published.is_dir():
        pytest.skip("no published tokenizer here")
    text = (published / name).read_text()
    template = json.loads(text)["chat_template"] if name.endswith(".json") else text
    write_tiny(tmp_path, kind=kind, num_hidden_layers=1)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=False)
    thought = {"role": "assistant", "content": "<think>\nA thought.\n</think>\n\nBecause."}
    plain = {"role": "assistant", "content": "So it is."}
    for messages in ([{"role": "system", "content": "Be short."}, *QUESTION], [*QUESTION, plain], [*QUESTION, thought],
                     [*QUESTION, thought, *QUESTION, plain], [*QUESTION, plain, *QUESTION]):
        rendered = [tokenizer.apply_chat_template(messages, tokenize=False, chat_template=t) for t in (None, template)]
        assert rendered[0] == rendered[1]


def test_tokenizer_round_trip(tmp_path: Path) -> None:
    write_tiny(tmp_path, kind="qwen3", num_hidden_layers=1)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=False)
    text = "Nf3 – the knight’s best square.\n\n<think>\n♞</think><|im_end|>\n"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text and len(tokenizer) == 261
    assert ids.count(tokenizer.convert_tokens_to_ids("<think>")) == 1 and max(ids) < 261
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token == "<|endoftext|>"


def test_given_tokenizer_fits_the_vocabulary(tmp_path: Path) -> None:
    write_tiny(tmp_path / "first", kind="llama")
    tokens = json.loads((tmp_path / "first" / "tokenizer.json").read_text())
    tokens["added_tokens"].append({**tokens["added_tokens"][0], "id": 999, "content": "<|extra|>"})
    (tmp_path / "first" / "tokenizer.json").write_text(json.dumps(tokens))
    write_tiny(tmp_path / "second", kind="llama", tokenizer=tmp_path / "first")
    assert json.loads((tmp_path / "second" / "config.json").read_text())["vocab_size"] == 1024
    assert Checkpoint(tmp_path / "second").tensors["model.embed_tokens.weight"].shape[0] == 1024


def test_user_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such fields in the config of llama: width"):
        write_tiny(tmp_path, kind="llama", width=3)
    with pytest.raises(ValueError, match="expected one of qwen3_5_moe"):
        write_tiny(tmp_path, kind="gpt")
    write_tiny(tmp_path, kind="llama")
    with pytest.raises(ValueError, match="holds a checkpoint already"):
        write_tiny(tmp_path, kind="llama")
    with pytest.raises(ValueError, match="expected a directory with tokenizer.json"):
        write_tiny(tmp_path / "x", kind="llama", tokenizer=tmp_path / "absent")

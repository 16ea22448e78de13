"""Exports of runs of seconds: the proof passes, and what goes wrong elsewhere without a word fails with its name."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from loop import checkpoint
from loop.export import expected, proof
from loop.export.__main__ import proved
from loop.export.write import Form, write
from loop.run import find_trained
from model.tiny.write import write_tiny

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DELTA_RULE = ["in_proj_qkv", "in_proj_z", "out_proj"]


@pytest.fixture
def trained(write_config, run_train, tmp_path):
    """Trains a tiny model for two steps, and makes its adapters large enough to matter."""

    def make(kind="qwen3", layout="fused", base="int8", experts=False):
        is_moe = kind == "qwen3_5_moe"
        write_tiny(tmp_path / "model", kind=kind, layout=layout, num_hidden_layers=4 if is_moe else 2)
        run_train(write_config(model__path="model", model__base=base, lora__target=LINEARS + DELTA_RULE * is_moe,
                               lora__experts=experts, train__max_steps=2))
        path = tmp_path / "checkpoints/tiny/step-00000002"
        torch.manual_seed(0)
        adapter = {name: tensor if "lora_A" in name else torch.randn_like(tensor) * 0.02
                   for name, tensor in load_file(path / checkpoint.ADAPTER).items()}
        save_file(adapter, path / checkpoint.ADAPTER, {"format": "pt"})
        manifest = checkpoint.read_json(path / checkpoint.MANIFEST)
        file = path / checkpoint.ADAPTER
        manifest[checkpoint.ADAPTER] = {"size": file.stat().st_size, "sha256": checkpoint.sha256(file)}
        checkpoint.write_json(path / checkpoint.MANIFEST, manifest)
        return find_trained(path, "best", [])

    return make


def exported(trained, tmp_path, form):
    out = tmp_path / "out"
    out.mkdir()
    write(trained, form, out)
    return out


def refused(trained, form, out):
    with pytest.raises(ValueError) as error:
        proved(trained, form, out)
    return str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("kind, layout, base, experts", [
    ("qwen3", "fused", "int8", False), ("qwen3_5_moe", "fused", "nf4", True),
    ("qwen3_5_moe", "per-expert", "nf4", False), ("qwen3_5_moe", "fp8", "int8", True)])
def test_every_form_of_export_computes_what_was_trained(kind, layout, base, experts, trained, tmp_path):
    run = trained(kind, layout, base, experts)
    for form in (Form("peft"), Form("vllm"), Form("merged", "as-trained", "bf16"), Form("merged", "original", "float32")):
        out = exported(run, tmp_path, form)
        figures = proved(run, form, out)
        assert figures["worst layer"] < 1e-5 and figures["logits behind the trainer's layers"] < 1e-5
        assert figures["logits of the untuned model"] > 1e-2
        if kind == "qwen3":
            assert figures["logits"] < 1e-5
        out.rename(tmp_path / f"{form.kind}-{form.base_weights}")


@pytest.mark.slow
def test_a_merge_with_two_experts_swapped_is_named(trained, tmp_path):
    run, form = trained("qwen3_5_moe", "fused", "bf16", True), Form("merged", "original", "bf16")
    out = exported(run, tmp_path, form)
    for file in out.glob("*.safetensors"):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if "layers.1.mlp.experts.down_proj" in name:
                tensor[[2, 5]] = tensor[[5, 2]]
        save_file(tensors, file, {"format": "pt"})
    assert "2 weights are not base plus adapter" in (said := refused(run, form, out))
    assert "layers.1.mlp.experts.2.down_proj" in said and "layers.1.mlp.experts.5.down_proj" in said


@pytest.mark.slow
def test_a_dropped_adapter_a_wrong_prefix_an_open_block_and_a_cut_shard_are_named(trained, tmp_path):
    run, form = trained(base="bf16"), Form("peft")
    out = exported(run, tmp_path, form)
    adapter, template = out / checkpoint.ADAPTER, out / "chat_template.jinja"
    tensors, right = load_file(adapter), template.read_text()

    save_file({name: tensor * ("lora_A" in name) for name, tensor in tensors.items()}, adapter, {"format": "pt"})
    assert "the adapter was dropped" in refused(run, form, out)
    save_file({name.replace(".model.model.", ".model.model.language_model."): t for name, t in tensors.items()}, adapter)
    assert "peft does not load every adapter" in refused(run, form, out)
    save_file(tensors, adapter, {"format": "pt"})
    template.write_text(right + "{%- if add_generation_prompt %}{{- '<think>\\n' }}{%- endif %}")
    assert "its chat template" in (said := refused(run, form, out)) and "<think>" in said
    template.write_text(right)
    proved(run, form, out)

    out.rename(tmp_path / "adapter")
    form = Form("merged", "original", "bf16")
    out = exported(run, tmp_path, form)
    shard = sorted(out.glob("*.safetensors"))[0]
    with open(shard, "r+b") as file:
        file.truncate(shard.stat().st_size - 100)
    assert shard.name in refused(run, form, out)


@pytest.mark.slow
def test_a_model_that_does_not_fit_is_proved_from_the_disk_layer_by_layer(trained, tmp_path, monkeypatch):
    """The trainer computes one layer at a time, transformers reads each module when it is its turn. peft cannot."""
    run, placed = trained("qwen3_5_moe", "fused", "nf4", False), []

    class Small(AutoModelForCausalLM):
        @classmethod
        def from_pretrained(cls, path, **settings):
            del settings["trust_remote_code"]
            model = AutoModelForCausalLM.from_pretrained(path, max_memory={"cpu": 10**5}, trust_remote_code=False,
                                                         **settings)
            placed.append(set(map(str, model.hf_device_map.values())))
            return model

    form = Form("merged", "as-trained", "bf16")
    out = exported(run, tmp_path, form)
    whole = proved(run, form, out)
    monkeypatch.setattr(proof, "AutoModelForCausalLM", Small)
    monkeypatch.setattr(expected, "PART_BYTES", 1)
    parts = proved(run, form, out)
    assert placed == [{"disk"}] and parts["worst layer"] < 1e-5
    assert parts["loss exported"] == pytest.approx(whole["loss exported"], rel=1e-5)
    assert parts["logits"] == pytest.approx(whole["logits"], abs=1e-5)
    out.rename(tmp_path / "merged")
    with pytest.raises(ValueError, match="does not fit the memory in float32.*take --format merged"):
        proved(run, Form("peft"), exported(run, tmp_path, Form("peft")))

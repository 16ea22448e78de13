"""Whole runs of train.py on a tiny model of the 35B's kind."""

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from model.tiny.write import write_tiny

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "in_proj_qkv", "in_proj_z", "out_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def tiny_35b(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("tiny") / "35b", layout="fp8", num_hidden_layers=4)


@pytest.fixture
def write_moe_config(write_config, tiny_35b):
    def write(base, **changes):
        return write_config(model__path=str(tiny_35b), model__base=base, lora__target=TARGETS, train__learning_rate=0.01,
                            checkpoint__every=3, **changes)

    return write


@pytest.mark.slow
@pytest.mark.parametrize("base, experts", [("nf4", False), ("int8", True)])
def test_a_run_learns_and_resumes_to_the_last_bit(write_moe_config, run_train, tmp_path, base, experts):
    config = write_moe_config(base, lora__experts=experts, train__max_steps=6)
    lines = run_train(config)
    evals = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert evals[-1] < 0.9 * evals[0]
    for path in (tmp_path / "checkpoints/tiny").rglob("step-00000006/*"):
        path.unlink()
    (tmp_path / "checkpoints/tiny/step-00000006").rmdir()
    assert run_train(config) == lines


def test_router_stats_are_recorded_each_step(write_moe_config, run_train):
    lines = run_train(write_moe_config("nf4", train__max_steps=2, train__router_stats=True))
    lines = [line for line in lines if "router" in line]
    assert [line["step"] for line in lines] == [1, 2]
    for line in lines:
        assert list(line["router"]) == ["0", "1", "2", "3"]
        for layer in line["router"].values():
            assert sum(layer["share"]) == pytest.approx(1, abs=1e-4) and 0.5 < layer["entropy"] <= 1


def test_router_stats_need_routed_experts(write_config, run_train):
    with pytest.raises(ValueError, match="router_stats is true, but the model has no routed experts"):
        run_train(write_config(train__router_stats=True))


@pytest.mark.slow
@pytest.mark.parametrize("experts", [False, True])
def test_peft_loads_the_adapter(write_moe_config, run_train, tmp_path, tiny_35b, experts):
    run_train(write_moe_config("bf16", lora__experts=experts, train__max_steps=2))
    saved = tmp_path / "checkpoints/tiny/step-00000002"
    base = AutoModelForCausalLM.from_pretrained(tiny_35b, dtype=torch.float32, trust_remote_code=False)
    model = PeftModel.from_pretrained(base, saved)
    loaded = {name: p for name, p in model.named_parameters() if "lora_" in name}
    on_disk = load_file(saved / "adapter_model.safetensors")
    assert len(on_disk) == len(loaded) == 2 * (3 * 4 + 3 * 3 + 4 + 2 * 4 * experts)
    for name, tensor in on_disk.items():
        assert torch.equal(loaded[name.replace(".weight", ".default.weight")], tensor)

"""What is said of models without building them is what the built model says; config.json files that cannot be are named."""

import json
import os
from pathlib import Path

import pytest

from model.architectures import LINEARS, WITH_EXPERTS, read_config
from model.build import expert_names, linear_names, skeleton, text_config
from model.tiny.shapes import text_config as published

ROOT = Path(__file__).parents[2]
BUILT_IN = {path.stem: json.loads(path.read_text()) for path in sorted((ROOT / "configs/models").glob("*.json"))}
PARAMETERS = {  # in billions, as published
    "Qwen3-0.6B": 0.6, "Qwen3-1.7B": 1.7, "Qwen3-4B-Thinking-2507": 4.0, "Qwen3-8B": 8.2, "Qwen3-14B": 14.8, "Qwen3-32B": 32.8,
    "Qwen3-30B-A3B": 30.5, "Qwen3-30B-A3B-Thinking-2507": 30.5, "Qwen3.5-35B-A3B": 34.7}
SHAPES = {"llama": published("llama", 1, 49_152), "qwen3": BUILT_IN["Qwen3-4B-Thinking-2507"],
          "qwen3_moe": BUILT_IN["Qwen3-30B-A3B"], "qwen3_5_moe_text": BUILT_IN["Qwen3.5-35B-A3B"]}


@pytest.fixture
def write(tmp_path):
    def write(content):
        (tmp_path / "config.json").write_text(content if isinstance(content, str) else json.dumps(content))
        return tmp_path / "config.json"

    return write


@pytest.mark.parametrize("kind", LINEARS)
def test_the_table_names_the_linears_that_the_model_has(write, kind):
    model = skeleton(write(SHAPES[kind]), "bf16")
    assert {name.rpartition(".")[2] for name in linear_names(model)} == set(LINEARS[kind])
    assert len(LINEARS[kind]) == len(set(LINEARS[kind]))
    assert bool(expert_names(model)) == (kind in WITH_EXPERTS)


def test_shapes_that_are_built_in_have_the_published_number_of_parameters(write):
    counted = {name: sum(parameter.numel() for parameter in skeleton(write(shapes), "bf16").parameters())
               for name, shapes in BUILT_IN.items()}
    assert {name: round(count / 1e9, 1) for name, count in counted.items()} == PARAMETERS


def test_a_model_with_dense_layers_between_experts_is_refused(write):
    with pytest.raises(ValueError, match="mlp_only_layers or decoder_sparse_step makes some layers dense"):
        read_config(write(SHAPES["qwen3_moe"] | {"mlp_only_layers": [3]}))


@pytest.mark.parametrize("kind, changes, words", [
    ("qwen3", {"num_attention_heads": 0}, "num_attention_heads is 0, expected a whole number from 1 to 1,024"),
    ("qwen3", {"num_hidden_layers": -1}, "num_hidden_layers is -1, expected a whole number from 1 to 1,000"),
    ("qwen3", {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, expected"),
    ("qwen3", {"num_hidden_layers": 2.5}, "num_hidden_layers is 2.5, expected a whole number"),
    ("qwen3", {"num_hidden_layers": True}, "num_hidden_layers is True, expected a whole number"),
    ("qwen3", {"hidden_size": 0}, "hidden_size is 0"),
    ("qwen3", {"vocab_size": "many"}, "vocab_size is many"),
    ("qwen3", {"vocab_size": 10**30}, "vocab_size is 1000000000000000000000000000000"),
    ("qwen3", {"head_dim": -128}, "head_dim is -128"),
    ("qwen3", {"num_key_value_heads": 3}, "num_attention_heads is 32, expected a multiple of num_key_value_heads, which is 3"),
    ("llama", {"hidden_size": 577, "head_dim": None}, "hidden_size is 577, expected a multiple of num_attention_heads"),
    ("qwen3", {"rms_norm_eps": 0}, "rms_norm_eps is 0, expected a number from 1e-12 to 1"),
    ("qwen3", {"rope_theta": float("nan")}, "rope_theta is nan, expected a number from 1 to 1e+15"),
    ("qwen3_5_moe_text", {"rope_parameters": {"rope_theta": -1}}, "rope_theta is -1, expected a number"),
    ("qwen3_5_moe_text", {"num_experts": None}, "num_experts is None"),
    ("qwen3_5_moe_text", {"num_experts_per_tok": 500}, "num_experts_per_tok is 500, expected at most num_experts, which"),
    ("qwen3_5_moe_text", {"linear_num_key_heads": 5}, "linear_num_value_heads is 32, expected a multiple of linear_num"),
    ("qwen3_5_moe_text", {"layer_types": ["full_attention"]}, "layer_types has 1 entries, expected num_hidden_layers, 40"),
    ("qwen3_5_moe_text", {"hidden_act": "gelu"}, "hidden_act is 'gelu', expected 'silu' for routed experts"),
    ("qwen3", {"model_type": ["qwen3"]}, "is not supported; supported are llama, qwen3, qwen3_moe, qwen3_5_moe_text"),
    ("qwen3", {"text_config": []}, "found a list, expected an object"),
])
def test_sizes_that_cannot_be_are_named(write, kind, changes, words):
    file = write(SHAPES[kind] | changes)
    for read in (read_config, text_config):
        with pytest.raises(ValueError) as error:
            read(file)
        assert str(error.value).startswith(f"{file}: ") and words in str(error.value)


@pytest.mark.parametrize("text, words", [
    ("[]", "found a list, expected an object"), ("7", "found a int"), ("", "not valid JSON"), ("\0", "not valid JSON"),
    ("[" * 100_000, "not valid JSON (maximum recursion depth"), ('{"a": ' * 100_000, "not valid JSON"),
    (f'{{"vocab_size": {"9" * 5000}}}', "not valid JSON"), (" " * 2_000_000, "not valid JSON (over 1,000,000 bytes)"),
    ("{}", "model_type, hidden_size, num_hidden_layers, vocab_size, num_attention_heads, num_key_value_heads missing"),
])
def test_files_that_hold_no_config_are_named(write, text, words):
    file = write(text)
    with pytest.raises(ValueError) as error:
        read_config(file)
    assert str(error.value).startswith(f"{file}: ") and words in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize("changes, words", [
    ({"hidden_act": "glue"}, "cannot build the model: KeyError: 'glue'"),
    ({"rope_parameters": {"rope_type": "spiral"}}, "cannot build the model: KeyError: 'spiral'"),
    ({"pad_token_id": 10**9}, "cannot build the model: AssertionError"),
    ({"attention_bias": 3}, "cannot read it"),
    ({"extra": None}, "cannot read it: RecursionError"),
])
def test_what_only_transformers_refuses_is_one_line_too(write, changes, words):
    text = json.dumps(SHAPES["qwen3"] | changes).replace('"extra": null', f'"extra": {"[" * 900}{"]" * 900}')
    file = write(text)
    with pytest.raises(ValueError) as error:
        skeleton(file, "bf16")
    assert str(error.value).startswith(f"{file}: transformers ") and words in str(error.value) and "\n" not in str(error.value)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(ValueError, match="not found. Expected a directory with config.json"):
        read_config(tmp_path / "config.json")

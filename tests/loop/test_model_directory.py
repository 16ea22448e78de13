"""A model directory is data: no code of its own runs, nobody is asked whether it may, and what is damaged is named."""

import builtins
import json
import os

import pytest
import torch

from data.chat import ChatFormat
from loop.run import load_tokenizer
from model.build import build_empty
from model.config import LoraConfig
from model.tiny.write import write_tiny

CODE = "evil.Evil"
AUTO_MAP = {name: CODE for name in ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoImageProcessor", "AutoProcessor")}
AUTO_MAP |= {"AutoTokenizer": [CODE, CODE]}
FILES = ("config.json", "tokenizer_config.json", "generation_config.json", "processor_config.json", "preprocessor_config.json",
         "video_preprocessor_config.json")


@pytest.fixture
def hostile(tmp_path, monkeypatch):
    """A model whose files name code beside them; the code writes `marker`. Who asks whether to run it is told `yes`."""
    directory, asked = write_tiny(tmp_path / "model", kind="qwen3", num_hidden_layers=1), []
    (directory / "evil.py").write_text(
        f"open({str(tmp_path / 'marker')!r}, 'w').close()\n"
        "from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast\n"
        "class Evil(PreTrainedTokenizerFast): model_type = 'evil'\n")
    for name in FILES:
        file = directory / name
        file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | {"auto_map": AUTO_MAP}))
    monkeypatch.setattr(builtins, "input", lambda *question: asked.append(question) or "y")
    yield directory
    assert not asked and not (tmp_path / "marker").exists()


def change(file, **fields):
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def load(directory):
    stage, weights = build_empty(directory, "bf16", LoraConfig(2, 4, ("q_proj",)), seed=0, device=torch.device("cpu"),
                                 recompute=False)
    return weights.load(directory)


def test_code_beside_a_known_model_is_ignored(hostile):
    assert load(hostile)
    assert load_tokenizer(hostile).decode(load_tokenizer(hostile).encode("Nf3")) == "Nf3"


def test_code_of_an_unknown_model_is_refused(hostile):
    change(hostile / "config.json", model_type="evil")
    with pytest.raises(ValueError, match=r"config.json: model_type 'evil' is not supported") as error:
        load(hostile)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("tokenizer_class", ["Evil", "PreTrainedTokenizerFast", None])
@pytest.mark.parametrize("model_type", ["evil", "qwen3"])
def test_code_of_a_tokenizer_is_ignored_or_refused(hostile, tokenizer_class, model_type):
    change(hostile / "config.json", model_type=model_type)
    change(hostile / "tokenizer_config.json", tokenizer_class=tokenizer_class)
    try:
        assert len(load_tokenizer(hostile).encode("Nf3")) == 3
    except ValueError as error:
        assert str(hostile) in str(error) and "\n" not in str(error)


# Damaged files of the tokenizer


@pytest.fixture
def model(tmp_path):
    return write_tiny(tmp_path / "model", kind="qwen3", num_hidden_layers=1)


def half(file):
    file.write_bytes(file.read_bytes()[:file.stat().st_size // 2])


def as_pipe(file):
    file.unlink(missing_ok=True)
    os.mkfifo(file)


def text(content):
    return lambda file: file.write_bytes(content)


@pytest.mark.parametrize("name, damage, problem", [
    ("tokenizer.json", half, "EOF while parsing"),
    ("tokenizer.json", text(b""), "EOF while parsing a value"),
    ("tokenizer.json", text(b"{}"), "Model missing"),
    ("tokenizer.json", text(b"[]"), "expected struct Tokenizer"),
    ("tokenizer.json", text(b"[" * 100_000), "no tokenizer could be read"),
    ("tokenizer.json", text(b"{\xff"), "byte 0xff at 1 is not UTF-8"),
    ("tokenizer.json", as_pipe, "not a regular file"),
    ("tokenizer_config.json", half, "expected JSON in UTF-8"),
    ("tokenizer_config.json", text(b""), "expected JSON in UTF-8"),
    ("tokenizer_config.json", text(b"[]"), "expected a JSON object"),
    ("tokenizer_config.json", text(b"[" * 100_000), "expected JSON in UTF-8"),
    ("tokenizer_config.json", text(b"\xff"), "expected JSON in UTF-8"),
    ("tokenizer_config.json", as_pipe, "not a regular file"),
    ("special_tokens_map.json", text(b'["a"'), "expected JSON in UTF-8"),
    ("added_tokens.json", text(b'["a"'), "expected JSON in UTF-8"),
    ("config.json", text(b"{" + b'"a":{' * 100_000), "expected JSON in UTF-8"),
    ("chat_template.jinja", text(b"\xfe"), "byte 0xfe at 0 is not UTF-8"),
    ("chat_template.jinja", as_pipe, "not a regular file"),
])
def test_a_damaged_file_is_named_in_one_line(model, name, damage, problem):
    damage(model / name)
    with pytest.raises(ValueError, match=f"^{model / name}: .*{problem}") as error:
        load_tokenizer(model)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


@pytest.mark.parametrize("setting", [{"eos_token": 3}, {"tokenizer_class": ["a"]}, {"added_tokens_decoder": {"x": 3}},
                                     {"auto_map": 3}])
def test_wrong_settings_of_a_tokenizer_are_named(model, setting):
    change(model / "tokenizer_config.json", **setting)
    with pytest.raises(ValueError, match=f"^{model}: no tokenizer could be read .*download them again$"):
        load_tokenizer(model)


def test_a_template_with_a_syntax_error_is_named_with_its_line(model):
    (model / "chat_template.jinja").write_text("{{ messages }}\n{% for x in")
    with pytest.raises(ValueError, match=f"^{model}: its chat template has an error in line 2: .*publisher once more$"):
        ChatFormat(load_tokenizer(model), "strip")

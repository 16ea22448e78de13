"""A model directory is data: whatever its files name, no code of its own runs, and nobody is asked whether it may."""

import builtins
import json

import pytest
import torch

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
    with pytest.raises(ValueError, match=r"config.json: .*custom code") as error:
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

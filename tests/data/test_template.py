"""The template that a checkpoint carries renders the prompts of training, whatever a server passes to it."""

import json
import shutil

import pytest
from transformers import AutoTokenizer

from data.chat import ChatFormat
from data.template import CHATS, tokenizer_files, trained_template, write_tokenizer

CLOSED, OPEN = "<|im_start|>assistant\n<think>\n\n</think>\n\n", "<|im_start|>assistant\n<think>\n"
BARE = "<|im_start|>assistant\n"
TURNS = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
TEMPLATES = {  # beside those of the fixtures
    "smollm2": "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
               "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
               "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
               "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "off unless asked for":
        TURNS + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% if enable_thinking is defined and "
        "enable_thinking %}{{ '<think>\n' }}{% else %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}",
    "open, as text": TURNS + "{% if add_generation_prompt %}<|im_start|>assistant\n<think>{% endif %}\n\n",
    "no system message":
        "{% if messages[0].role == 'system' %}{{ raise_exception('none') }}{% endif %}" + TURNS +
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}\n",
}
# what ends the prompt with thinking off, and on
ENDS = {"qwen3": (CLOSED, BARE), "thinking-2507": (CLOSED, OPEN), "qwen3.5": (CLOSED, OPEN), "llama": (BARE, BARE),
        "qwen3 tiny": (CLOSED, BARE), "qwen3_5_moe": (CLOSED, OPEN), "smollm2": (BARE, BARE),
        "off unless asked for": (CLOSED, OPEN), "open, as text": (CLOSED, "<|im_start|>assistant\n<think>"),
        "no system message": (CLOSED, OPEN)}


@pytest.fixture(params=ENDS)
def named(request, tiny_tokenizers, monkeypatch):
    """The name of a template, and a tokenizer that has it."""
    name = request.param
    if name in ("qwen3", "thinking-2507", "qwen3.5"):
        return name, request.getfixturevalue("qwen3_tokenizers")[name]
    tokenizer = tiny_tokenizers[name.removesuffix(" tiny") if name not in TEMPLATES else "llama"]
    if name in TEMPLATES:
        monkeypatch.setattr(tokenizer, "chat_template", TEMPLATES[name])
    return name, tokenizer


@pytest.mark.parametrize("think", ["strip", "keep"])
@pytest.mark.parametrize("passed", [{}, {"enable_thinking": True}, {"enable_thinking": False}], ids=str)
def test_a_served_prompt_is_the_trained_one_id_by_id(named, think, passed):
    name, tokenizer = named
    chat = ChatFormat(tokenizer, think)
    template = trained_template(chat)
    thinking = think == "keep" and passed.get("enable_thinking", True)
    for messages in CHATS:
        if name == "no system message" and messages[0]["role"] == "system":
            continue
        trained = chat.prompt(messages, thinking)
        served = tokenizer.apply_chat_template(messages, chat_template=template, add_generation_prompt=True, **passed)
        assert served.input_ids == tokenizer(trained, add_special_tokens=False).input_ids
        assert trained.endswith(ENDS[name][thinking]) and all(message["content"] in trained for message in messages)
    # without a generation prompt, as others render what they train on, nothing is closed
    whole = tokenizer.apply_chat_template(CHATS[0], chat_template=template, tokenize=False)
    assert whole.endswith("I am the user.<|im_end|>\n") and "<think>" not in whole


@pytest.mark.parametrize("text", [
    TURNS + "{% if add_generation_prompt %}{{ '<think>\n\n\n' }}{% endif %}",  # nothing that follows makes it a closed block
    TURNS + "{% if add_generation_prompt %}{{ '<think>' if messages | length == 1 else '<think>\n' }}{% endif %}",
])
def test_a_template_that_cannot_be_made_so_is_refused(tiny_tokenizers, monkeypatch, text):
    monkeypatch.setattr(tiny_tokenizers["llama"], "chat_template", text)
    with pytest.raises(ValueError, match="cannot be changed into one that renders the prompts of training: a prompt ends in"):
        trained_template(ChatFormat(tiny_tokenizers["llama"], "strip"))


# Directories that load as they lie

TEXTS = ("Nf3 eyes e5. 1234", "naïve café e\u0301\u0301", "हिन्दी शतरंज", "<think>\n\n</think>\n\n<|im_end|> 棋")


@pytest.mark.parametrize("model_type", ["qwen3", "qwen3_5_moe"])
def test_a_directory_without_a_model_has_the_tokenizer_of_training(qwen3_tokenizers, tmp_path, model_type):
    """transformers chooses rules by config.json, which an adapter's directory has not: it took Qwen3's for Qwen3.5."""
    shutil.copytree(qwen3_tokenizers["qwen3"].name_or_path, tmp_path / "base")
    (tmp_path / "base/config.json").write_text(json.dumps({"model_type": model_type}))
    trained = AutoTokenizer.from_pretrained(tmp_path / "base", trust_remote_code=False)
    chat = ChatFormat(trained, "strip")
    (tmp_path / "out").mkdir()
    write_tokenizer(chat, tmp_path / "out")
    served = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=False)
    assert [served(text).input_ids for text in TEXTS] == [trained(text).input_ids for text in TEXTS]
    assert served.chat_template == trained_template(chat) != trained.chat_template
    assert (served.eos_token, served.pad_token, len(served)) == ("<|im_end|>", "<|endoftext|>", len(trained))
    rules, expected = (json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"] for tokenizer in (served, trained))
    assert rules == expected and (r"\p{M}" in str(rules)) == (model_type == "qwen3_5_moe"), "the two differ in this"
    assert served.apply_chat_template(CHATS[3], add_generation_prompt=True).input_ids == \
        trained(chat.prompt(CHATS[3]), add_special_tokens=False).input_ids


@pytest.mark.parametrize("base, expected", [
    (None, {"eos_token_id": [258]}),
    ({"temperature": 0.6, "top_k": 20, "eos_token_id": 256}, {"temperature": 0.6, "top_k": 20, "eos_token_id": [258, 256]}),
    ({"do_sample": True, "eos_token_id": [258, 256]}, {"do_sample": True, "eos_token_id": [258, 256]}),
])
def test_generation_stops_at_the_trained_token(tiny_tokenizers, tmp_path, monkeypatch, base, expected):
    tokenizer = tiny_tokenizers["llama"]
    if base:
        (tmp_path / "generation_config.json").write_text(json.dumps(base))
    monkeypatch.setattr(tokenizer, "name_or_path", str(tmp_path))
    assert json.loads(tokenizer_files(ChatFormat(tokenizer, "strip"))["generation_config.json"]) == expected


def test_no_code_of_the_base_is_named_and_the_template_is_there_once(tiny_tokenizers, tmp_path, monkeypatch):
    tokenizer = tiny_tokenizers["llama"]
    published = {"auto_map": {"AutoTokenizer": ["own.Tokenizer", None]}, "chat_template": "old", "eos_token": "<|im_end|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(published))
    monkeypatch.setattr(tokenizer, "name_or_path", str(tmp_path))
    config = json.loads(tokenizer_files(ChatFormat(tokenizer, "strip"))["tokenizer_config.json"])
    assert config == {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"}

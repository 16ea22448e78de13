"""A byte-level ChatML tokenizer for random checkpoints: 256 bytes, five special tokens, chat templates like the models' own.
Costs a few KB."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
STOP_TOKENS = ("<|im_end|>", "<|endoftext|>")
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
         "merges.txt", "chat_template.jinja")

PLAIN_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
# Shows thoughts only after the last question. TEXT, SHOWN, THOUGHT and OPENING stand where Qwen3 and Qwen3.5 differ.
THINKING_TEMPLATE = """\
{%- set last = namespace(question=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {%- set last.question = loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = TEXT %}
    {%- set thought = message.reasoning_content if message.reasoning_content is string else '' %}
    {%- if message.role == 'assistant' and not thought and '</think>' in content %}
        {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' and loop.index0 > last.question and SHOWN %}
        {{- '<think>\\n' + THOUGHT + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
    {%- else %}
        {{- content }}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- else %}
        {{- 'OPENING' }}
    {%- endif %}
{%- endif %}
"""


def chat_template(kind: str) -> str:
    """The Jinja template of a kind of `model.tiny`, with the generation prompts of the published models."""
    if kind == "llama":
        return PLAIN_TEMPLATE
    if kind in ("qwen3", "qwen3_moe"):
        changes = {"TEXT": "message.content", "SHOWN": "(loop.last or thought)", "THOUGHT": "thought.strip('\\n')",
                   "OPENING": ""}
    else:
        changes = {"TEXT": "message.content|trim", "SHOWN": "true", "THOUGHT": "thought|trim",
                   "OPENING": "<think>\\n"}
    template = THINKING_TEMPLATE
    for placeholder, text in changes.items():
        template = template.replace(placeholder, text)
    return template


def write_tokenizer(out: Path, kind: str, given: str | Path | None) -> tuple[int, list[int]]:
    """Writes the tokenizer, or copies the given one; returns one more than the largest id, and the stop ids."""
    if given is None:
        _write_own(out, kind)
    elif not (Path(given) / "tokenizer.json").is_file():
        raise ValueError(f"{given}: expected a directory with tokenizer.json")
    else:
        for name in FILES:
            if (Path(given) / name).is_file():
                shutil.copyfile(Path(given) / name, out / name)
    return _ids(out)


def _write_own(out: Path, kind: str) -> None:
    alphabet = sorted(ByteLevel.alphabet())
    added = [{"id": len(alphabet) + i, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": False, "special": "think" not in token} for i, token in enumerate(SPECIAL_TOKENS)]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    tokenizer: dict[str, Any] = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": {"type": "NFC"},
        "pre_tokenizer": byte_level, "post_processor": byte_level, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
                  "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": {character: i for i, character in enumerate(alphabet)}, "merges": []}}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "add_prefix_space": False, "bos_token": None,
        "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": None, "model_max_length": 262_144,
        "clean_up_tokenization_spaces": False, "split_special_tokens": False,
        "added_tokens_decoder": {str(token["id"]): {key: token[key] for key in token if key != "id"}
                                 for token in added},
        "chat_template": chat_template(kind)}
    for name, content in (("tokenizer.json", tokenizer), ("tokenizer_config.json", config)):
        (out / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _ids(directory: Path) -> tuple[int, list[int]]:
    tokenizer = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    ids = dict(tokenizer["model"]["vocab"])
    ids.update({token["content"]: token["id"] for token in tokenizer["added_tokens"]})
    config = directory / "tokenizer_config.json"
    if config.is_file():
        added = json.loads(config.read_text(encoding="utf-8")).get("added_tokens_decoder", {})
        ids.update({token["content"]: int(i) for i, token in added.items()})
    return max(ids.values()) + 1, [ids[token] for token in STOP_TOKENS if token in ids]

"""Tokenizer and chat template of a trained model: whoever serves it with them renders the prompts of its training.
Costs the tokenizer's files in memory: 11 MB for Qwen3."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from data.chat import ChatFormat
from data.files import write_whole
from data.limits import RENDER_S, TooSlow, time_limit

# what stands before the published template; a server may pass `enable_thinking` to it
THINKING = {"strip": "{%- set enable_thinking = false %}\n",
            "keep": "{%- if enable_thinking is not defined %}{%- set enable_thinking = true %}{%- endif %}\n"}
FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
PASSED: tuple[dict[str, bool], ...] = ({"enable_thinking": False}, {"enable_thinking": True}, {})
SYSTEM, QUESTION, ANSWER = ({"role": role, "content": f"I am the {role}."} for role in ("system", "user", "assistant"))
CHATS = ([QUESTION], [SYSTEM, QUESTION], [QUESTION, ANSWER, QUESTION], [SYSTEM, QUESTION, ANSWER, QUESTION])


def trained_template(chat: ChatFormat) -> str:
    """The chat template that renders what `ChatFormat.prompt` gave to the model in training.

    With `think: strip` thinking is off, whatever a server passes as `enable_thinking`. With `keep` thinking is on, as in rows
    with a thought, unless a server switches it off: then the prompt is that of rows without one. A block that the published
    template leaves open with thinking off is closed.

    Raises:
        ValueError: the template renders other prompts all the same; found by rendering some chats both ways.
    """
    template = THINKING[chat.think] + chat.tokenizer.chat_template
    try:
        with time_limit(RENDER_S):
            pairs = [(trained, served) for trained, served in prompts(chat, template) if trained != served]
            if pairs and all(trained.startswith(served) for trained, served in pairs):
                rest = pairs[0][0].removeprefix(pairs[0][1])
                template += f"{{%- if add_generation_prompt and not enable_thinking %}}{{{{- {rest!r} }}}}{{%- endif %}}\n"
                pairs = [(trained, served) for trained, served in prompts(chat, template) if trained != served]
    except TooSlow:
        raise ValueError(f"{chat.name}: its chat template takes over {RENDER_S:g} s for {len(CHATS)} short chats") from None
    for trained, served in pairs:
        raise ValueError(f"{chat.name}: its chat template cannot be changed into one that renders the prompts of training: a "
                         f"prompt ends in {served[-60:]!r}, expected {trained[-60:]!r}")
    return template


def prompts(chat: ChatFormat, template: str) -> list[tuple[str, str]]:
    """Of some chats, and of all that a server may pass: the prompt in training, and that which the template renders."""
    pairs = []
    for messages in CHATS:
        for passed in PASSED:
            thinking = chat.think == "keep" and passed.get("enable_thinking", True)
            try:
                trained = chat.prompt(messages, thinking)
            except TooSlow:
                raise
            except Exception:  # refused, by an error of jinja or a TypeError: this chat cannot be trained on either
                continue
            served = chat.tokenizer.apply_chat_template(
                messages, chat_template=template, tokenize=False, add_generation_prompt=True, **passed)
            pairs.append((trained, served))
    return pairs


def tokenizer_files(chat: ChatFormat) -> dict[str, bytes]:
    """What a directory needs beside weights, by file name: the tokenizer as it was used in training, the trained template, and
    a generation_config.json that knows the stop token."""
    directory, tokenizer = Path(chat.name), chat.tokenizer
    config = tokenizer.special_tokens_map | read_object(directory / "tokenizer_config.json")
    for other in ("chat_template", "auto_map"):  # the template has its own file; no code is run
        config.pop(other, None)
    # every version of transformers takes tokenizer.json as it is then; Qwen2Tokenizer would put its own rules in place of those
    # of Qwen3.5, as there is no config.json beside an adapter
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    generation = read_object(directory / "generation_config.json")
    stop = generation.get("eos_token_id") or []
    stop = stop if isinstance(stop, list) else [stop]
    generation["eos_token_id"] = stop if chat.stop_id in stop else [chat.stop_id, *stop]
    contents = (tokenizer.backend_tokenizer.to_str(pretty=True), as_json(config), trained_template(chat), as_json(generation))
    return {name: content.encode() for name, content in zip(FILES, contents)}


def read_object(file: Path) -> dict[str, Any]:
    """A JSON object, which `load_tokenizer` has checked; empty where the model has no such file."""
    return dict(json.loads(file.read_bytes())) if file.is_file() else {}


def as_json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def write_tokenizer(chat: ChatFormat, directory: Path) -> None:
    """Writes `tokenizer_files` into a directory, each file whole."""
    for name, content in tokenizer_files(chat).items():
        write_whole(directory / name, lambda file: file.write_bytes(content))

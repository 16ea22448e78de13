"""Tokenizers and paths that several tests share."""

import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from model.tiny_tokenizer import write_tokenizer

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"  # real rows and the Qwen3 tokenizer, where they are there
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_tokenizers(tmp_path_factory):
    """Byte-level ChatML tokenizers with the published kinds of generation prompt."""
    loaded = {}
    for kind in ("llama", "qwen3", "qwen3_5_moe"):
        directory = tmp_path_factory.mktemp(kind)
        write_tokenizer(directory, kind, None)
        loaded[kind] = AutoTokenizer.from_pretrained(directory)
    return loaded


@pytest.fixture(scope="session")
def qwen3_tokenizers():
    """The Qwen3 tokenizer under the chat templates of its three generations."""
    directory = SHARED / "qwen3-tokenizer"
    if not directory.is_dir():
        pytest.skip("the Qwen3 tokenizer is not here")
    styles = {style: AutoTokenizer.from_pretrained(directory) for style in ("qwen3", "thinking-2507", "qwen3.5")}
    head, generation_prompt = styles["qwen3"].chat_template.split("{%- if add_generation_prompt %}")
    assert "enable_thinking" in generation_prompt
    # 2507 knows no switch: its generation prompt always ends in an open block
    styles["thinking-2507"].chat_template = (
        head + "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n' }}{%- endif %}"
    )
    styles["qwen3.5"].chat_template = (directory / "chat_template_qwen3_5.jinja").read_text()
    return styles


@pytest.fixture
def write_rows(tmp_path):
    """Writes chat rows as JSONL: dicts as they are, strings as raw lines."""

    def write(rows, name="rows.jsonl"):
        path = tmp_path / name
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return str(path)

    return write


def chat_row(*contents, source="textbook", system=None):
    """A row of user and assistant turns."""
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return {"messages": messages, "metadata": {"source": source}}


@pytest.fixture
def make_row():
    return chat_row

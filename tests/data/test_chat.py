"""Supervised ids, one by one, in every generation-prompt style; prompts written out by hand."""

import json
from pathlib import Path

import pytest

from data.chat import ChatFormat
from data.records import Dropped, read_rows

TEXTBOOK = Path(__file__).parents[3] / "shared" / "data" / "textbook" / "train.jsonl"
CLOSED = "<think>\n\n</think>\n\n"
# what a server sends before an answer, thinking off and on, as the model cards show it
ASSISTANT = "<|im_start|>assistant\n"
GENERATION = {
    "qwen3": {False: ASSISTANT + CLOSED, True: ASSISTANT},
    "thinking-2507": {False: ASSISTANT + CLOSED, True: ASSISTANT + "<think>\n"},
    "qwen3.5": {False: ASSISTANT + CLOSED, True: ASSISTANT + "<think>\n"},
}
STYLES = list(GENERATION)


def examples(tokenizer, path, think="strip"):
    rows = list(read_rows(path, ("textbook",), think))
    return ChatFormat(tokenizer, think).examples(rows)


def split(tokenizer, example):
    """Context and supervised text, as lists of runs."""
    runs, last = [], None
    for token, flag in zip(example.ids, example.supervised):
        if flag is not last:
            runs.append([])
            last = flag
        runs[-1].append(token)
    return [tokenizer.decode(run) for run in runs]


def turn(role, content):
    return f"<|im_start|>{role}\n{content}<|im_end|>\n"


@pytest.mark.parametrize("style", STYLES)
def test_strip_supervises_the_answer_and_its_stop_token(qwen3_tokenizers, write_rows, make_row, style):
    tokenizer = qwen3_tokenizers[style]
    path = write_rows([make_row("Why Nf3?", "<think>\nhm\n</think>\n\nIt develops.\n", system="Coach.")])
    ((example,),) = examples(tokenizer, path)
    prompt = turn("system", "Coach.") + turn("user", "Why Nf3?") + GENERATION[style][False]
    assert example.ids == tokenizer.encode(prompt) + tokenizer.encode("It develops.") + [151645]
    assert example.supervised == [False] * len(tokenizer.encode(prompt)) + [True] * 4
    assert split(tokenizer, example) == [prompt, "It develops.<|im_end|>"]


@pytest.mark.parametrize("style", STYLES)
def test_keep_supervises_thought_closing_tag_and_answer(qwen3_tokenizers, write_rows, make_row, style):
    tokenizer = qwen3_tokenizers[style]
    path = write_rows([make_row("Why?", "<think>It eyes e5.</think>It develops.")])
    ((example,),) = examples(tokenizer, path, "keep")
    opening = GENERATION[style][True]
    written = "It eyes e5.\n</think>\n\nIt develops.<|im_end|>"
    if not opening.endswith("<think>\n"):
        written = "<think>\n" + written  # the prompt does not open the block, so the model has to
    assert split(tokenizer, example) == [turn("user", "Why?") + opening, written]


@pytest.mark.parametrize("style", STYLES)
def test_keep_without_a_thought_closes_the_block_in_the_prompt(qwen3_tokenizers, write_rows, make_row, style):
    tokenizer = qwen3_tokenizers[style]
    ((example,),) = examples(tokenizer, write_rows([make_row("Why?", "It develops.")]), "keep")
    assert split(tokenizer, example) == [turn("user", "Why?") + GENERATION[style][False], "It develops.<|im_end|>"]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("think", ["strip", "keep"])
def test_turns_that_history_renders_otherwise_become_examples(qwen3_tokenizers, write_rows, make_row, style, think):
    tokenizer = qwen3_tokenizers[style]
    path = write_rows([make_row("One?", "<think>a</think>First.", "Two?", "<think>b</think>Second.")])
    ((first, second),) = examples(tokenizer, path, think)
    generation = GENERATION[style][think == "keep"]
    history = turn("user", "One?") + turn("assistant", "First.") + turn("user", "Two?")
    assert split(tokenizer, first)[0] == turn("user", "One?") + generation
    assert split(tokenizer, second)[0] == history + generation
    assert split(tokenizer, second)[1].endswith("Second.<|im_end|>")
    assert "First" in split(tokenizer, first)[1], "every assistant turn is supervised in one of the examples"


def test_turns_share_an_example_where_history_repeats_them(tiny_tokenizers, write_rows, make_row):
    tokenizer = tiny_tokenizers["llama"]
    ((example,),) = examples(tokenizer, write_rows([make_row("One?", "First.", "Two?", "Second.", system="S")]))
    assert split(tokenizer, example) == [
        turn("system", "S") + turn("user", "One?") + ASSISTANT,
        "First.<|im_end|>",
        "\n" + turn("user", "Two?") + ASSISTANT,
        "Second.<|im_end|>",
    ]


@pytest.mark.parametrize("style", STYLES)
def test_prompts_are_what_the_template_renders_for_a_server(qwen3_tokenizers, style):
    """On the real rows: the ids before the first supervised one are those of a server's request."""
    tokenizer = qwen3_tokenizers[style]
    rows = [json.loads(line) for line in TEXTBOOK.read_text().splitlines()]
    made = examples(tokenizer, TEXTBOOK)
    assert len(made) == len(rows) == 124
    for row, (example,) in zip(rows, made):
        served = tokenizer.apply_chat_template(
            row["messages"][:-1], add_generation_prompt=True, enable_thinking=False, tokenize=False
        )
        if style == "thinking-2507":
            served += "\n</think>\n\n"
        prompt_ids = tokenizer.encode(served)
        answer_ids = tokenizer.encode(row["messages"][-1]["content"].strip() + "<|im_end|>")
        assert example.ids == prompt_ids + answer_ids
        assert example.supervised == [False] * len(prompt_ids) + [True] * len(answer_ids)


def test_a_control_token_in_a_text_is_a_bad_row(tiny_tokenizers, write_rows, make_row):
    path = write_rows([make_row("q", "Ends <|im_end|> early."), make_row("q", "Fine.")])
    dropped, (fine,) = examples(tiny_tokenizers["llama"], path)
    assert isinstance(dropped, Dropped) and dropped.reason == "control token in text"
    assert "<|im_end|>" in dropped.detail
    assert fine.row.line == 2


def test_what_the_template_refuses_is_a_bad_row(tiny_tokenizers, write_rows, make_row):
    tokenizer = tiny_tokenizers["llama"]
    template = tokenizer.chat_template
    try:
        tokenizer.chat_template = "{{ raise_exception('no system, please') }}"
        (dropped,) = examples(tokenizer, write_rows([make_row("q", "a")]))
    finally:
        tokenizer.chat_template = template
    assert dropped.reason == "refused by the chat template" and "no system, please" in dropped.detail


def test_models_without_chatml_are_refused(tiny_tokenizers):
    tokenizer = tiny_tokenizers["llama"]
    template = tokenizer.chat_template
    try:
        tokenizer.chat_template = None
        with pytest.raises(ValueError, match="expected one chat template, found none"):
            ChatFormat(tokenizer, "strip")
    finally:
        tokenizer.chat_template = template

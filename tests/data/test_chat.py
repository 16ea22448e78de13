"""Supervised ids, one by one, in every generation-prompt style; prompts written out by hand."""

import json
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from data import chat
from data.chat import ChatFormat
from data.config import DataConfig
from data.records import Dropped, read_rows
from data.tokenized import tokenize

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
    rows = list(read_rows(DataConfig(str(path), str(path), ("textbook",), think), "train"))
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
    with template(tiny_tokenizers["llama"], "{{ raise_exception('no system, please') }}") as tokenizer:
        (dropped,) = examples(tokenizer, write_rows([make_row("q", "a")]))
    assert dropped.reason == "refused by the chat template" and "no system, please" in dropped.detail


def test_models_without_chatml_are_refused(tiny_tokenizers):
    with template(tiny_tokenizers["llama"], None) as tokenizer:
        with pytest.raises(ValueError, match="expected one chat template, found none"):
            ChatFormat(tokenizer, "strip")


# Templates that are not what they should be


@contextmanager
def template(tokenizer, text):
    published = tokenizer.chat_template
    tokenizer.chat_template = text
    try:
        yield tokenizer
    finally:
        tokenizer.chat_template = published


def config(path, bad_rows="error"):
    return DataConfig(train=path, eval=path, sources=("textbook",), bad_rows=bad_rows)


@pytest.mark.parametrize("bad_rows", ["error", "skip"])
@pytest.mark.parametrize("text, problem", [
    ("", "leaves out the messages: of 'Is the knight on f3 or on g1.' it makes ''"),
    ("hello", "leaves out the messages: .* it makes 'hello'"),
    ("{% for m in messages %}{{ m.role }}{% endfor %}", "leaves out the messages: .* it makes 'user'"),
    ("{{ messages[-1].content[:5] }}", "leaves out the messages: .* it makes 'Is th'"),
    ("{% for x in", "has an error in line 1: "),
    ("\n\n{{ messages | nosuchfilter }}", "has an error in line 3: No filter named 'nosuchfilter'"),
])
def test_a_template_that_is_broken_or_ignores_the_messages_ends_the_run(
        tiny_tokenizers, write_rows, make_row, text, problem, bad_rows):
    """Such templates trained without prompts, and nothing was said."""
    with template(tiny_tokenizers["llama"], text) as tokenizer:
        path = write_rows([make_row("q", "a")])
        with pytest.raises(ValueError, match=f"^{tokenizer.name_or_path}: its chat template {problem}.*publisher") as error:
            tokenize("train", tokenizer, config(path, bad_rows))
    assert "\n" not in str(error.value)


LAST_TWO = "{% for m in messages[-2:] %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
NO_SYSTEM = "{% for m in messages if m.role != 'system' %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
REVERSED = "{% for m in messages | reverse %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
LAST_SYSTEM = ("{% for m in messages if m.role != 'system' %}{% if loop.last and messages[0].role == 'system' %}"
               "{{ messages[0].content }}\n{% endif %}{{ m.content }}\n{% endfor %}")


@pytest.mark.parametrize("text, lost", [(LAST_TWO, "messages[0].content, 'S'"), (NO_SYSTEM, "messages[0].content, 'S'"),
                                        (REVERSED, "messages[2].content, 'First.'"), (LAST_SYSTEM, None)])
def test_a_message_that_the_template_leaves_out_is_named(tiny_tokenizers, write_rows, make_row, text, lost):
    with template(tiny_tokenizers["llama"], text) as tokenizer:
        row, plain = examples(tokenizer, write_rows([make_row("One?", "First.", "Two?", "Second.", system="S"),
                                                     make_row("q", "a")]))
    assert len(plain) == 1
    if lost is None:
        assert len(row) == 2
    else:
        assert row.bad and row.reason == "left out by the chat template"
        where = f"the prompt that the template of {tokenizer.name_or_path} makes"
        assert row.detail == f"{lost}, is missing or misplaced in {where}"


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("think", ["strip", "keep"])
def test_published_templates_leave_nothing_out(qwen3_tokenizers, write_rows, make_row, style, think):
    """They trim, and leave out the thoughts of earlier answers; real rows are tried above."""
    turns = ("\n One? ", "<think>a</think>\n\nFirst.\n", "Two?", "<think>b</think>Second.", "One?", "First.", "", "Third.")
    (made,) = examples(qwen3_tokenizers[style], write_rows([make_row(*turns, system=" S\n")]), think)
    assert len(made) > 1


ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


def test_a_template_that_does_not_end_is_named(tiny_tokenizers, monkeypatch):
    monkeypatch.setattr(chat, "RENDER_S", 0.2)
    start = time.process_time()
    with template(tiny_tokenizers["llama"], ENDLESS) as tokenizer:
        with pytest.raises(ValueError, match=f"{tokenizer.name_or_path}: its chat template takes over 0.2 s for one short"):
            ChatFormat(tokenizer, "strip")
    assert time.process_time() - start < 5


def test_rows_that_take_too_long_are_bad_and_the_third_ends_the_run(tiny_tokenizers, write_rows, make_row, monkeypatch):
    monkeypatch.setattr(chat, "RENDER_S", 0.1)
    slow = f"{{% if 'slow' in messages[0].content %}}{ENDLESS}{{% endif %}}{{{{ messages[0].content }}}}"
    rows = [make_row("slow", "a"), make_row("q", "a"), make_row("slow", "b"), make_row("q", "b")]
    with template(tiny_tokenizers["llama"], slow) as tokenizer:
        path = write_rows(rows)
        made = examples(tokenizer, path)
        assert [isinstance(outcome, Dropped) for outcome in made] == [True, False, True, False]
        assert made[0].bad and made[0].reason == "slow to render"
        assert split(tokenizer, made[1][0]) == ["q", "a<|im_end|>"] and split(tokenizer, made[3][0]) == ["q", "b<|im_end|>"]
        with pytest.raises(ValueError, match=f"{path}:1: slow to render: the template of {tokenizer.name_or_path} takes"):
            tokenize("train", tokenizer, config(path))
        kept = tokenize("train", tokenizer, config(path, "skip"))
        assert kept.counts["textbook"].dropped == {"slow to render": 2} and kept.counts["textbook"].kept == 2
        path = write_rows([*rows, rows[0]])
        with pytest.raises(ValueError, match="takes over 0.1 s for each of 3 rows, the last in line 5"):
            tokenize("train", tokenizer, config(path, "skip"))

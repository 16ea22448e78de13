"""What is read, what is left out, and what is said about it."""

import json

import pytest

from data.config import DataConfig
from data.records import Dropped, Row, read_rows

ANSWERED = {"role": "assistant", "content": "Develops."}
ASKED = {"role": "user", "content": "Why?"}


def read(path, think="strip"):
    return list(read_rows(DataConfig(str(path), str(path), ("textbook",), think), "train"))


def test_keeps_chosen_sources_and_counts_lines_through_blank_ones(write_rows, make_row):
    path = write_rows([make_row("a", "b"), "", make_row("c", "d", source="forum"), make_row("e", "f")])
    first, other, last = read(path)
    assert (first.line, first.source, first.turns[0].answer) == (1, "textbook", "b")
    assert (other.line, other.source, other.bad) == (3, "forum", False)
    assert last.line == 4


@pytest.mark.parametrize(
    "content, answer",
    [
        ("<think>\nlong\n</think>\n\nGood.", "Good."),
        ("<think></think>Good.", "Good."),
        ("  Good.\n", "Good."),
        ("<think>a</think>Good. <think>b</think>Still.", "Good. Still."),
    ],
)
def test_strip_removes_thoughts(write_rows, make_row, content, answer):
    (row,) = read(write_rows([make_row("q", content)]))
    assert row.turns == ((None, answer),)
    assert row.messages[-1]["content"] == answer


def test_keep_parses_the_thought_and_leaves_out_an_empty_one(write_rows, make_row):
    path = write_rows([make_row("q", "<think>why</think>Good."), make_row("q", "<think>\n\n</think>\n\nGood.")])
    thoughtful, plain = read(path, "keep")
    assert thoughtful.turns == (("why", "Good."),)
    assert thoughtful.messages[-1]["content"] == "<think>\nwhy\n</think>\n\nGood."
    assert plain.turns == ((None, "Good."),)


@pytest.mark.parametrize(
    "row, reason",
    [
        ("{", "not JSON"),
        ("[1]", "not a JSON object"),
        ('{"metadata": {"source": "textbook", "n": ' + "9" * 5000 + "}}", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"metadata": {"source": "\\ud800"}}', "not UTF-8"),
        ({"messages": [ASKED, ANSWERED]}, "metadata.source missing"),
        ({"instruction": "Why?", "output": "Space."}, "messages missing"),  # its shape first: no source would help
        ({"metadata": {"source": "textbook"}}, "messages missing"),
        ({"metadata": {"source": "textbook"}, "messages": []}, "messages missing"),
        ({"metadata": {"source": "textbook"}, "messages": [ASKED]}, "roles out of order"),
        ({"metadata": {"source": "textbook"}, "messages": [ANSWERED]}, "roles out of order"),
        ({"metadata": {"source": "textbook"}, "messages": [ASKED, ASKED, ANSWERED]}, "roles out of order"),
        ({"metadata": {"source": "textbook"}, "messages": [{"role": "bot", "content": "x"}]}, "unknown role"),
        ({"metadata": {"source": "textbook"}, "messages": [{"content": "x"}]}, "message without a role"),
        ({"metadata": {"source": "textbook"}, "messages": [ASKED, {"role": "assistant"}]}, "message without text"),
        ({"metadata": {"source": "textbook"}, "messages": [ASKED, {"role": "assistant", "content": " "}]}, "empty answer"),
    ],
)
def test_bad_rows_name_their_reason(write_rows, row, reason):
    (dropped,) = read(write_rows([row]))
    assert isinstance(dropped, Dropped) and dropped.bad
    assert (dropped.line, dropped.reason) == (1, reason)


@pytest.mark.parametrize(
    "content, reason",
    [
        ("Good.</think>", "stray </think>"),
        ("<think>a</think></think>Good.", "stray </think>"),
        ("<think>Good.", "unclosed <think>"),
        ("<think>a<think>b</think>Good.", "unclosed <think>"),
        ("<think>only thought</think>", "empty answer"),
    ],
)
@pytest.mark.parametrize("think", ["strip", "keep"])
def test_broken_thoughts(write_rows, make_row, content, reason, think):
    (dropped,) = read(write_rows([make_row("q", content)]), think)
    assert dropped.reason == reason


def test_keep_wants_the_thought_first(write_rows, make_row):
    path = write_rows([make_row("q", "Good. <think>late</think>")])
    assert read(path, "keep")[0].reason == "misplaced <think>"
    assert isinstance(read(path, "strip")[0], Row)


def test_bytes_that_are_not_utf8_and_half_surrogates(tmp_path, make_row):
    path = tmp_path / "rows.jsonl"
    good = json.dumps(make_row("q", "Good.")).encode()
    half = json.dumps(make_row("q", "Good \ud83d")).encode()
    path.write_bytes(b"\xef\xbb\xbf" + good + b"\n" + good.replace(b"Good", b"G\xffd") + b"\n" + half + b"\r\n" + good)
    first, broken, surrogate, last = read(path)
    assert isinstance(first, Row) and isinstance(last, Row), "a byte order mark and a missing last newline are fine"
    assert broken.reason == "not UTF-8" and "0xff" in broken.detail
    assert surrogate.reason == "not UTF-8"


@pytest.mark.parametrize("name", ["missing.jsonl", "."])
def test_a_file_that_cannot_be_read_is_named(tmp_path, name):
    with pytest.raises(ValueError, match="JSONL"):
        read(tmp_path / name)

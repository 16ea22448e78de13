"""Votes and lines that survive a crash."""

import errno
import os

import pytest

from loop.review.lines import append_line, read_lines
from loop.review.votes import Votes
from tests.loop.review.test_pairs import pair_of


def given(token, best="A"):
    return {"token": token * 16, "best": best, "second": None, "tags": {}, "note": ""}


def test_a_line_that_a_crash_cut_short_is_left_out_and_removed(tmp_path):
    path = tmp_path / "lines.jsonl"
    for number in range(3):
        append_line(path, {"number": number, "text": "\u2028 שלום\n"})
    whole = path.read_bytes()
    for cut in range(1, 40):
        path.write_bytes(whole[:-cut])
        assert [line["number"] for line in read_lines(path)] == ([0, 1])
        append_line(path, {"number": 9})
        assert [line["number"] for line in read_lines(path)] == [0, 1, 9]


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"a": 1}\n[1]\n{"b": 2}\n')
    with pytest.raises(ValueError, match=r"lines.jsonl:2: found b'\[1\]', expected a JSON object"):
        read_lines(path)


def test_a_full_disk_leaves_whole_lines(tmp_path, monkeypatch):
    path = tmp_path / "lines.jsonl"
    append_line(path, {"number": 0})

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(os, "fsync", full)
        append_line(path, {"number": 1})
    assert path.read_bytes() == b'{"number": 0}\n'


def test_each_vote_is_on_the_disk_before_it_counts(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(descriptor))
    votes = Votes(tmp_path / "votes.jsonl")
    for number in range(3):
        votes.add(pair_of(number), given(str(number)))
        assert len(synced) == number + 2, "and once the directory, for the new file"


def test_the_last_vote_stands_unless_it_is_taken_back(tmp_path):
    votes, pairs = Votes(tmp_path / "votes.jsonl"), [pair_of(number) for number in range(2)]
    votes.add(pairs[0], given("a"))
    votes.add(pairs[1], given("b", "tie"))
    votes.undo(pairs[0].id)
    votes.undo(pairs[0].id)
    assert list(votes.standing) == [pairs[1].id]
    votes.add(pairs[0], given("c", "C"))
    again = Votes(votes.path)
    assert [(vote["best"], vote["again"]) for vote in again.standing.values()] == [("tie", False), ("C", True)]
    assert list(again.standing) == [pairs[1].id, pairs[0].id] and len(again.lines) == 4

"""No row is too large to be said so, and no template runs for ever."""

import io
import json
import os
import signal
import threading
import time

import pytest

from data import limits
from data.config import DataConfig
from data.limits import MAX_RENDERED, MAX_ROW_BYTES, MAX_TURNS, TooSlow, bounded_lines, time_limit
from data.records import Dropped, Row, read_rows
from data.tokenized import batched


def read(path):
    return list(read_rows(DataConfig(str(path), str(path), ("textbook",)), "train"))


@pytest.mark.parametrize("name", ["pipe", "/dev/zero", "/dev/null"])
def test_only_regular_files_are_read(tmp_path, name):
    """A pipe made every start wait for a writer; /dev/zero filled the memory with one line."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match=f"{name}: not a regular file.*JSONL"):
        read(tmp_path / name)


def test_lines_are_cut_at_the_bound_and_counted_whole(monkeypatch):
    monkeypatch.setattr(limits, "MAX_ROW_BYTES", 10)
    data = b"123456789\n" + b"1234567890\n" + b"\n" + b"x" * 3_000_000 + b"\nend"
    lines = [(line, num_bytes) for line, num_bytes in bounded_lines(io.BytesIO(data))]
    assert lines == [(b"123456789\n", 10), (b"1234567890\n", 11), (b"\n", 1), (b"x" * 11, 3_000_001), (b"end", 3)]


def test_a_row_too_long_is_dropped_in_little_memory_and_the_next_one_read(tmp_path, make_row):
    path = tmp_path / "rows.jsonl"
    good = json.dumps(make_row("a", "b")).encode()
    with open(path, "wb") as file:
        file.write(good + b"\n" + b'{"messages": "')
        file.seek(200 * 2**20, os.SEEK_CUR)  # a hole of zeros
        file.write(b'"}\n' + good + b"\n" + b" " * (MAX_ROW_BYTES - len(good) - 1) + good + b"\n" + b" " * MAX_ROW_BYTES + good)
    before = resident_bytes()
    most = 0
    outcomes = []
    for outcome in read_rows(DataConfig(str(path), str(path), ("textbook",)), "train"):
        outcomes.append(outcome)
        most = max(most, resident_bytes() - before)
    assert [type(outcome) for outcome in outcomes] == [Row, Dropped, Row, Row, Dropped]
    assert [outcome.line for outcome in outcomes] == [1, 2, 3, 4, 5]
    assert outcomes[1].bad and outcomes[1].reason == "row too long"
    assert outcomes[1].detail == f"the line has {200 * 2**20 + 17:,} bytes, allowed are 4,194,304"
    assert most < 64 * 2**20


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_row_of_too_many_turns_is_dropped(write_rows, make_row):
    """A row of 1,000 turns took 52 s and 1.5 GB."""
    most = make_row(*["a", "b"] * MAX_TURNS, system="S")
    more = make_row(*["a", "b"] * (MAX_TURNS + 1))
    row, dropped = read(write_rows([most, more]))
    assert len(row.turns) == MAX_TURNS == 256
    assert dropped.bad and dropped.reason == "too many turns" and dropped.detail == "found 514 messages, allowed are 513"


def test_turns_that_repeat_too_much_text_are_dropped(write_rows, make_row):
    text = "x" * 1000
    row, dropped = read(write_rows([make_row(*[text, "b"] * 129), make_row(*[text, "b"] * 130)]))
    assert row.rendered_characters == 129 * 129 * 1001 < MAX_RENDERED < 130 * 130 * 1001
    assert dropped.bad and dropped.reason == "row too long" and dropped.detail == (
        "130 turns repeat up to 16,916,900 characters, allowed are 16,777,216")


def test_batches_are_shorter_where_rows_are_long(write_rows, make_row):
    long = make_row("x" * 3_000_000, "b")
    rows = [make_row("a", "b")] * 600 + [long] * 7
    batches = list(batched(read_rows(DataConfig(path := str(write_rows(rows)), path, ("textbook",)), "train")))
    assert [len(batch) for batch in batches] == [128, 128, 128, 128, 94, 1]


@pytest.mark.parametrize("line", ["[" * 100_000, '{"a":' * 100_000, "9" * 1_000_000, "-" + "9" * 1_000_000,
                                  '{"a": "' + "x" * MAX_ROW_BYTES])
def test_json_that_is_deep_or_endless_is_a_bad_row(write_rows, line):
    (dropped,) = read(write_rows([line]))
    assert dropped.bad and dropped.reason in ("not JSON", "row too long") and len(dropped.detail) < 200


def test_json_just_below_the_deepest_is_no_traceback(write_rows):
    """What the parser still takes may be too deep to be shown in the message."""
    right = '"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]'
    rows = [key % ("[" * depth + "]" * depth) for depth in range(850, 1000)
            for key in ('{"metadata": %s, ' + right + "}", '{"messages": %s, "metadata": {"source": "textbook"}}')]
    reasons = {dropped.reason for dropped in read(write_rows(rows))}
    assert reasons == {"not JSON", "metadata.source missing", "message without a role"}


# The time limit


def work(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_the_limit_ends_work_and_leaves_no_trace():
    def other(*_):
        raise AssertionError

    before = signal.signal(signal.SIGPROF, other)
    try:
        for _ in range(2):
            with pytest.raises(TooSlow), time_limit(0.1):
                work(60)
            with time_limit(0.1):
                pass
            assert signal.getsignal(signal.SIGPROF) is other and signal.getitimer(signal.ITIMER_PROF) == (0, 0)
        work(0.2)
    finally:
        signal.signal(signal.SIGPROF, before)


def test_the_time_starts_anew_and_waiting_does_not_count():
    with time_limit(0.3) as start_anew:
        time.sleep(0.5)
        for _ in range(4):
            work(0.15)
            start_anew()


@pytest.mark.slow
def test_an_exception_that_is_caught_comes_again():
    start = time.process_time()
    with pytest.raises(TooSlow), time_limit(0.1):
        try:
            work(60)
        except Exception:
            pass
        work(60)
    assert time.process_time() - start < 10


def test_threads_have_no_limit():
    done = []
    thread = threading.Thread(target=lambda: done.append(limited()))

    def limited():
        with time_limit(0.01) as start_anew:
            start_anew()
            work(0.1)
        return True

    thread.start()
    thread.join(60)
    assert done == [True]


def test_a_wakeup_descriptor_is_no_hindrance():
    """A program that wants to hear of signals in a thread sets one; each signal then writes a byte."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = signal.set_wakeup_fd(writing)
    try:
        with pytest.raises(TooSlow), time_limit(0.1):
            work(60)
        assert os.read(reading, 10)[0] == signal.SIGPROF
    finally:
        signal.set_wakeup_fd(before)
        os.close(reading)
        os.close(writing)

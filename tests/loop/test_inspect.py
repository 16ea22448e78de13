"""The audit's commands, as a user runs them."""

import json
import sys

import pytest

from loop import inspect


@pytest.fixture
def run_inspect(write_config, monkeypatch, capsys):
    def run(*arguments, **changes):
        monkeypatch.setattr(sys, "argv", ["inspect", "--config", str(write_config(**changes)), *arguments])
        inspect.main()
        return capsys.readouterr().out

    return run


def test_numbers_and_colour(run_inspect, tmp_path):
    shown = run_inspect("--rows", "2", "--html", str(tmp_path / "page.html"), "data.sources=book")
    assert "train / book: 20 rows read, 20 kept" in shown and "dropped 20: source not in data.sources" in shown
    assert shown.count("\033[1;32mIt eyes") == 2
    assert (tmp_path / "page.html").read_text().count("<mark>It eyes") == 2


def test_json_and_dump(run_inspect, tmp_path):
    dump = tmp_path / "dump.jsonl"
    report = json.loads(run_inspect("--json", "--dump", str(dump)))
    assert report["sources"]["book"]["rows"] == 26 and report["sources"]["book"]["dropped"] == {}
    lines = [json.loads(line) for line in dump.read_text().splitlines()]
    numbered = [("train", i + 1) for i in range(40)] + [("eval", i + 1) for i in range(12)]
    assert [(line["split"], line["line"]) for line in lines] == numbered
    total = sum(counts["supervised_tokens"] for counts in report["sources"].values())
    assert sum(sum(line["supervised"]) for line in lines) == total
    assert all(len(line["ids"]) == len(line["supervised"]) and set(line["supervised"]) == {0, 1} for line in lines)


def test_every_bad_row_of_both_files_is_listed(run_inspect, tmp_path, write_rows, make_row):
    """A run refuses them; the audit goes on, so that all are seen at once."""
    train = write_rows([make_row("a", "b"), "{", "[]", make_row("a", "word " * 400)], "mine.jsonl")
    held_out = write_rows([make_row("a", "b"), make_row("a", "<think>")], "held-out.jsonl")
    data = [f"data.train={train}", f"data.eval={held_out}", "data.sources=textbook", "data.max_tokens=100"]
    shown = run_inspect("--rows", "0", *data)
    assert "3 train row(s) cannot be trained on, a run refuses them; data.bad_rows=skip and data.overlong=drop" in shown
    for found in (f"{train}:2: not JSON: ", f"{train}:3: not a JSON object: ", f"{train}:4: over max_tokens: ",
                  "1 eval row(s)", f"{held_out}:2: unclosed <think>: "):
        assert found in shown
    problems = json.loads(run_inspect("--json", *data))["problems"]
    assert [row["line"] for row in problems["train"]] == [2, 3, 4] and problems["eval"][0]["reason"] == "unclosed <think>"
    shown = run_inspect("--rows", "0", *data, "data.bad_rows=skip", "data.overlong=drop")
    assert "3 train row(s) cannot be trained on, they are left out:" in shown

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

"""Answers of a real run, written once: begun, killed, continued; and the command from there to the verdict."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from loop.checkpoint import find_checkpoint
from loop.config import load_config
from loop.review.__main__ import parse_arguments
from loop.review.answers import ANSWERS, HeldOut, Source, asked_engine, held_out_rows, write_review
from loop.review.checks import BOARD_CHECKS
from loop.review.engine import find_stockfish
from loop.review.lines import read_lines
from loop.review.pairs import begin, directory_of, open_review, shuffled
from loop.run import run_config
from tests.loop.review.made import ROOT, Served
from tests.loop.review.made import comment as made_comment
from tests.loop.review.made import row as made_row

pytestmark = pytest.mark.slow


@pytest.fixture
def source(finished_run, tmp_path):
    """A copy of a finished run, to write into."""
    run_dir = tmp_path / "checkpoints/tiny"
    shutil.copytree(finished_run, run_dir)
    config = load_config(run_dir / "config.yaml")
    begin(run_dir / "review", config.review)
    return Source(run_dir, "best")


def test_answers_are_written_once_and_the_rest_after_a_kill(source, capfd):
    directory = source.run_dir / "review"
    write_review(directory, [source], 4, 12)
    written = (directory / ANSWERS).read_bytes()
    lines = read_lines(directory / ANSWERS)
    assert len(lines) == len({line["key"] for line in lines}) == 8
    first = (directory / "review.json").read_bytes()
    pairs = open_review(source.run_dir).pairs
    assert [pair.line for pair in pairs.values()] == [1, 4, 7, 10] and all(len(pair.order) == 3 for pair in pairs.values())
    capfd.readouterr()

    write_review(directory, [source], 4, 12)
    assert (directory / ANSWERS).read_bytes() == written and (directory / "review.json").read_bytes() == first
    assert "answer" not in capfd.readouterr().err, "no model was built"

    (directory / ANSWERS).write_bytes(written[:-9])  # killed within the last line
    write_review(directory, [source], 4, 12)
    assert (directory / ANSWERS).read_bytes() == written and (directory / "review.json").read_bytes() == first
    assert "1/1" in capfd.readouterr().err

    write_review(directory, [source], 4, 5)  # other settings are other answers
    assert len(read_lines(directory / ANSWERS)) == 16
    assert not open_review(source.run_dir).pairs.keys() & pairs.keys()


def test_votes_and_verdict_stay_whatever_is_reviewed_next(source):
    """A review with a second run, or of another checkpoint, replaced what votes had been given to, and broke the verdict."""
    first, both = directory_of(source.run_dir), directory_of(source.run_dir, source.run_dir / "../second/")
    write_review(first, [source], 3, 8)
    written = (first / "review.json").read_bytes()
    (first / "votes.jsonl").write_text('{"pair": "x"}\n')
    number = int(source.path.name[5:])
    for num_rows, max_tokens in ((2, 8), (3, 7)):
        with pytest.raises(ValueError, match=rf"{number:08}, 3 rows, answers of at most 8 tokens; asked for is .*{number:08}, "
                                             rf"{num_rows} rows, answers of at most {max_tokens} tokens. Choose the same"):
            write_review(first, [source], num_rows, max_tokens)
    begin(both, source.config.review)
    write_review(both, [source, source], 3, 8)
    write_review(first, [source], 3, 8)
    assert both.name == "review-second" and len(read_lines(first / ANSWERS)) == 6, "no answer is written twice"
    assert (first / "review.json").read_bytes() == written
    assert all(len(pair.order) == 4 for pair in open_review(source.run_dir, Path("elsewhere/second")).pairs.values())


def test_another_checkpoint_is_another_key(source):
    other = Source(source.run_dir, "newest")
    other.adapter = "0" * 64
    assert source.key([1, 2], 9, tuned=True) != other.key([1, 2], 9, tuned=True)
    assert source.key([1, 2], 9, tuned=False) == other.key([1, 2], 9, tuned=False)
    assert source.key([1, 2], 9, tuned=False) != source.key([1, 2], 9, tuned=True) != source.key([1, 3], 9, tuned=True)


def test_checkpoints_by_name(finished_run):
    newest = find_checkpoint(finished_run, "newest")
    assert find_checkpoint(finished_run, str(int(newest.name[5:]))) == newest
    for which, problem in (("999", "step-00000999: no such checkpoint, there are: "), ("last", "expected best, newest, or")):
        with pytest.raises(ValueError, match=problem):
            find_checkpoint(finished_run, which)


def test_rows_are_spread_evenly_and_those_with_a_position_come_first(source, capfd):
    assert [row.row.line for row in held_out_rows(source.config, 5)] == [1, 3, 5, 8, 10]
    capfd.readouterr()
    assert len(held_out_rows(source.config, 500)) == 12
    assert "eval.jsonl: 12 of 12 rows are compared, those of one question and one answer" in capfd.readouterr().out


@pytest.mark.skipif(find_stockfish() is None, reason="Stockfish is not here (Debian: stockfish)")
def test_stockfish_is_asked_once_and_its_verdict_is_kept(tmp_path, capfd):
    mate = made_row(0, "r1bqkbnr/pppp1ppp/2n5/4p2Q/2B1P3/8/PPPP1PPP/RNB1K1NR w KQkq - 4 4", "h5e5")
    rows = [HeldOut(None, mate), HeldOut(None, {"messages": [{"role": "user", "content": "Hello?"}]})]
    found, none = asked_engine(tmp_path, rows)
    assert none is None and found["verdict"]["best"] == "h5f7" and found["verdict"]["before_cp"] == 9_999
    assert "1/1" in capfd.readouterr().err
    assert asked_engine(tmp_path, rows) == [found, None] and "move" not in capfd.readouterr().err
    comments = {"base": made_comment("Qxe5+ is the best move."), "reference": made_comment("Qxf7# was mate.")}
    pair, without = shuffled(bytes(32), 1, mate, comments, found), shuffled(bytes(32), 1, mate, comments)
    assert pair.id == without.id and "false_best" in {flag.check for flag in pair.flags["base"]} and not without.strength_text
    assert pair.strength_text.startswith("Stockfish") and ", for White: mate in 1 with the best move, " in pair.strength_text
    assert "false_best" not in BOARD_CHECKS, "what only an engine knows is counted apart"


def run_command(run_dir, *options):
    command = [sys.executable, "-m", "loop.review", str(run_dir), *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, env=environment)


def test_from_a_finished_run_to_a_verdict(source):
    run_dir = source.run_dir
    write_review(run_dir / "review", [source], 3, 8)
    with Served(run_dir) as served:
        served.log_in()
        for number, pair in enumerate(served.json("pairs")["pairs"]):
            found = served.json(f"pair/{pair['id']}")
            assert found["board"] == "", "these rows have no position"
            told = served.json("vote", {"pair": pair["id"], "token": f"{number:016}", "best": "A", "second": None, "tags": {},
                                        "note": ""})["told"]
            assert len(told) == 3
        lines = served.json("verdict", {})["lines"]
        assert lines[0].startswith("NO GO") and any("FAILS: at least 40 votes: 3 of 3" in line for line in lines)
    assert (run_dir / "review/report.html").stat().st_size > 2000
    done = run_command(run_dir, "--verify")
    assert done.returncode == 0 and "The verdict holds" in done.stdout, done.stdout + done.stderr
    template = next(key for key in json.loads((run_dir / "review/verdict.json").read_text())["seal"] if "template of" in key)
    assert "llama" in template
    file = next(run_dir.glob("step-*/adapter_model.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    done = run_command(run_dir, "--verify")
    assert done.returncode == 1 and re.search(r"adapter_model.safetensors: was changed", done.stdout)


def test_wrong_runs_are_named(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_dir = Path("checkpoints/tiny")
    for wrong in (Path("checkpoints"), Path("nope"), source.path):
        with pytest.raises(ValueError, match=f"{wrong}: no run there. .*; those in checkpoints: checkpoints/tiny$"):
            run_config(wrong, [])
    assert run_config(run_dir, ["run=other"]).run == "other"
    monkeypatch.setattr("sys.argv", ["loop.review", "checkpoints/tiny", "checkpoints/../checkpoints/tiny/"])
    with pytest.raises(ValueError, match="RUN and RUN2 are both checkpoints/tiny"):
        parse_arguments()


@pytest.mark.parametrize("options, problem", [
    (["--rows", "0"], "--rows is 0, expected at least 1"), (["--port", "70000"], "--port is 70000"),
    (["--set", "review.least_votes=0"], "review.least_votes is 0, expected 1 to"), (["--verify"], "no review there"),
    (["--checkpoint", "x"], "--checkpoint is 'x'"), (["."], "no run there"),
])
def test_mistakes_are_named_in_one_line(source, options, problem):
    done = run_command(source.run_dir, "--no-browser", *options)
    assert done.returncode == 2 and problem in done.stderr and done.stderr.count("\n") == 1, done.stderr

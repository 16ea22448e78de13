"""The verdict against scipy on tables made by hand, and the seal that breaks when anything changes."""

import json
from html.parser import HTMLParser

import pytest

from loop.config import ReviewConfig
from loop.review.__main__ import verify
from loop.review.pairs import open_review
from loop.review.report import write_report
from loop.review.seal import one_line
from loop.review.verdict import as_lines, compared, conclude, judgement, outcome, phase, share
from loop.review.votes import Votes
from tests.loop.review.made import PAYLOADS, row, write_made
from tests.loop.review.test_pairs import pair_of

stats = pytest.importorskip("scipy.stats")
LETTERS = {"A": "tuned", "B": "base", "C": "reference"}


def vote(best, second=None):
    return {"best": best, "second": second, "systems": LETTERS, "tags": {}, "again": False}


@pytest.mark.parametrize("best, second, first, other, expected", [
    ("A", None, "tuned", "base", 1), ("B", None, "tuned", "base", -1), ("C", None, "tuned", "base", 0),
    ("C", "A", "tuned", "base", 1), ("C", "B", "tuned", "base", -1), ("A", "B", "tuned", "base", 1),
    ("tie", None, "tuned", "base", 0), ("bad", None, "tuned", "base", 0), ("C", "B", "tuned", "reference", -1),
    ("B", "A", "tuned", "reference", 1), ("B", None, "tuned", "reference", 0),
])
def test_what_a_vote_says_of_two_systems(best, second, first, other, expected):
    assert outcome(vote(best, second), first, other) == expected
    assert outcome(vote(best, second), other, first) == -expected


@pytest.mark.parametrize("won, lost, even", [(0, 0, 7), (1, 0, 0), (5, 0, 3), (9, 3, 1), (30, 15, 5), (15, 30, 0), (9, 9, 9)])
def test_counts_equal_scipys(won, lost, even):
    votes = [vote("A")] * won + [vote("B")] * lost + [vote("C")] * even
    found = compared(votes, "tuned", "base")
    assert (found["won"], found["lost"], found["even"]) == (won, lost, even)
    # the binomial tail, as the sign test is defined
    assert found["p"] == pytest.approx(stats.binom.sf(won - 1, won + lost, 0.5), abs=1e-12)
    assert found == {**found, **share(won, won + lost)}


@pytest.mark.parametrize("number, of", [(0, 10), (3, 10), (10, 10), (47, 50), (1, 1)])
def test_intervals_are_wilsons(number, of):
    z, p = stats.norm.ppf(0.975), number / of
    middle, half = (p + z * z / 2 / of), z * (p * (1 - p) / of + z * z / 4 / of / of) ** 0.5
    found = share(number, of)
    assert found["low"] == pytest.approx(max(0, (middle - half) / (1 + z * z / of)), abs=1e-9)
    assert found["high"] == pytest.approx(min(1, (middle + half) / (1 + z * z / of)), abs=1e-9)


def test_phases_by_move_number_and_material():
    fens = {"opening": "r1bqkbnr/pppp1ppp/2n5/4p3/4P3/5N2/PPPP1PPP/RNBQKB1R w KQkq - 2 3",
            "middlegame": "r1bqkbnr/pppp1ppp/2n5/4p3/4P3/5N2/PPPP1PPP/RNBQKB1R w KQkq - 2 13",
            "endgame": "8/4k3/8/8/8/2p5/1P2K3/8 w - - 0 9"}
    moves = {"opening": "f1b5", "middlegame": "f1b5", "endgame": "b2c3"}
    assert {name: phase(pair_of(fen=fen, move=moves[name])) for name, fen in fens.items()} == {name: name for name in fens}


GOOD, WRONG = "A developing move.", "The queen on a6 gives checkmate."  # no queen stands there


def made(tmp_path, tuned=GOOD, votes=6, best="tuned", rules=ReviewConfig(least_votes=5), number=8):
    """A review of 8 rows with votes."""
    rows = [row(at, classification=("good", "mistake")[at % 2]) for at in range(number)]
    review = write_made(tmp_path / "run", [(WRONG, tuned)] * number, rules, rows)
    given = Votes(review.directory / "votes.jsonl")
    for at, pair in enumerate(list(review.pairs.values())[:votes]):
        letter = {system: letter for letter, system in pair.by_letter.items()}
        given.add(pair, {"token": f"{at:016}", "best": letter[best], "second": None, "tags": {letter["base"]: ["wrong fact"]},
                         "note": ""})
    return review, given


def test_a_go_needs_every_rule(tmp_path):
    found = judgement(*made(tmp_path))
    assert found["go"] and [rule["holds"] for rule in found["rules"]] == [True] * 3
    assert found["checks"]["base"]["wrong"] == 8 and found["checks"]["tuned"]["wrong"] == 0
    assert found["phases"]["opening"]["won"] == 6
    by_class = {key: (one["pairs"], one["won"]) for key, one in found["classifications"].items()}
    assert by_class == {"good": (4, 3), "mistake": (4, 3)}
    assert found["tags"]["base"]["wrong fact"] == 6


@pytest.mark.parametrize("changes, failing", [({"votes": 4}, [0, 1]), ({"best": "base"}, [1]), ({"best": "reference"}, [1]),
                                              ({"tuned": WRONG}, [2]), ({"votes": 0}, [0, 1])])
def test_each_rule_can_fail(tmp_path, changes, failing):
    found = judgement(*made(tmp_path, **changes))
    assert not found["go"] and [at for at, rule in enumerate(found["rules"]) if not rule["holds"]] == failing


def verified(run_dir, capsys):
    """Exit status and lines of --verify."""
    status = 0
    try:
        verify(run_dir)
    except SystemExit as stop:
        status = stop.code
    return status, capsys.readouterr().out


CHANGES = {
    "7/adapter_model.safetensors": lambda run: replace(run / "step-00000007/adapter_model.safetensors", "weights", "weighty"),
    "eval.jsonl:3": lambda run: replace(run / "eval.jsonl", "White plays 3. Bb5 (2)", "White plays 3. Bb5 (x)"),
    "votes.jsonl": lambda run: replace(run / "review/votes.jsonl", "0000000000000003", "0000000000000009"),
    "review.json": lambda run: replace(run / "review/review.json", GOOD, "A move."),
    "config.yaml": lambda run: replace(run / "config.yaml", "made", "mine"),
    "rules.json": lambda run: replace(run / "review/rules.json", "5", "4"),
    "go is False, computed again True": lambda run: replace(run / "review/verdict.json", '"go": true', '"go": false'),
}


def replace(file, old, new):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize("named", CHANGES)
def test_whatever_changes_breaks_the_seal_and_is_named(tmp_path, capsys, named):
    review, votes = made(tmp_path)
    conclude(review, votes, "Tester")
    status, said = verified(tmp_path / "run", capsys)
    assert status == 0 and "The verdict holds" in said and "GO: all rules hold." in said and "by Tester on 20" in said
    CHANGES[named](tmp_path / "run")
    status, said = verified(tmp_path / "run", capsys)
    problems = said.split("The verdict no longer holds:\n")[1].splitlines()
    assert status == 1 and any(named in problem for problem in problems), said
    if named.endswith(("tensors", ":3", ".yaml")):
        assert len(problems) == 1, "and nothing else is"


def test_later_votes_and_missing_checkpoints_break_the_seal(tmp_path, capsys):
    review, votes = made(tmp_path)
    conclude(review, votes, None)
    last = list(review.pairs.values())[-1]
    votes.add(last, {"token": "z" * 16, "best": "A", "second": None, "tags": {}, "note": ""})
    (tmp_path / "run/step-00000007").rename(tmp_path / "run/elsewhere")
    status, said = verified(tmp_path / "run", capsys)
    assert status == 1 and "votes.jsonl: was changed" in said and "verdict.json: votes is 6, computed again 7" in said
    assert "adapter_model.safetensors: is not there any more" in said


def test_a_verdict_without_all_its_parts_is_named(tmp_path):
    conclude(*made(tmp_path), None)
    (tmp_path / "run/review/verdict.json").write_text('{"go": true, "date": "today"}')
    with pytest.raises(ValueError, match="review/verdict.json: without again, .*, votes: damaged, or"):
        verify(tmp_path / "run")


def test_votes_that_name_neither_model_are_said(tmp_path):
    review, votes = made(tmp_path, best="reference")
    last = list(review.pairs.values())[-1]
    votes.add(last, {"token": "z" * 16, "best": "tie", "second": None, "tags": {}, "note": ""})
    found = conclude(review, votes, None)
    assert found["unsaid"] == 6 and found["comparisons"][0]["even"] == 7
    assert "votes with neither tuned nor untuned as best or second best: 6. They count as even." in as_lines(found)


def test_earlier_looks_are_counted(tmp_path):
    review, votes = made(tmp_path, votes=5)
    assert conclude(review, votes, None)["looks"] == conclude(review, votes, None)["looks"] == 0
    last = list(review.pairs.values())[-1]
    votes.add(last, {"token": "z" * 16, "best": "A", "second": None, "tags": {}, "note": ""})
    assert conclude(review, votes, None)["looks"] == 1


def test_the_report_stands_alone_and_is_escaped(tmp_path):
    review = write_made(tmp_path / "run", [(text, GOOD) for text in PAYLOADS])
    votes = Votes(review.directory / "votes.jsonl")
    votes.add(list(review.pairs.values())[0], {"token": "z" * 16, "best": "A", "second": "B", "tags": {"A": ["great"]},
                                               "note": "<b>bold</b>"})
    page = write_report(review, votes, conclude(review, votes, "<i>Eve</i>")).read_text()
    tags, handlers = set(), []
    parser = HTMLParser()

    def see(tag, attributes):
        tags.add(tag)
        handlers.extend(name for name, value in attributes if name.startswith("on") or "src" in name
                        or "href" in name and not value.startswith("#"))

    parser.handle_starttag = see
    parser.feed(page)
    assert not tags & {"script", "img", "template", "b", "i", "iframe", "link", "object"} and not handlers
    assert page.index("Content-Security-Policy") < page.index("<title>")
    assert page.count("<main>") == len(PAYLOADS) and page.count("<svg xmlns") == len(PAYLOADS)
    assert "&lt;b&gt;bold&lt;/b&gt;" in page and "NO GO" in page and "A is best" in page


def test_the_line_for_the_next_run(tmp_path):
    review, votes = made(tmp_path)
    assert one_line(tmp_path / "run").startswith("no verdict on ")
    conclude(review, votes, "Tester")
    assert ": GO, 6 votes by Tester on 20" in one_line(tmp_path / "run")
    (review.directory / "verdict.json").write_text(json.dumps({"go": 1}))
    assert one_line(tmp_path / "run").startswith("no verdict on ")
    assert open_review(tmp_path / "run").pairs.keys() == review.pairs.keys()

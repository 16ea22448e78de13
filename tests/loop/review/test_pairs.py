"""Shuffled letters, and what of a comment the board can show."""

import os
import re
import stat
from itertools import permutations

import chess
import pytest

from loop.config import ReviewConfig
from loop.review.pairs import SHOWN, begin, keyed, shuffled
from tests.loop.review.made import comment, row

SECRET = bytes(range(32))


def pair_of(number=0, secret=SECRET, text="Nf3 was played.", **more):
    comments = {"base": comment("A move."), "tuned": comment(text), "reference": comment("Good.")}
    return shuffled(secret, number, row(number, **more), comments)


def test_the_position_of_a_letter_tells_nothing():
    """Chi-square over 1,000 rows: each of the 6 orders, each system under each letter, and a row beside the one before."""
    scipy = pytest.importorskip("scipy.stats")
    orders = [pair_of(number).order for number in range(1000)]
    every = list(permutations(("base", "tuned", "reference")))
    assert scipy.chisquare([orders.count(order) for order in every]).pvalue > 0.01
    for place in range(3):
        counts = [sum(order[place] == system for order in orders) for system in every[0]]
        assert scipy.chisquare(counts).pvalue > 0.01
    followed = [[sum(pair == (a, b) for pair in zip(orders, orders[1:])) for b in every] for a in every]
    assert scipy.chi2_contingency(followed).pvalue > 0.01


def test_the_order_needs_the_secret_and_stays():
    assert pair_of().order == pair_of().order
    others = [pair_of(number, secret=bytes(32)).order == pair_of(number).order for number in range(300)]
    assert 25 < sum(others) < 85, "a sixth are equal by chance"


def test_other_comments_make_another_pair():
    assert len({pair_of().id, pair_of(text="Nf3.").id, pair_of(1).id, pair_of(secret=bytes(32)).id}) == 4


def test_the_secret_is_read_by_its_owner_alone_and_stays(tmp_path):
    begin(tmp_path, ReviewConfig())
    first = (tmp_path / "secret").read_text()
    begin(tmp_path, ReviewConfig())
    assert (tmp_path / "secret").read_text() == first and len(bytes.fromhex(first)) == 32
    assert stat.S_IMODE(os.stat(tmp_path / "secret").st_mode) == 0o600
    assert keyed(bytes.fromhex(first), "link") != keyed(SECRET, "link")


def test_rules_may_change_until_there_are_votes(tmp_path):
    begin(tmp_path, ReviewConfig())
    begin(tmp_path, ReviewConfig(least_votes=20))
    (tmp_path / "votes.jsonl").write_text('{"pair": "x"}\n')
    begin(tmp_path, ReviewConfig(least_votes=20))
    with pytest.raises(ValueError, match="review.least_votes was 20, is 10. Go on with --set review.least_votes=20, or"):
        begin(tmp_path, ReviewConfig(least_votes=10))


def test_moves_and_squares_of_a_comment_are_found():
    """The row: 3. Bb5 after 1. e4 e5 2. Nf3 Nc6."""
    text = "Bb5 hits c6; O-O, Nf6 or a7-a6 come next. Not Qh9, e9 or xNc3, nor Rd5."
    parts = pair_of(text=text).parts(text)
    assert "".join(words for words, _ in parts) == text
    assert {words: shown for words, shown in parts if shown} == {
        "Bb5": "f1b5", "c6": "c6", "Nf6": "+g8f6", "a7-a6": "a7a6", "Rd5": "d5"}  # White castles later, Rd5 is no legal move
    assert all(SHOWN.fullmatch(shown) for _, shown in parts if shown)


def test_every_board_can_be_drawn():
    pair = pair_of(fen="8/4k3/8/8/8/2p5/1P2K3/8 b - - 0 40", move="c3b2")
    drawn = [pair.board_svg(shown) for shown in ("", "b2", "c3b2", "+b2b1")]
    assert len(set(drawn)) == 4 and all(svg.startswith("<svg") for svg in drawn)
    rings = ["<circle" in re.sub(r"<defs>.*</defs>", "", svg) for svg in drawn]
    assert rings == [False, True, False, False], "a square's piece stays in sight"
    assert pair.board_text().startswith("Black plays cxb2, the arrow from c3 to b2. Position: 8/4k3")
    assert pair.position[0].turn == chess.BLACK


def test_a_row_without_a_position_is_text_only():
    pair = shuffled(SECRET, 1, {"messages": [{"role": "user", "content": "Knight to f3?"}], "metadata": {}},
                    {"base": comment("Nf3 e5"), "reference": comment("Yes.")})
    assert pair.parts("Nf3 e5") == [("Nf3 e5", "")] and pair.board_text() == ""

"""The checks that need Stockfish, and those of strength with verdicts made up."""

import re

import pytest

chess = pytest.importorskip("chess")

from loop.review import engine  # noqa: E402
from loop.review.comment import Comment  # noqa: E402
from loop.review.strength import Verdict, false_best, false_mistake, false_only, false_winning  # noqa: E402
from tests.loop.review.by_hand import BY_HAND, after, comment_by_hand, count_flags  # noqa: E402

needs_stockfish = pytest.mark.skipif(engine.find_stockfish() is None, reason="needs Stockfish: apt-get install stockfish")
RUY = "e4 e5 Nf3 Nc6 Bb5"
BEST = dict(best="Bb5", before=0.54, after=0.54, other=0.44)
EQUALLED = dict(best="Bb5", before=0.54, after=0.54, other=0.53)
BLUNDER = dict(best="d4", before=0.55, after=0.25, other=0.55)
AHEAD = dict(best="Bb5", before=0.8, after=0.8, other=0.44)


@pytest.mark.parametrize("check, text, quote, false_by, true_by", [
    (false_best, "This is the best move.", "the best move", BLUNDER, BEST),
    (false_best, "Simply White's strongest choice here!", "White's strongest choice", BLUNDER, EQUALLED),
    (false_only, "Bb5 is the only move.", "the only move", EQUALLED, BEST),
    (false_mistake, "A terrible mistake: nothing works any more.", "A terrible mistake", BEST, BLUNDER),
    (false_winning, "White is winning.", "White is winning", BEST, AHEAD),
    (false_winning, "Black is already lost.", "Black is already lost", BEST, AHEAD),
    (false_winning, "The bishop wins a knight.", "wins a knight", BEST, AHEAD),
])
def test_what_is_said_of_strength_is_compared_with_the_verdict(check, text, quote, false_by, true_by):
    board, move = after(RUY)

    def flags(words, verdict):
        values = {**verdict, "best": board.parse_san(verdict["best"])}
        return [(flag.check, flag.quote) for flag in
                check(Comment(words, board, move), Verdict(line="", before_cp=0, after_cp=0, **values))]

    assert flags(text, false_by) == [(check.__name__, quote)] and flags(text, true_by) == []
    for words in ("Was it the best move, the only move, or a mistake?", "If Black errs, White is winning.", "Black's mistake.",
                  "The best move was 3.d4.", "The only move that Black fears is 4.Bxc6.", "A mistake would be 3.Nxe5.",
                  "White is winning back the pawn.", "Not the best move."):
        assert flags(words, false_by) == []


def test_a_missing_stockfish_is_named_with_what_is_left_out(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(engine, "DEBIAN", str(tmp_path))
    assert engine.find_stockfish() is None
    with pytest.raises(ValueError, match="false_best, false_only, false_mistake, false_winning.*apt-get install stockfish"):
        engine.Stockfish()


@needs_stockfish
@pytest.mark.slow
def test_the_same_question_gets_the_same_answer_in_any_order():
    places = [after(RUY), after("e4 e5 Qh5 Nc6 Bc4 Nf6"), after("e4 e5 Nf3 Nc6 Bc4 Nf6 Ng5 d5 exd5 Nxd5")]
    with engine.Stockfish(nodes=20_000) as stockfish:
        first = [stockfish.verdict(*place) for place in places]
        second = [stockfish.verdict(*place) for place in reversed(places)][::-1]
    with engine.Stockfish(nodes=20_000) as stockfish:
        third = [stockfish.verdict(*place) for place in places]
    assert first == second == third
    assert first[1].after < 0.01 and first[1].before > 0.4 and first[1].after_cp <= -9_000, "4.Qxf7 is mate"


@needs_stockfish
@pytest.mark.slow
def test_games_that_are_over_and_single_moves_have_verdicts():
    with engine.Stockfish(nodes=5_000) as stockfish:
        mate = stockfish.verdict(*after("e4 e5 Qh5 Nc6 Bc4 Nf6 Qxf7#"))
        board = chess.Board("7k/8/6K1/8/8/8/5Q2/8 w - - 0 1")
        stalemate = stockfish.verdict(board, board.parse_san("Qf7"))
        forced = stockfish.verdict(*after("e4 e5 Nf3 Nc6 Bb5 Nf6 O-O Nxe4 d4 Nd6 Bxc6 dxc6 dxe5 Nf5 Qxd8+ Kxd8"))
    assert mate.after == mate.before > 0.99 and mate.best == chess.Move.from_uci("h5f7") and mate.line.startswith("4. Qxf7#")
    assert stalemate.after == 0.5 and stalemate.before > 0.99 and stalemate.after_cp == 0
    assert forced.other is None and forced.before == forced.after


@needs_stockfish
@pytest.mark.slow
def test_nineteen_of_twenty_flags_are_right():
    with engine.Stockfish() as stockfish:
        words = re.compile("best|strongest|only|mistake|blunder|win|lost|losing")  # other comments say nothing of strength
        places = {(row["fen"], row["move_uci"]) for row in BY_HAND if words.search(row["text"].lower())}
        verdicts = {(fen, uci): stockfish.verdict(chess.Board(fen), chess.Move.from_uci(uci)) for fen, uci in sorted(places)}
    _, sums, false_alarms = count_flags(
        lambda row: engine.judge_strength(comment_by_hand(row), verdicts[row["fen"], row["move_uci"]])
        if words.search(row["text"].lower()) else [], engine.ENGINE_CHECKS)
    assert sums["right"] >= 0.95 * sums["flags"], "\n".join(false_alarms)
    assert sums["flags"] >= 20 and sums["missed"] <= 5

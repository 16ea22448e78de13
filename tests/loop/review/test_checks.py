"""The checks of comments: judged on comments whose truth was written by hand, and on rows that are true by construction."""

import json
import random
import statistics
import time
from pathlib import Path

import pytest

chess = pytest.importorskip("chess")

from data.demo import __main__ as demo  # noqa: E402
from loop.review import checks, engine  # noqa: E402
from loop.review.checks import CHECKS, Comment, judge, normalized, position_of, without_thought  # noqa: E402
from loop.review.comment import parsed  # noqa: E402
from tests.loop.review.by_hand import BY_HAND, after, comment_by_hand, count_flags  # noqa: E402

DEMO = Path(demo.__file__).parent
OTHER = "other"     # wrong in a way for which there is no check


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def demo_answers():
    return frozenset(normalized(row["messages"][-1]["content"]) for row in read(DEMO / "train.jsonl"))


def test_the_comments_by_hand_are_what_they_should_be():
    known = {*CHECKS, *engine.ENGINE_CHECKS, OTHER}
    assert len(BY_HAND) >= 200 and sum(not row["wrong"] for row in BY_HAND) >= 90
    for row in BY_HAND:
        assert chess.Board(row["fen"]).is_legal(chess.Move.from_uci(row["move_uci"])), row
        assert all(name in known and words in row["text"] for name, words in row["wrong"]), row
    assert len({row["text"] for row in BY_HAND}) > 0.98 * len(BY_HAND)


def test_nineteen_of_twenty_flags_are_right():
    trained_on = demo_answers()
    _, sums, false_alarms = count_flags(lambda row: judge(comment_by_hand(row, trained_on)), CHECKS)
    assert sums["right"] >= 0.95 * sums["flags"], "\n".join(false_alarms)
    assert sums["flags"] >= 270, "checks that flag nothing are right, too"
    assert sums["missed"] <= 0.12 * (sums["right"] + sums["missed"])


def test_of_two_comments_with_an_error_more_than_one_is_flagged():
    wrong = [row for row in BY_HAND if row["wrong"]]
    found = sum(bool(judge(comment_by_hand(row, demo_answers()))) for row in wrong[::4])
    assert found > 0.8 * len(wrong[::4])


def share_flagged(rows):
    flagged = [flag for row in rows for answer in row["messages"] if answer["role"] == "assistant"
               for flag in judge(Comment(without_thought(answer["content"]), *position_of(row), row["metadata"]))[:1]]
    return len(flagged) / len(rows), flagged


def test_the_demo_references_are_not_flagged():
    share, flagged = share_flagged(read(DEMO / "train.jsonl") + read(DEMO / "eval.jsonl"))
    assert share < 0.01, flagged


@pytest.mark.slow
def test_many_fresh_references_are_not_flagged(tmp_path):
    demo.write_rows(tmp_path / "short", 1500, 0, seed=77)
    demo.write_rows(tmp_path / "long", 100, 0, seed=78, long=True)
    for rows in (read(tmp_path / "short/train.jsonl"), read(tmp_path / "long/train.jsonl")):
        share, flagged = share_flagged(rows)
        assert share < 0.01, flagged


def test_references_at_other_positions_are_flagged():
    """The same sentences, each beside the position of another row: most claims on a named square become wrong."""
    rows = [row for row in read(DEMO / "train.jsonl") if row["metadata"]["source"] == "textbook"]
    texts = [without_thought(row["messages"][2]["content"]) for row in rows]
    places = [position_of(row) for row in rows[7:] + rows[:7]]
    flagged = sum(bool(judge(Comment(text, *place))) for text, place in zip(texts, places))
    assert flagged > 0.4 * len(rows)


RUY, SCANDI, NG5 = "e4 e5 Nf3 Nc6 Bb5", "e4 d5 exd5 Qxd5", "e4 e5 Nf3 Nc6 Bc4 Nf6 Ng5"
CASTLES, SCHOLAR, CHECKS_KING = "e4 e5 Nf3 Nc6 Bc4 Bc5 O-O", "e4 e5 Qh5 Nc6 Bc4 Nf6 Qxf7#", "e4 e5 Nf3 d6 Bb5+"
CASES = [  # check, moves, a text and what is flagged in it, a text about the same that is right
    ("illegal_move", RUY, "Black can answer 3...Qxb5 at once.", "3...Qxb5",
     "After 3...a6 4.Bxc6 bxc6 the move 5.Nxe5 is possible."),
    ("illegal_move", RUY, "After 3...a6 4.Bxc6 Nxc6 the knight is back.", "Nxc6", "Not 3...Qxb5, which is illegal."),
    ("illegal_move", RUY, "White threatens Qxd7 now.", "Qxd7", "White threatens Bxc6, and one day Re1 and d4 will follow."),
    ("wrong_square", RUY, "The knight on f6 is strong.", "The knight on f6", "After 3...Nf6 the knight on f6 hits e4."),
    ("wrong_square", RUY, "Black's knights on c6 and d7 wait.", "Black's knights on c6 and d7", "The bishop on f1 left home."),
    ("wrong_square", RUY, "The white bishop on c4 looks on.", "The white bishop on c4", "The black bishop on c8 is shut in."),
    ("wrong_square", RUY, "White's pawn on e5 is strong.", "White's pawn on e5", "Black's pawn on e5 is under fire."),
    ("false_check", RUY, "The bishop gives check.", "gives check", "This is not check, the d7-pawn is in the way."),
    ("false_check", RUY, "Bb5+ is a good move.", "Bb5+", "If the d-pawn moves, Bb5 gives check."),
    ("false_check", CHECKS_KING, "The knight gives check.", "gives check", "The bishop gives check, and the king is in check."),
    ("false_mate", CHECKS_KING, "It is checkmate.", "is checkmate", "It isn't mate, for Black has 3...c6."),
    ("false_mate", SCHOLAR, "A check, but not mate.", "not mate", "Qxf7# is checkmate."),
    ("false_capture", RUY, "The bishop takes the knight on c6.", "takes the knight on c6",
     "If Black waits, White takes the knight."),
    ("false_capture", SCANDI, "Black takes a knight.", "takes a knight", "Black takes the pawn on d5."),
    ("false_capture", SCANDI, "The knight takes on d5.", "takes on d5", "The queen takes on d5, and nothing takes it back."),
    ("false_attack", RUY, "The bishop attacks the queen on d8.", "attacks the queen on d8",
     "The bishop attacks the knight on c6."),
    ("false_attack", NG5, "The pawn on f7 is attacked by the queen on d1.", "The pawn on f7 is attacked by the queen on d1",
     "The pawn on f7 is attacked by the knight on g5 and the bishop on c4."),
    ("false_defence", RUY, "The bishop on b5 protects the pawn on e4.", "The bishop on b5 protects the pawn on e4",
     "The knight on c6 protects the pawn on e5, and nothing defends e4."),
    ("false_defence", RUY, "The pawn on e5 is defended by the queen on d8.", "The pawn on e5 is defended by the queen on d8",
     "The pawn on e5 is defended by the knight on c6."),
    ("false_castling", RUY, "White castles kingside.", "White castles kingside",
     "White will castle soon, and then Black castles too."),
    ("false_castling", CASTLES, "White castles queenside.", "White castles queenside", "White castles kingside."),
    ("false_undefended", RUY, "The knight on c6 is undefended.", "The knight on c6 is undefended",
     "The bishop on b5 is undefended."),
    ("false_undefended", RUY, "White hangs the bishop on b5.", "hangs the bishop on b5", "The knight on c6 is not hanging."),
    ("stray_tags", RUY, "A fine move.<|im_end|>", "<|im_end|>", "White's bishop <b>pins</b> nothing, 3 < 4."),
    ("stray_tags", RUY, "<think>A move.", "<think>", "I think that it is fine."),
    ("cut_off", RUY, "White develops. Black now has the", "the", "White develops. Black has a reply: 3...a6"),
    ("cut_off", RUY, "White develops. Black has a pawn,", "pawn,", "normal move, bishop to b5... material is even"),
    ("repetition", RUY, "It is good. It is good. It is good.", "It is good. It",
     "Good for White. Good for Black? No. The bishop is good on b5, good on c4, and good on e2."),
    ("repetition", RUY, "White has the edge for now, I think. White has the edge for now, I think.",
     "White has the edge", "White has the edge here. Black has the edge there."),
]


@pytest.mark.parametrize("name, moves, wrong, quote, right", CASES)
def test_each_check_flags_what_is_wrong_and_lets_pass_what_is_right(name, moves, wrong, quote, right):
    place = after(moves)
    assert [flag.quote.strip() for flag in CHECKS[name](Comment(wrong, *place))] == [quote]
    assert list(CHECKS[name](Comment(right, *place))) == []
    flag = next(CHECKS[name](Comment(wrong, *place)))
    assert flag.check == name and wrong[flag.start:flag.end] == flag.quote and flag.why


def test_every_check_has_a_case_each_way():
    elsewhere = {"empty", "copied", "contradicts_row"}
    assert {case[0] for case in CASES} | elsewhere == CHECKS.keys()


def test_empty_and_copied_texts():
    assert [flag.check for flag in judge(Comment(" \n"))] == ["empty"] and judge(Comment("Good.")) == []
    text = "The bishop develops to b5 and attacks the knight on c6."
    known = frozenset({normalized("the bishop develops to b5, and attacks  the knight on c6"), normalized("White castles.")})
    assert [flag.check for flag in judge(Comment(text, trained_on=known))] == ["copied"]
    assert judge(Comment(text + " Fine.", trained_on=known)) == []
    assert judge(Comment("White castles.", trained_on=known)) == [], "so short a text may be equal by chance"


def test_an_answer_as_long_as_allowed_is_cut_off_unless_its_sentence_ends():
    assert [flag.check for flag in judge(Comment("White castles and the rook", at_limit=True))] == ["cut_off"]
    assert judge(Comment("White castles.", at_limit=True)) == [] == judge(Comment("white castles and so does black"))


@pytest.mark.parametrize("key, good, bad", [
    ("classification", "Best", "blunder"), ("centipawn_loss", 4, 390), ("centipawn_loss", 0, 300.0)])
def test_verdicts_in_the_metadata_are_not_contradicted(key, good, bad):
    for value, text, quotes in (
            (good, "A blunder. White loses time.", ["A blunder"]), (bad, "A blunder. White loses time.", []),
            (bad, "This is the best move.", ["the best move"]), (good, "This is the best move.", []),
            (bad, "The best move was 3.d4.", []), (good, "Not a blunder. Was it a mistake?", [])):
        comment = Comment(text, *after(RUY), {key: value})
        assert [(flag.check, flag.quote) for flag in judge(comment)] == [("contradicts_row", quote) for quote in quotes]


def test_without_a_position_only_the_text_is_checked():
    text = "The bishop on h9 gives check and takes the king on b5. 3...Qxa1<|im_end|>"
    assert [flag.check for flag in judge(Comment(text))] == ["stray_tags"]


def test_a_position_is_found_in_metadata_or_prompt():
    row = read(DEMO / "eval.jsonl")[0]
    board, move = position_of(row)
    assert (board.fen(), move.uci()) == (row["metadata"]["fen"], row["metadata"]["move_uci"])
    asked = {"messages": row["messages"], "metadata": {"source": "textbook"}}
    assert position_of(asked) == (board, move)
    ask = "FEN: rnbqkbnr/pppppppp/8/8/8/8/PPPPPPPP/RNBQKBNR w KQkq - 0 1\n"
    for words, uci in (("White plays 1. e4", "e2e4"), ("Move played: g1f3", "g1f3"), ("White played Nf3!", "g1f3")):
        assert position_of({"messages": [{"role": "user", "content": ask + words}]})[1].uci() == uci
    for words in (ask, ask + "White plays 1. e5", "White plays 1. e4", "FEN: 8/8/8/8/8/8/8/8 w - - 0 1\nWhite plays Nf3"):
        assert position_of({"messages": [{"role": "user", "content": words}]}) == (None, None)


def test_a_thought_is_taken_off():
    assert without_thought("<think>\nNf3?\n</think>\n\nGood.") == "Good." == without_thought("\n</think>\nGood.")
    assert without_thought("Good. </think> Bad.") == "Good. </think> Bad."
    assert without_thought("<think>no end") == "<think>no end"


def test_a_move_is_read_as_legal_ambiguous_or_illegal():
    board = chess.Board("4k3/8/8/8/8/8/R6R/4K3 w - - 0 1")
    assert parsed(board, "Rab2").uci() == "a2b2" and parsed(board, "Re2") == chess.Move.null() and not parsed(board, "Re2")
    assert parsed(board, "Rh9") is None is parsed(board, "Ke8")


def test_moves_in_a_text_have_the_number_that_stands_there_or_follows():
    text = "After 3...a6 4.Ba4!? Nf6 5.O-O, d6 is weak; Nxe4 or ...b5+ with e5."
    assert [(named.san, named.ply, named.dots, named.mark) for named in Comment(text).moves] == [
        ("a6", 5, False, ""), ("Ba4", 6, False, ""), ("Nf6", 7, False, ""), ("O-O", 8, False, ""), ("Nxe4", None, False, ""),
        ("b5", None, True, "+")]


def test_a_comment_takes_under_five_milliseconds_and_an_endless_one_no_seconds():
    times = []
    for row in BY_HAND[::2]:
        comment, start = comment_by_hand(row), time.perf_counter()
        judge(comment)
        times.append(time.perf_counter() - start)
    assert statistics.median(times) < 0.005
    for text in ("Nf3 " * 2500, "1...e5 2.Nf3 Nc6 3.Bb5 a6 4.Ba4 " * 300, "the knight on f3 attacks the queen on d8 and " * 220,
                 "White takes the pawn on e5 with check. " * 250, "a" * 10_000, "1...e5\n" * 1400, "<think>" * 1400,
                 " " * 10_000):
        start = time.perf_counter()
        judge(Comment(without_thought(text), *after("e4")))
        assert time.perf_counter() - start < 5, text[:40]


def test_flags_are_the_same_each_time():
    for row in BY_HAND[::3]:
        assert judge(comment_by_hand(row)) == judge(comment_by_hand(row))
    assert checks.CHECKS.keys() == checks.TEXT_CHECKS.keys() | checks.BOARD_CHECKS.keys()


def test_any_text_is_judged_without_an_error():
    rng = random.Random(3)
    vocabulary = sorted({word for row in BY_HAND for word in row["text"].split()})
    vocabulary += ["\n", "<|x|>", "0-0-0", "99.Kh1", "…", "#", ""]
    for _ in range(400):
        text = " ".join(rng.choices(vocabulary, k=rng.randrange(60)))
        row = rng.choice(BY_HAND)
        metadata = rng.choice([{"classification": None}, {"classification": 3, "cp_loss": "x"}, {"centipawn_loss": True}])
        comment = Comment(text, chess.Board(row["fen"]), chess.Move.from_uci(row["move_uci"]), metadata, rng.random() < 0.3)
        assert all(text[flag.start:flag.end] == flag.quote for flag in judge(comment))
        judge(Comment(text))

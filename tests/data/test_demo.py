"""Replays the demo's rows and proves what they say, with code that shares nothing with the generator."""

import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

chess = pytest.importorskip("chess")

from data.demo import __main__ as demo  # noqa: E402

FILES = Path(demo.__file__).parent
POINTS = {chess.PAWN: 1, chess.KNIGHT: 3, chess.BISHOP: 3, chess.ROOK: 5, chess.QUEEN: 9, chess.KING: 0}
PIECE = "(pawn|knight|bishop|rook|queen|king)"
ON = rf"{PIECE} on ([a-h][1-8])"
SAN = r"((?:O-O(?:-O)?|[KQRBN][a-h]?[1-8]?x?[a-h][1-8]|[a-h](?:x[a-h])?[1-8](?:=[QRBN])?)[+#]?)"


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


class Case:
    """One row, replayed."""

    def __init__(self, row: dict) -> None:
        self.messages, self.metadata = row["messages"], row["metadata"]
        self.before = chess.Board(self.metadata["fen"])
        self.move = chess.Move.from_uci(self.metadata["move_uci"])
        self.after = self.before.copy()
        self.after.push(self.move)
        self.passed = self.after.copy()
        if not self.after.is_check():
            self.passed.push(chess.Move.null())
        self.answer = re.sub(r"<think>.*?</think>\s*", "", self.messages[2]["content"], flags=re.DOTALL)
        self.source = self.metadata["source"]

    def found(self, pattern: str) -> Iterator[tuple[str, ...]]:
        for match in re.finditer(pattern, self.answer):
            yield match.groups()


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of another seed, so that what is proved does not hold for the committed ones only."""
    out_dir = tmp_path_factory.mktemp("fresh")
    demo.write_rows(out_dir, 1500, 100, seed=11)
    return out_dir


@pytest.fixture(scope="module")
def cases(fresh: Path) -> list[Case]:
    rows = read(FILES / "train.jsonl") + read(FILES / "eval.jsonl") + read(fresh / "train.jsonl")
    return [Case(row) for row in rows]


def square(name: str) -> int:
    return chess.parse_square(name)


def stands(board: "chess.Board", piece: str, where: str) -> bool:
    kind = board.piece_type_at(square(where))
    return kind is not None and chess.piece_name(kind) == piece


def legal(board: "chess.Board", san: str) -> bool:
    return san in {board.san(move) for move in board.legal_moves}


def best_on_square(board: "chess.Board", move: "chess.Move") -> int:
    """Full minimax over all legal captures on the move's target square; either side may stop."""
    victim = board.piece_type_at(move.to_square)
    won = POINTS[victim] if victim else int(board.is_en_passant(move))
    won += POINTS[move.promotion] - 1 if move.promotion else 0
    after = board.copy()
    after.push(move)
    answers = [best_on_square(after, reply) for reply in after.legal_moves if reply.to_square == move.to_square]
    return won - max(answers + [0])


def material(board: "chess.Board", color: bool) -> int:
    return sum(POINTS[piece.piece_type] for piece in board.piece_map().values() if piece.color is color)


def test_rows_are_well_formed_and_legal(cases: list[Case]) -> None:
    for case in cases:
        roles = [message["role"] for message in case.messages]
        assert roles == ["system"] + ["user", "assistant"] * (len(roles) // 2)
        assert case.before.is_valid() and case.move in case.before.legal_moves
        assert case.metadata["fen"] in case.messages[1]["content"]
        assert case.messages[1]["content"].endswith(case.before.san(case.move))
        assert all(message["content"].strip() == message["content"] != "" for message in case.messages)


def test_think_blocks_open_the_answer_and_close(cases: list[Case]) -> None:
    num_thoughts = 0
    for case in cases:
        for message in case.messages[2::2]:
            text = message["content"]
            assert text.count("<think>") == text.count("</think>") <= 1
            if "<think>" in text:
                assert re.fullmatch(r"<think>\n[^<]+\n</think>\n\n[^<]+", text) and case.source == "textbook"
                num_thoughts += 1
    assert 0.15 < num_thoughts / len(cases) < 0.25


def test_every_named_piece_stands_there_and_every_move_is_legal(cases: list[Case]) -> None:
    for case in cases:
        for message in case.messages[2::2]:
            for piece, where in re.findall(ON, message["content"]):
                assert stands(case.before, piece, where) or stands(case.after, piece, where), message
            for san in re.findall(rf"(?<![\w-]){SAN}(?![\w-])", message["content"]):
                if re.fullmatch(r"[a-h][1-8]", san):
                    continue                                        # a square as likely as a pawn move
                assert any(legal(board, san) for board in (case.before, case.after, case.passed)), (san, message)


def mate(case: Case, board: "chess.Board", san: str) -> bool:
    after = board.copy()
    after.push_san(san)
    return after.is_checkmate()


def undefended(case: Case, piece: str, where: str) -> bool:
    """In the position before or after the move, whichever has the piece there."""
    for board in (case.before, case.after):
        if stands(board, piece, where) and not board.attackers(board.color_at(square(where)), square(where)):
            return True
    return False


def pinned(case: Case, front: str, at: str, back: str, behind: str) -> bool:
    line = chess.SquareSet.between(case.move.to_square, square(behind))
    alone = [where for where in line if case.after.piece_at(where)] == [square(at)]
    slides = square(at) in case.after.attacks(case.move.to_square)
    enemy = case.after.color_at(square(at)) == case.after.color_at(square(behind)) == case.after.turn
    return alone and slides and enemy and (back != "king" or case.after.is_pinned(case.after.turn, square(at)))


def forked(case: Case, targets: str) -> bool:
    hits = re.findall(ON, targets)
    return len(hits) > 1 and all(
        stands(case.after, piece, where) and case.after.color_at(square(where)) == case.after.turn
        and case.move.to_square in case.after.attackers(not case.after.turn, square(where)) for piece, where in hits)


def wins(board: "chess.Board", san: str, spoils: str) -> bool:
    move = board.parse_san(san)
    gain = best_on_square(board, move)
    worth = {f"a {chess.piece_name(kind)}": points for kind, points in POINTS.items()}
    worth.update({"the exchange": 2, "material": gain})
    got, _, paid = spoils.partition(" for ")
    return gain > 1 and gain == worth[got] - worth.get(paid, 0)


def passed_pawn(case: Case, where: str) -> bool:
    color = not case.after.turn
    for other in case.after.pieces(chess.PAWN, case.after.turn):
        ahead = chess.square_rank(other) - chess.square_rank(square(where))
        if abs(chess.square_file(other) - chess.square_file(square(where))) < 2 and (ahead if color else -ahead) > 0:
            return False
    return stands(case.after, "pawn", where)


def reach(case: Case, num: str) -> bool:
    own = case.after.occupied_co[not case.after.turn]
    return int(num) == len(case.after.attacks(case.move.to_square) & ~chess.SquareSet(own))


def lead(case: Case, leader: str, num: str) -> bool:
    return material(case.after, leader == "White") - material(case.after, leader != "White") == int(num)


def wing(case: Case, where: str) -> bool:
    kingside = case.before.is_kingside_castling(case.move)
    return case.before.is_castling(case.move) and kingside == (where == "kingside")


def check_from(case: Case, *words: str) -> bool:
    return case.after.is_check() and (not words or case.after.king(case.after.turn) == square(words[-1]))


def empty_file(case: Case, file: str) -> bool:
    return not any(chess.square_file(pawn) == "abcdefgh".index(file)
                   for pawn in chess.SquareSet(case.after.pawns))


def took(case: Case, piece: str, where: str) -> bool:
    return stands(case.before, piece, where) and case.move.to_square == square(where)


# what a sentence says -> whether it is so
CLAIMS: dict[str, Callable[..., bool]] = {
    rf"^{SAN} is checkmate: ": lambda case, san: case.after.is_checkmate(),
    r"Checkmate\. The king|which is checkmate\.$": lambda case: case.after.is_checkmate() or "issed" in case.answer
    or "allows" in case.answer,
    rf"allows {SAN}, which is checkmate|[Nn]ow {SAN} is checkmate|answer {SAN}, and that is mate":
        lambda case, *sans: mate(case, case.after, next(filter(None, sans))),
    rf"threatens? {SAN}, which would be checkmate|threat is {SAN}, checkmate|threat of {SAN} mate":
        lambda case, *sans: mate(case, case.passed, next(filter(None, sans))),
    r"[Cc]hecks the king on ([a-h][1-8])": check_from,
    r"gives check from|discovered check|double check|a check from": check_from,
    r"only legal answer|just one legal reply": lambda case: case.after.legal_moves.count() == 1,
    r"only a king move gets|has to move the king": lambda case: all(
        case.after.piece_type_at(move.from_square) == chess.KING for move in case.after.legal_moves),
    rf"undefended {ON}": undefended,
    rf"{ON}, which (?:is undefended|nothing defend)": undefended,
    rf"[Nn]othing defends the {ON}": undefended,
    rf"{ON},? (?:is loose|is left undefended|was undefended|had no defender|has no defender|which has no)": undefended,
    r"(White|Black) (?:takes|wins) an? " + PIECE + r"(?: that no piece|: nothing)": lambda case, side, piece:
        undefended(case, piece, chess.square_name(case.move.to_square)),
    r"forks (.*?)\.|fork: the \w+ on .. attacks (.*?)\.|attacks ([^.]*?) at once":
        lambda case, *targets: forked(case, next(filter(None, targets))),
    rf"pins the {ON} to the {ON}|{ON} is now pinned to the {ON}":
        lambda case, *words: pinned(case, *[word for word in words if word]),
    rf"{SAN} wins (an? \w+ for an? \w+|an? \w+|the exchange|material)[.:]": lambda case, san, spoils:
        any(wins(board, san, spoils) for board in (case.before, case.after) if legal(board, san)),
    rf"takes the (?:undefended )?{ON}": took,
    r"trades|exchanges|even trade|comes out even|is even\.": lambda case: best_on_square(case.before, case.move) == 0,
    r"loses material|is bad for|gives more than": lambda case: best_on_square(case.before, case.move) < 0,
    r"pawn on ([a-h][1-8]) is passed|passed pawn on ([a-h][1-8])":
        lambda case, one, two: passed_pawn(case, one or two),
    r"passed pawn advances to ([a-h][1-8])": passed_pawn,
    r"reaches (\d+) square|(?:active on ..: )(\d+) square": lambda case, one, two: reach(case, one or two),
    r"(White|Black) is (\d+) points? (?:ahead|up)|(White|Black) leads by (\d+)":
        lambda case, *words: lead(case, *[word for word in words if word]),
    r"aterial is level|ahead in material\.$": lambda case: "either" not in case.answer or lead(case, "White", "0"),
    r"[Cc]astl(?:es|ing) (\w+)side": lambda case, side: wing(case, f"{side}side"),
    r"(?<!half-)open ([a-h])-file|takes the ([a-h])-file": lambda case, one, two: empty_file(case, one or two),
    r"blocks the check|out of check|answers the check|ends the check": lambda case: case.before.is_check(),
    r"in passing|en passant": lambda case: case.before.is_en_passant(case.move),
}


@pytest.mark.parametrize("pattern", CLAIMS, ids=lambda pattern: re.sub(r"[^\w ]+", " ", pattern)[:40])
def test_claims_of_the_coach_are_true(cases: list[Case], pattern: str) -> None:
    num_claims = 0
    for case in cases:
        if case.source == "textbook":
            for words in case.found(pattern):
                num_claims += 1
                assert CLAIMS[pattern](case, *words), (case.metadata, case.answer)
    assert num_claims, "no row makes this claim, so nothing was proved"


@pytest.mark.parametrize("fen, move, kind", [
    ("7k/5Q2/8/8/8/8/8/K7 w - - 0 1", "f7g6", "stalemate"),
    ("6k1/5ppp/8/8/8/8/8/R3K3 w - - 0 1", "a1a8", "mate"),
    ("6k1/5ppp/8/8/8/8/8/R3K3 w - - 0 1", "e1e2", "missed_mate"),
    ("6k1/6pp/8/8/8/8/5PPP/3R2K1 w - - 0 1", "d1d3", "-missed_mate"),      # the king gets out over f7
    ("r3k3/8/8/3N4/8/8/8/4K3 w - - 0 1", "d5c7", "fork"),
    ("r3k3/8/3b4/3N4/8/8/8/4K3 w - - 0 1", "d5c7", "-fork"),                 # the bishop just takes it
    ("4k3/8/2n5/8/8/8/8/4KB2 w - - 0 1", "f1b5", "pin"),
    ("4k3/3p4/2n5/8/8/8/8/4KB2 w - - 0 1", "f1b5", "-pin"),                  # a pawn stands between
    ("6k1/5r2/8/3q4/8/2N5/8/1B4K1 w - - 0 1", "b1a2", "skewer"),
    ("4k3/8/8/3pP3/8/8/8/4K3 w - d6 0 2", "e5d6", "en_passant"),
    ("4k3/8/3p4/4n3/8/5N2/8/4K3 w - - 0 1", "f3e5", "-takes_loose"),         # the pawn takes back
    ("4k3/8/8/4n3/8/5N2/8/4K3 w - - 0 1", "f3e5", "takes_loose"),
    ("4k3/8/8/8/8/8/8/R3K2R w K - 0 1", "e1g1", "castles"),
    ("4k3/8/4p3/8/3P4/8/8/4K3 w - - 0 1", "d4d5", "-passed_new"),
    ("4k3/4p3/8/8/3P4/8/8/4K3 w - - 0 1", "d4d5", "-passed_new"),
])
def test_facts_of_hand_made_positions(fen: str, move: str, kind: str) -> None:
    from data.demo.facts import facts_of
    from data.demo.play import Play
    board = chess.Board(fen)
    assert chess.Move.from_uci(move) in board.legal_moves
    kinds = {fact.kind for fact in facts_of(Play(board, chess.Move.from_uci(move)))}
    assert (kind in kinds) if kind[0] != "-" else (kind[1:] not in kinds)


def test_capture_words_match_the_board(cases: list[Case]) -> None:
    for case in cases:
        if case.source == "textbook" and case.before.is_capture(case.move) and not case.move.promotion:
            assert re.search("take|wins|exchange|trade|collects|picks up|mate|captures|pass", case.answer), case.answer


def test_engine_lines_count_right(cases: list[Case]) -> None:
    lines = [case for case in cases if case.source == "engine"]
    assert lines
    for case in lines:
        fields = case.answer.split(" | ")
        balance = material(case.after, True) - material(case.after, False)
        checks = "yes" if case.after.is_check() else "no"
        assert fields[:4] == [case.before.san(case.move), f"material {balance:+d}", f"check {checks}",
                              f"replies {case.after.legal_moves.count()}"]


def test_follow_up_answers_are_true(cases: list[Case]) -> None:
    answered = [case for case in cases if len(case.messages) > 3]
    assert {len(case.messages) for case in answered} == {5} and 0.02 < len(answered) / len(cases) < 0.08
    for case in answered:
        question, answer = (message["content"] for message in case.messages[3:])
        if "undefended" in question:
            loose = {where for where, piece in case.after.piece_map().items()
                     if piece.piece_type not in (chess.PAWN, chess.KING)
                     and not case.after.attackers(piece.color, where)}
            assert {square(where) for _, where in re.findall(ON, answer)} == loose, answer
        elif "material" in question:
            assert f"White {material(case.after, True)}, Black {material(case.after, False)}" in answer


def test_sources_are_mixed_and_most_rows_are_textbook() -> None:
    train = Counter(row["metadata"]["source"] for row in read(FILES / "train.jsonl"))
    assert train == {"textbook": 512, "forum": 64, "engine": 64}
    held_out = Counter(row["metadata"]["source"] for row in read(FILES / "eval.jsonl"))
    assert set(held_out) == set(train) and held_out["textbook"] >= 32 and sum(held_out.values()) == 48


def test_no_position_is_in_train_and_eval(fresh: Path) -> None:
    for folder in (FILES, fresh):
        seen = [" ".join(row["metadata"]["fen"].split()[:4])
                for split in ("train", "eval") for row in read(folder / f"{split}.jsonl")]
        assert len(seen) == len(set(seen))


def test_committed_rows_are_what_the_command_writes(tmp_path: Path) -> None:
    demo.main([str(tmp_path)])
    for name in ("train.jsonl", "eval.jsonl"):
        assert (tmp_path / name).read_bytes() == (FILES / name).read_bytes(), name
    assert sum(path.stat().st_size for path in FILES.iterdir()) < 1_000_000


def test_seed_decides(tmp_path: Path) -> None:
    texts = []
    for i, seed in enumerate((3, 3, 4)):
        demo.main([str(tmp_path / str(i)), "--train", "20", "--eval", "5", "--seed", str(seed)])
        texts.append((tmp_path / str(i) / "train.jsonl").read_bytes())
    assert texts[0] == texts[1] != texts[2]


def test_long_rows_have_the_size_of_a_users_rows(tmp_path: Path) -> None:
    demo.main([str(tmp_path), "--train", "60", "--eval", "0", "--long"])
    rows = read(tmp_path / "train.jsonl")
    sizes = [sum(len(message["content"]) for message in row["messages"]) for row in rows]
    assert 4_500 < sum(sizes) / len(sizes) < 5_200 and max(sizes) < 6_000
    for row in rows:
        board = chess.Board(row["metadata"]["fen"])
        prompt = row["messages"][1]["content"]
        listed = re.search(r"Legal moves: (.*)", prompt)
        assert listed and listed[1].split() == [board.san(move) for move in board.legal_moves]
        assert all(f"{8 - i} {rank}" in prompt for i, rank in enumerate(str(board).splitlines()))


def test_without_chess_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("data.demo.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "chess", None)
    with pytest.raises(SystemExit, match="pip install chess"):
        demo.main([str(tmp_path)])

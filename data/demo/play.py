"""A move in its position, facts about the move, and words for pieces and captured material.
Needs python-chess. A `Play` keeps a few boards, some kilobytes."""

from dataclasses import dataclass, field

import chess

from data.demo.exchange import VALUE, captures_by_gain, passed_turn

IDEA, EFFECT, WARNING, TAIL = range(4)          # the order in which a comment says things
SLIDERS = (chess.BISHOP, chess.ROOK, chess.QUEEN)
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TIMES = ("never", "once", "twice", "three times", "four times", "five times", "six times")
HOMES = {chess.KNIGHT: chess.BB_FILES[1] | chess.BB_FILES[6], chess.BISHOP: chess.BB_FILES[2] | chess.BB_FILES[5]}


@dataclass(frozen=True)
class Fact:
    """One true statement: its kind, its weight, its place in a comment, the words that its phrase needs."""
    kind: str
    weight: int
    order: int = IDEA
    words: dict[str, str] = field(default_factory=dict)


class Play:
    """A move in its position, with all that more than one fact needs."""

    def __init__(self, board: chess.Board, move: chess.Move) -> None:
        self.board = board.copy(stack=False)
        self.move, self.us, self.them = move, board.turn, not board.turn
        self.start, self.to = move.from_square, move.to_square
        self.after = self.board.copy()
        self.san = self.after.san_and_push(move)
        self.after.clear_stack()
        self.piece_type = self.after.piece_type_at(self.to) or chess.PAWN
        self.is_capture = self.board.is_capture(move)
        self.takes_back = self.is_capture and took_on(board, self.to)
        self.before_passed = passed_turn(self.board)        # the opponent to move, as if we had passed
        self.after_passed = passed_turn(self.after)         # we again, as if the opponent had passed
        self.replies = captures_by_gain(self.after)
        self.safe = all(gain <= 0 for gain, reply in self.replies if reply.to_square == self.to)
        self.attacked = self.after.attacks_mask(self.to) & self.after.occupied_co[self.them]
        if board.is_castling(move):
            self.attacked = 0

    def names(self) -> dict[str, str]:
        """Words that every phrase may use."""
        side, other = ("White", "Black") if self.us else ("Black", "White")
        return {"san": self.san, "side": side, "other": other, "piece": chess.piece_name(self.piece_type),
                "from": chess.square_name(self.start), "to": chess.square_name(self.to)}


def took_on(board: chess.Board, square: int) -> bool:
    """Whether the move that led to `board` took something on `square`."""
    if not board.move_stack or board.peek().to_square != square:
        return False
    earlier = board.copy(stack=1)
    return earlier.is_capture(earlier.pop())


def named(board: chess.Board, square: int) -> str:
    """A piece and its square, such as `knight on e5`."""
    return f"{chess.piece_name(board.piece_type_at(square) or chess.PAWN)} on {chess.square_name(square)}"


def listed(items: list[str], word: str = "and") -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} {word} {items[-1]}"


def squares(mask: int) -> str:
    return listed([chess.square_name(square) for square in chess.scan_forward(mask)])


def spoils(board: chess.Board, move: chess.Move, gain: int) -> str:
    """In words, what a capture wins whose exchange wins `gain` pawns."""
    victim = chess.PAWN if board.is_en_passant(move) else board.piece_type_at(move.to_square)
    if victim is None or move.promotion:
        return "material"
    mover = board.piece_type_at(move.from_square) or chess.PAWN
    if gain == VALUE[victim]:
        return f"a {chess.piece_name(victim)}"
    if gain != VALUE[victim] - VALUE[mover]:
        return "material"
    if victim == chess.ROOK and mover in (chess.KNIGHT, chess.BISHOP):
        return "the exchange"
    return f"a {chess.piece_name(victim)} for a {chess.piece_name(mover)}"


def behind(board: chess.Board, start: int, through: int) -> int | None:
    """The first piece that a slider on `start` would meet beyond the piece on `through`."""
    for square in chess.scan_forward(chess.ray(start, through) & board.occupied):
        if chess.between(start, square) & board.occupied == chess.BB_SQUARES[through]:
            return square
    return None


def is_passed(board: chess.Board, square: int, color: chess.Color) -> bool:
    file, rank = chess.square_file(square), chess.square_rank(square)
    return not any(abs(chess.square_file(pawn) - file) <= 1
                   and (chess.square_rank(pawn) > rank if color else chess.square_rank(pawn) < rank)
                   for pawn in board.pieces(chess.PAWN, not color))


def worth_attacking(play: Play, attacker: int, target: int) -> bool:
    """An attack that counts: on the king, on a piece worth more than the attacker, or on an undefended piece."""
    kind = play.after.piece_type_at(target) or chess.PAWN
    if kind == chess.KING or VALUE[kind] > VALUE[play.after.piece_type_at(attacker) or chess.KING] > 0:
        return True
    return kind != chess.PAWN and not play.after.attackers_mask(play.them, target)


def material_balance(board: chess.Board) -> int:
    """White's material less Black's, in pawns."""
    return sum(VALUE[kind] * (len(board.pieces(kind, True)) - len(board.pieces(kind, False))) for kind in VALUE)


def ahead_words(board: chess.Board) -> dict[str, str]:
    points = abs(material_balance(board))
    return {"leader": "White" if material_balance(board) > 0 else "Black", "points": str(points),
            "unit": "point" if points == 1 else "points"}

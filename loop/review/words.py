"""Reads a coach's comment: its sentences, the moves and pieces that it names, and which words only suppose something.
Needs python-chess. A fraction of a millisecond a comment; keeps a few boards of a hundred bytes each."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import chess

MAX_BOARDS = 48     # of lines followed in one comment; where there are more, moves are let pass


def any_of(words: str) -> str:
    """A pattern for any of the words; `threat*` stands for all words that begin so."""
    return r"\b(?:" + "|".join(word.replace("*", r"\w*") for word in words.split()) + r")\b"


KINDS = {name: kind for kind, name in enumerate(chess.PIECE_NAMES) if name}
PIECE = r"(?:pawn|knight|bishop|rook|queen|king)"
SQUARE = r"[a-h][1-8]"
SQUARES = rf"{SQUARE}(?:(?:, | and |, and | or ){SQUARE}\b)*"
SIDE = r"(?:[Ww]hite|[Bb]lack)"
PLAN = any_of("break push advance thrust sac* lever move capture")     # "the f5 pawn push"
# "the knight on f3", "White's pawns on d4 and e5", and the other way round: "the f7 pawn"
MENTION = re.compile(rf"(?:\b(?P<det>the|its|his|her|their|your|our|this|that|both|an?|another|no|any|one|{SIDE}['’]s) )?"
                     rf"(?P<adjective>(?:[a-z-]+ )??)(?:(?P<kind>{PIECE})s? (?:on|at) (?P<squares>{SQUARES})\b"
                     rf"|(?P<square>{SQUARE})[- ](?P<kind2>{PIECE})\b(?! {PLAN}))", re.IGNORECASE)
SAN = (r"(?:[KQRBN][a-h]?[1-8]?x?[a-h][1-8]|[a-h]x[a-h][1-8](?:=?[QRBN])?|[a-h][18]=[QRBN]|[O0]-[O0](?:-[O0])?)"
       r"(?:[+#])?(?![\w-])")
PAWN_STEP = r"[a-h][1-8][+#]?(?![\w-])"     # a move only where a number or dots stand before; else it is a square
SAN_PARTS = re.compile(r"(?P<kind>[KQRBN])?(?P<file>[a-h])?(?P<rank>[1-8])?x?(?P<to>[a-h][1-8])(?:=?(?P<new>[QRBN]))?")
MOVE = re.compile(rf"(?:(?<![\w.])(?P<number>\d{{1,3}}) ?(?P<dots>\.\.\.|…|\.(?!\.)) ?|(?P<bare>(?<!\.)\.\.\.|…) ?)"
                  rf"(?P<numbered>{SAN}|{PAWN_STEP})|(?<![\w.-])(?P<plain>{SAN})")
CONTINUES = re.compile(rf"[!?]{{0,2}},? +(?P<san>{SAN}|{PAWN_STEP})")
SENTENCE_END = re.compile(r"(?<![ \d]\d)(?<!^\d)(?<!\.)[.!?…]+[\"')\]’”]*(?=\s+[^a-z\s]|\s*$)|\n+")
CLAUSE_END = re.compile(r"[,;:.!?()—\n]| (?:and|but|because|since|so|while|yet|whereas)\b")
LATE_CONDITION = re.compile(r"[,;—] *(?:if|when|after|once|unless|until|provided|should|as soon)\b")

# Words after which a sentence need not be about this move on this board: conditions, negations, plans, the past, hearsay.
SUPPOSES = ("if unless until would will shall suppos* imagin* example instance otherwise then next later soon after* when*"
            " before eventually ultimately follow* instead rather hop* plan* idea prepar* want* wants intend* dream* typical*"
            " usual* often always every earlier previous* last already better was were been had")
HEDGE = re.compile(
    any_of(SUPPOSES + " could can cannot may might must should threat* has have did does do not no never nor neither without"
           " nothing none nobody almost nearly look looks seem* appear* aim* allow* let lets think* thought believe*"
           " possib* perhaps maybe missed stronger alternative* avoid* prevent* stop* avert* ready about try* tries"
           " answer* repl* respond* whether how any sometimes")
    + r"|(?<!at )\bonce\b|n['’]t\b|['’](?:ll|d)\b|e\.g\.|i\.e\.", re.IGNORECASE)
# Words that move pieces, so that what is named on a square may come there later or have stood there in the past.
ELSEWHERE = re.compile(
    any_of(SUPPOSES + " once took gave went came left captured exchanged recaptur* retak* regain* put* plac* bring* get* plant*"
           " install* land* reach* rerout* rout* post* need* transfer* trad* exchang* swap* retreat* replac* without missing"
           " everywhere") + r"|n['’]t\b|['’](?:ll|d)\b", re.IGNORECASE)


class Flag(NamedTuple):
    """What a check finds wrong: the check's name, where in the text, the words there, and why they cannot be right."""

    check: str
    start: int
    end: int
    quote: str
    why: str


class Mention(NamedTuple):
    """A piece named on a square."""

    start: int
    end: int
    kind: int
    square: int
    side: bool | None       # the colour in words, if it stands there
    definite: bool          # "the knight", not "a knight"


class Named(NamedTuple):
    """A move named in the text."""

    start: int
    end: int
    ply: int | None         # twice its number, one more for Black; None where no number is given or implied
    dots: bool              # written as Black's move with dots and no number: "...Rc8"
    san: str                # without check marks
    mark: str               # "+", "#" or nothing
    continues: bool         # stands right after another move, so that both are one line


@dataclass(frozen=True)
class Comment:
    """A comment with all that checks need; what is read from it is read once.

    Args:
        text: the answer without its thought.
        board: the position before the move; None where the row gives none. Then only checks of the text run.
        move: the move that the comment is about, legal on `board`.
        metadata: the row's.
        at_limit: whether generation ended because the longest answer was reached.
        trained_on: `normalized` texts of training rows.
    """

    text: str
    board: chess.Board | None = None
    move: chess.Move | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    at_limit: bool = False
    trained_on: frozenset[str] = frozenset()

    def flag(self, check: str, start: int, end: int, why: str) -> Flag:
        return Flag(check, start, end, self.text[start:end], why)

    @cached_property
    def before(self) -> chess.Board:
        assert self.board is not None
        return self.board.copy(stack=False)

    @cached_property
    def after(self) -> chess.Board:
        assert self.move is not None
        return pushed(self.before, self.move)

    @cached_property
    def boards(self) -> tuple[chess.Board, chess.Board]:
        return self.before, self.after

    @cached_property
    def san(self) -> str:
        assert self.move is not None
        return self.before.san(self.move).rstrip("+#")

    @property
    def ply(self) -> int:
        return ply_of(self.before)

    @cached_property
    def sentences(self) -> list[tuple[int, int]]:
        ends = [match.end() for match in SENTENCE_END.finditer(self.text)] + [len(self.text)]
        starts = [0] + ends[:-1]
        return [(start, end) for start, end in zip(starts, ends) if self.text[start:end].strip()]

    @cached_property
    def moves(self) -> list[Named]:
        return list(named_moves(self.text))

    @cached_property
    def read_lines(self) -> tuple[list[tuple[int, chess.Board]], list[tuple[Named, bool]]]:
        """Follows the moves named, each from every board where it is legal.

        Returns:
            the boards reached with where in the text they are, and the moves that fit no board, each with whether the move
            right before it was the line's own at its number.
        """
        reached: list[tuple[int, chess.Board]] = []
        misfits: list[tuple[Named, bool]] = []
        line_holds = False
        for named in self.moves:
            if self.about_other_move(named.start):
                continue
            boards = [self.before, self.after, *(board for _, board in reached)]
            fits = [(board, move) for board in boards if (move := parsed(board, named.san)) is not None]
            if not fits and len(boards) > MAX_BOARDS:
                break
            if not fits and not any(parsed(turned(board), named.san) is not None for board in boards):
                misfits.append((named, line_holds))
            # the null move, where several fit, is false
            reached += [(named.end, pushed(board, move)) for board, move in fits[-4:]
                        if move and not (board is self.before and move == self.move)]
            line_holds = any(ply_of(board) == named.ply for board, _ in fits)
        return reached, misfits

    def reached_before(self, position: int) -> list[chess.Board]:
        return [board for end, board in self.read_lines[0] if end <= position]

    @cached_property
    def mentions(self) -> list[Mention]:
        return list(piece_mentions(self.text))

    def sentence(self, position: int) -> tuple[int, int]:
        return next(((start, end) for start, end in self.sentences if start <= position < end), (0, len(self.text)))

    def is_played(self, named: Named) -> bool:
        """Whether a named move is the row's own."""
        return named.ply in (None, self.ply) and parsed(self.before, named.san) == self.move

    def about_other_move(self, position: int) -> bool:
        """Whether the paragraph begins with the number of another move: it comments on that one."""
        start = self.text.rfind("\n", 0, position) + 1
        lead = len(self.text[start:]) - len(self.text[start:].lstrip())
        first = next((named for named in self.moves if named.start == start + lead), None)
        return first is not None and first.ply is not None and first.ply != self.ply and start > 0

    def plain(self, start: int, end: int, hedge: re.Pattern[str] = HEDGE) -> bool:
        """Whether the words from `start` to `end` say something of this move on this board, and suppose nothing.

        Looked at are the words from the sentence's begin to the clause's end, without the claim's own.
        """
        first, last = self.sentence(start)
        stop = CLAUSE_END.search(self.text, end, last)
        clause_end = stop.start() if stop else last
        if self.text[first:last].rstrip(" \"')\n").endswith("?") or self.about_other_move(start):
            return False
        if stop and LATE_CONDITION.match(self.text, stop.start()):
            return False
        if hedge.search(self.text, first, start) or hedge.search(self.text, end, clause_end):
            return False
        # a sentence that follows a line may still be about it
        since = first if hedge is not HEDGE or first == 0 else self.sentence(first - 1)[0]
        return all(self.is_played(named) for named in self.moves if since <= named.start < clause_end)


def parsed(board: chess.Board, san: str) -> chess.Move | None:
    """The move that `san` names on `board`, read leniently; None if it is illegal there. The null move if several fit.

    `board.parse_san` would do, but writes the whole position into each error, ten times the time of the rest.
    """
    if san[0] in "O0":
        found = [move for move in board.generate_castling_moves() if board.is_queenside_castling(move) == (san.count("-") == 2)]
        return found[0] if found else None
    match = SAN_PARTS.fullmatch(san)
    if not match:
        return None
    kind = chess.PIECE_SYMBOLS.index((match["kind"] or "P").lower())
    to, mask = chess.parse_square(match["to"]), board.pieces_mask(kind, board.turn)
    if match["file"]:
        mask &= chess.BB_FILES[ord(match["file"]) - ord("a")]
    elif kind == chess.PAWN:
        mask &= chess.BB_FILES[chess.square_file(to)]
    if match["rank"]:
        mask &= chess.BB_RANKS[int(match["rank"]) - 1]
    promotion = chess.PIECE_SYMBOLS.index(match["new"].lower()) if match["new"] else None
    moves = [move for move in board.generate_legal_moves(mask, chess.BB_SQUARES[to])
             if move.promotion == promotion or promotion is None and move.promotion == chess.QUEEN]
    return moves[0] if len(moves) == 1 else chess.Move.null() if moves else None


def pushed(board: chess.Board, move: chess.Move) -> chess.Board:
    after = board.copy(stack=False)
    after.push(move)
    after.clear_stack()
    return after


def turned(board: chess.Board) -> chess.Board:
    """The same position with the other side to move, also where that leaves a king in check."""
    other = board.copy(stack=False)
    other.turn, other.ep_square = not board.turn, None
    return other


def ply_of(board: chess.Board) -> int:
    return 2 * board.fullmove_number + (board.turn == chess.BLACK)


def named_moves(text: str) -> Iterator[Named]:
    """All moves of the text in order. A move right behind a numbered one gets the number that follows."""
    position, ply = 0, None
    while match := MOVE.search(text, position):
        san = match["numbered"] or match["plain"]
        black = bool(match["dots"] and match["dots"] != ".")
        ply = 2 * int(match["number"]) + black if match["number"] else None
        glued = position > 0 and re.fullmatch(r"[!?]{0,2},? *", text[position:match.start()]) is not None
        yield Named(match.start(), match.end(), ply, bool(match["bare"]), san.rstrip("+#"), san[len(san.rstrip("+#")):], glued)
        position = match.end()
        while ply is not None and (more := CONTINUES.match(text, position)):
            san, ply = more["san"], ply + 1
            yield Named(more.start("san"), more.end(), ply, False, san.rstrip("+#"), san[len(san.rstrip("+#")):], True)
            position = more.end()


def piece_mentions(text: str) -> Iterator[Mention]:
    for match in MENTION.finditer(text):
        words = f"{match['det'] or ''} {match['adjective']}".lower()
        side = True if "white" in words else False if "black" in words else None
        definite = bool(match["det"]) and match["det"].lower() not in ("a", "an", "another", "no", "any", "one")
        kind = KINDS[(match["kind"] or match["kind2"]).lower()]
        for name in re.findall(SQUARE, (match["squares"] or match["square"]).lower()):
            yield Mention(match.start(), match.end(), kind, chess.parse_square(name), side, definite)

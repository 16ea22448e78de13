"""A comment with its position: its sentences, the lines that it follows, and whether some words of it are a plain claim.
Needs python-chess. Well under a millisecond a comment; keeps a few boards of some hundred bytes each."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import chess

from loop.review.words import CASTLING, HEDGE, Mention, Named, named_moves, piece_mentions

# How much is followed of the lines in one comment, so that a text of nothing but moves costs no seconds; the rest is let pass.
MAX_MOVES, MAX_BOARDS = 80, 32
FAR = 600           # characters; a sentence is read no further from what is judged

SAN_PARTS = re.compile(r"(?P<kind>[KQRBN])?(?P<file>[a-h])?(?P<rank>[1-8])?x?(?P<to>[a-h][1-8])(?:=?(?P<new>[QRBN]))?")
SENTENCE_END = re.compile(r"(?<![ \d]\d)(?<!^\d)(?<!\.)[.!?…]+[\"')\]’”]*(?=\s+[^a-z\s]|\s*$)|\n+")
CLAUSE_END = re.compile(r"[,;:.!?()—\n]| (?:and|but|because|since|so|while|yet|whereas)\b")
LATE_CONDITION = re.compile(r"[,;—] *(?:if|when|after|once|unless|until|provided|should|as soon)\b")


class Flag(NamedTuple):
    """What a check finds wrong: the check's name, where in the text, the words there, and why they cannot be right."""

    check: str
    start: int
    end: int
    quote: str
    why: str


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
    def move_starts(self) -> list[int]:
        return [named.start for named in self.moves]

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
        for named in self.moves[:MAX_MOVES]:
            if self.about_other_move(named.start):
                continue
            boards = [self.before, self.after, *(board for _, board in reached)]
            fits = [(board, move) for board in boards if (move := parsed(board, named.san)) is not None]
            if len(boards) > MAX_BOARDS:
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

    @cached_property
    def mention_ends(self) -> list[int]:
        return [mention.end for mention in self.mentions]

    def mentions_before(self, position: int) -> list[Mention]:
        """The last of the pieces named up to `position`, at most as many as one sentence would list."""
        stop = bisect_right(self.mention_ends, position)
        return self.mentions[max(0, stop - 8):stop]

    def sentence(self, position: int) -> tuple[int, int]:
        """Begin and end of the sentence in which `position` lies; of an endless one, what is near."""
        place = bisect_right(self.sentences, (position, len(self.text) + 1)) - 1
        start, end = self.sentences[place] if place >= 0 else (0, len(self.text))
        return max(start, position - FAR), min(end, position + FAR)

    def moves_within(self, start: int, end: int) -> list[Named]:
        return self.moves[bisect_left(self.move_starts, start):bisect_left(self.move_starts, end)]

    def is_played(self, named: Named) -> bool:
        """Whether a named move is the row's own."""
        return named.ply in (None, self.ply) and parsed(self.before, named.san) == self.move

    def about_other_move(self, position: int) -> bool:
        """Whether the paragraph begins with the number of another move: it comments on that one."""
        start = self.text.rfind("\n", 0, position) + 1
        first = self.moves_within(start, position + 1)[:1]
        if start == 0 or not first or self.text[start:first[0].start].strip():
            return False
        return first[0].ply not in (None, self.ply)

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
        return all(self.is_played(named) for named in self.moves_within(since, clause_end))


def parsed(board: chess.Board, san: str) -> chess.Move | None:
    """The move that `san` names on `board`, read leniently; None if it is illegal there. The null move if several fit.

    `board.parse_san` would do, but writes the whole position into each error, ten times the time of the rest.
    """
    if re.fullmatch(CASTLING, san):
        long = san.count("-") == 2
        found = [move for move in board.generate_castling_moves() if board.is_queenside_castling(move) == long]
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

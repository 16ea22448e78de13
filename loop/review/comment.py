"""A comment with its position: its sentences, the lines that it follows, and whether some words of it are a plain claim.
Needs python-chess. One or two milliseconds a comment; keeps a few boards of some hundred bytes each."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import chess

from loop.review.words import HEDGE, KINDS, PIECE, SIDE, SQUARE, THE, Mention, Named, named_moves

MAX_MOVES = 60      # so many are followed in one comment, so that a text of nothing but moves costs no seconds

SENTENCE_END = re.compile(r"(?<![ \d]\d)(?<!^\d)(?<!\.)[.!?…]+[\"')\]’”]*(?=\s+[^a-z\s]|\s*$)|\n+")
CLAUSE_END = re.compile(r"[,;:.!?()—\n]| (?:and|but|because|since|so|while|yet|whereas)\b")
LATE_CONDITION = re.compile(r"[,;—]? *(?:and )?(?:if|when|then|after|once|unless|until|provided|should|as soon)\b")
SUBJECT = rf"(?:\b(?P<side>{SIDE})|(?:{THE}|\ban?) (?:\w+ )?(?P<kind>{PIECE})(?: on {SQUARE})?)"
ACTS = re.compile(rf"{SUBJECT} (?:(?:now|simply|just|also|then) )?$", re.IGNORECASE)
BEGINS = re.compile(rf"\W*{SUBJECT} ", re.IGNORECASE)


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
        return self.board

    @cached_property
    def played(self) -> chess.Move:
        assert self.move is not None
        return self.move

    @cached_property
    def after(self) -> chess.Board:
        return pushed(self.before, self.played)

    @cached_property
    def san(self) -> str:
        return self.before.san(self.played).rstrip("+#")

    @cached_property
    def sentences(self) -> list[tuple[int, int]]:
        ends = [match.end() for match in SENTENCE_END.finditer(self.text)] + [len(self.text)]
        return [(start, end) for start, end in zip([0, *ends], ends) if self.text[start:end].strip()]

    def sentence(self, position: int) -> tuple[int, int]:
        """Begin and end of the sentence in which `position` lies."""
        return next(((start, end) for start, end in self.sentences if start <= position < end), (0, len(self.text)))

    def clause_end(self, position: int) -> int:
        """Where the clause ends whose words up to `position` are looked at."""
        last = self.sentence(position - 1)[1]
        stop = CLAUSE_END.search(self.text, position, last)
        return stop.start() if stop else last

    @cached_property
    def moves(self) -> list[Named]:
        return list(named_moves(self.text))

    @cached_property
    def followed(self) -> list[Named]:
        return [named for named in self.moves if not self.about_other_move(named.start)][:MAX_MOVES]

    @cached_property
    def lines(self) -> list[tuple[int, chess.Board]]:
        """The boards that the text speaks of and from where on: before and after the move, then wherever a move that is named
        leads from the newest board on which it is legal."""
        lines = [(0, self.before), (0, self.after)]
        for named in self.followed:
            fits = [(board, move) for _, board in lines if (move := parsed(board, named.san))]
            if fits and fits[-1] != (self.before, self.move):
                lines.append((named.end, pushed(*fits[-1])))
        return lines

    def boards_at(self, position: int) -> list[chess.Board]:
        return [board for start, board in self.lines if start <= position]

    def there(self, mention: Mention) -> list[chess.Board]:
        """The boards on which the mentioned piece stands."""
        return [board for board in self.boards_at(mention.start)
                if board.piece_type_at(mention.square) == mention.kind
                and mention.side in (None, board.color_at(mention.square))]

    def is_played(self, named: Named) -> bool:
        """Whether a named move is the row's own, and not a reply that is written alike and gives check."""
        return (named.ply in (None, self.before.ply()) and parsed(self.before, named.san) == self.move
                and not (named.mark and parsed(self.after, named.san)))

    def about_other_move(self, position: int) -> bool:
        """Whether the paragraph begins with the number of another move: it comments on that one."""
        start = self.text.rfind("\n", 0, position) + 1
        first = next((named for named in self.moves if start <= named.start <= position), None)
        if start == 0 or first is None or self.text[start:first.start].strip():
            return False
        return first.ply not in (None, self.before.ply())

    def plain(self, start: int, end: int, hedge: re.Pattern[str] = HEDGE) -> bool:
        """Whether the words from `start` to `end` say something of this move on this board, and suppose nothing.

        Looked at are the words from the sentence's begin to the clause's end, without the claim's own, and whether other moves
        are named there or in the sentence before, since a sentence that follows a line may still be about it.
        """
        first, last = self.sentence(start)
        clause_end = self.clause_end(end)
        if self.text[first:last].rstrip(" \"')\n").endswith("?") or self.about_other_move(start):
            return False
        if hedge.search(self.text, first, start) or hedge.search(self.text, end, clause_end) \
                or LATE_CONDITION.match(self.text, clause_end):
            return False
        since = self.sentence(first - 1)[0] if first and hedge is HEDGE else first
        return all(self.is_played(named) for named in self.moves if since <= named.start < clause_end)

    def said(self, pattern: re.Pattern[str]) -> Iterator[re.Match[str]]:
        """Where the comment plainly says what the pattern stands for."""
        return (match for match in pattern.finditer(self.text) if self.plain(*match.span()))

    def subject(self, position: int) -> str | int | None:
        """What the words before a verb name as its subject: "white", "black", a kind of piece, or nothing known."""
        lead = self.text[self.sentence(position)[0]:position]
        match = ACTS.search(lead) or (BEGINS.match(lead) if lead.endswith(" and ") else None)
        if match is None:
            return None
        return match["side"].lower() if match["side"] else KINDS[match["kind"].lower()]


def parsed(board: chess.Board, san: str) -> chess.Move | None:
    """The move that `san` names on `board`; None if it is illegal there. The null move, which is false, if several fit."""
    try:
        return board.parse_san(san)
    except chess.AmbiguousMoveError:
        return chess.Move.null()
    except ValueError:
        return None


def pushed(board: chess.Board, move: chess.Move) -> chess.Board:
    """The position after a move; after the null move it is the same with the other side to move."""
    after = board.copy(stack=False)
    after.push(move)
    after.clear_stack()
    return after
